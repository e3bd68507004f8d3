"""Bodies: requests' bodies, read within a size, a time, and a size of all that are being read."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from serve.api.errors import APIError, client_gone

_AT_ONCE = 4  # bodies of the largest size that may be held together
_SMALL = 64 << 10  # bytes of each that do not count: large ones that come slowly keep no small one out


class Bodies:
    """Reads the bodies of one app."""

    def __init__(self, *, max_bytes: int, seconds: float) -> None:
        """A body may have `max_bytes`, and its sender may take so many seconds."""
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._held = 0  # bytes of bodies that somebody has not done with

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a JSON request; it counts as held while the block runs.

        Raises:
            APIError: 400 for another content type, 408 where it does not come, 413 for one that is too large, 499 where
                the client goes away before its end, 503 where too much is held.
        """
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise APIError(400, "The content type must be application/json.", None, "invalid_content_type")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > self._max_bytes):
            raise self._too_large()
        data = bytearray()
        try:
            try:
                async with asyncio.timeout(self._seconds):
                    async for chunk in request.stream():
                        self._hold(_counted(len(data) + len(chunk)) - _counted(len(data)))
                        data += chunk
                        if len(data) > self._max_bytes:
                            raise self._too_large()
            except ClientDisconnect:
                raise client_gone() from None
            except TimeoutError:
                message = f"The body did not come within {self._seconds:g} s."
                raise APIError(408, message, None, "request_timeout", {"Connection": "close"}) from None
            yield bytes(data)
        finally:
            self._held -= _counted(len(data))

    def _hold(self, more: int) -> None:
        if more and self._held + more > _AT_ONCE * self._max_bytes:
            message = "The server is reading too many large requests. Try again later."
            raise APIError(503, message, None, "too_many_bodies", {"Retry-After": "1"})
        self._held += more

    def _too_large(self) -> APIError:
        return APIError(413, f"The body is larger than {self._max_bytes} bytes.", None, "request_too_large")


def _counted(size: int) -> int:
    """Of a body's bytes, those that count as held."""
    return max(0, size - _SMALL)
