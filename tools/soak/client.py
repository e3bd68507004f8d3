"""Client: send one request with its behavior and record what arrived and when. It never retries."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import httpx2

from tools.soak.request import ClientBehavior, Request

# Far below the server's keep-alive timeout, so that no request is sent on a connection that the server is closing.
_KEPT_OPEN = 2.0
# A small receive buffer, so that the server notices a client that does not read.
_RECEIVED = (socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)


@dataclass(slots=True)
class Answer:
    """Everything received for one request."""

    request_id: str
    started: float
    status: int | None = None  # None: nothing received
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: list[tuple[float, bytes]] = field(default_factory=list)  # (arrival time, bytes)
    left: bool = False  # the client disconnected as planned
    failure: str | None = None  # error seen by the client

    @property
    def body(self) -> bytes:
        """The received body."""
        return b"".join(piece for _, piece in self.pieces)


class _LeftError(Exception):
    """Raised to disconnect."""


def connect(url: str) -> httpx2.AsyncClient:
    """Return a client without limits on connections or time; `send` limits the time."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEPT_OPEN)
    transport = httpx2.AsyncHTTPTransport(limits=limits, socket_options=[_RECEIVED])
    return httpx2.AsyncClient(base_url=url, timeout=None, transport=transport)


async def send(http: httpx2.AsyncClient, request: Request, request_id: str, timeout: float) -> Answer:
    """Send a request and return what arrived; no end after `timeout` seconds is a failure."""
    answer = Answer(request_id, time.perf_counter())
    try:
        async with asyncio.timeout(timeout):
            await _exchange(http, request, answer)
    except _LeftError:
        answer.left = True
    except TimeoutError:
        answer.failure = f"no end after {timeout:.0f} s"
    except httpx2.HTTPError as error:
        answer.failure = f"{type(error).__name__}: {error}"
    return answer


async def _exchange(http: httpx2.AsyncClient, request: Request, answer: Answer) -> None:
    if request.behavior is not ClientBehavior.LEAVES_WAITING:
        await _read(http, request, answer)
        return
    try:
        async with asyncio.timeout(request.patience):
            await _read(http, request, answer)
    except TimeoutError:
        raise _LeftError from None


async def _read(http: httpx2.AsyncClient, request: Request, answer: Answer) -> None:
    headers = {"content-type": "application/json", **request.headers, "x-request-id": answer.request_id}
    content = _content(request)
    if request.behavior is ClientBehavior.LEAVES_SENDING:
        headers["content-length"] = str(len(content))
    method, sent = ("GET", None) if request.is_get else ("POST", _sent(request, content))
    async with http.stream(method, request.path, content=sent, headers=headers) as response:
        answer.status, answer.headers = response.status_code, response.headers
        async for piece in response.aiter_bytes():
            answer.pieces.append((time.perf_counter(), piece))
            if request.behavior is ClientBehavior.LEAVES_READING and len(answer.pieces) >= request.patience:
                raise _LeftError
            if request.behavior is ClientBehavior.READS_SLOWLY:
                await asyncio.sleep(request.patience)


def _content(request: Request) -> bytes:
    if isinstance(request.body, bytes):
        return request.body
    return b"" if request.body is None else json.dumps(request.body).encode()


def _sent(request: Request, content: bytes) -> bytes | AsyncIterator[bytes]:
    return _truncated(content, request.patience) if request.behavior is ClientBehavior.LEAVES_SENDING else content


async def _truncated(content: bytes, share: float) -> AsyncIterator[bytes]:
    """Yield the beginning of a body, give the server time to read it, then disconnect."""
    yield content[: int(share * len(content))]
    await asyncio.sleep(share / 10)
    raise _LeftError
