"""Budget of memory, and request bodies, read and parsed within limits.

The Ray front uses this, so it imports nothing heavy.
"""

import asyncio
import sys
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request

from serve.api.errors import APIError, client_gone

if sys.version_info >= (3, 14):
    from compression.zstd import DecompressionParameter, ZstdDecompressor, ZstdError
else:
    from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

# Paths whose POST requests have a JSON body. The Ray front reads no other bodies.
BODY_PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/invocations", "/v1/decisions", "/v1/systemone", "/v1/score"),
    *("/generative_scoring", "/tokenize", "/detokenize"),
    *("/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
)

SMALL = 64 << 10  # bytes of each holding that are not counted, so that slow large ones never block small ones
_MAX_LARGE = 4  # bodies of the maximum size that may be in memory together
# Arrays, objects, keys and strings of a body. The parser holds the interpreter for up to 1 us per item.
_MAX_ITEMS = 300_000  # a `logit_bias` of the largest vocabularies has 262,144 keys

_PIECE = 1 << 20  # bytes that are decompressed at a time
_ZSTD_WINDOW_LOG = 23  # 8 MiB, the limit of RFC 9659 for Content-Encoding
_ZLIB_FORMATS = {"gzip": zlib.MAX_WBITS | 16, "x-gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}


class Budget:
    """A maximum for the counted bytes of all holdings, half of it for those of one key. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._by_key: Counter[str | None] = Counter()

    @property
    def used(self) -> int:
        return self._by_key.total()

    def limit(self, key: str | None) -> int:
        """Bytes that a key may have in memory; all of them if the server has no keys."""
        return self._max_bytes if key is None else self._max_bytes // 2

    def take(self, key: str | None, size: int) -> bool:
        """Count `size` more bytes; False, without effect, if there is no room for them. Negative sizes always fit."""
        if size > 0 and size > min(self._max_bytes - self.used, self.limit(key) - self._by_key[key]):
            return False
        self._by_key[key] += size
        if not self._by_key[key]:
            del self._by_key[key]
        return True


class Holding:
    """The bytes of one request in a budget."""

    def __init__(self, budget: Budget, key: str | None = None) -> None:
        self._budget = budget
        self._key = key
        self._closed = False
        self.size = 0

    @property
    def limit(self) -> int:
        """The largest size of a single holding."""
        return self._budget.limit(self._key) + SMALL

    def another(self) -> "Holding":
        return Holding(self._budget, self._key)

    def resize(self, size: int) -> bool:
        """Hold `size` bytes from now on; False, without effect, if there is no room. No effect after `close`."""
        if not self._closed:
            if not self._budget.take(self._key, _counted_bytes(size) - _counted_bytes(self.size)):
                return False
            self.size = size
        return True

    def close(self) -> None:
        self.resize(0)
        self._closed = True


def _counted_bytes(size: int) -> int:
    return max(0, size - SMALL)


class Bodies:
    """Reads the bodies of one app."""

    def __init__(self, *, max_bytes: int, seconds: float) -> None:
        """Limit each body to `max_bytes`, to be received within `seconds`."""
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._budget = Budget(_MAX_LARGE * max_bytes)

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a JSON request, decompressed. Its memory counts until the block ends.

        Raises:
            APIError: 400 for another content type or data that cannot be decompressed, 408 for a timeout, 413 for too
                large a body, 415 for an unknown compression, 499 if the client disconnects before its end, 503 if all
                bodies together are too large.
        """
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            message = "The content type must be application/json."
            if kind.startswith("multipart/"):
                message += " Assets, such as images, are not supported."
            raise APIError(400, message, None, "invalid_content_type")
        decompress = _decompressor(request)
        holding = Holding(self._budget)
        try:
            try:
                async with asyncio.timeout(self._seconds):
                    data = await self._collect(read_chunks(request, self._max_bytes), holding)
            except TimeoutError:
                message = f"The request body was not received within {self._seconds:g} s."
                raise APIError(408, message, None, "request_timeout", {"Connection": "close"}) from None
            if decompress is not None:
                data = await self._collect(decompress(data), holding)
            yield data
        finally:
            holding.close()

    async def _collect(self, chunks: AsyncGenerator[bytes], holding: Holding) -> bytes:
        """The chunks as one body, counted in addition to what is held until it is complete."""
        data, before = bytearray(), holding.size
        async with aclosing(chunks):
            async for chunk in chunks:
                if len(data) + len(chunk) > self._max_bytes:
                    raise _too_large(self._max_bytes)
                if not holding.resize(before + len(data) + len(chunk)):
                    message = "The server is reading too many large requests. Try again later."
                    raise APIError(503, message, None, "too_many_bodies", {"Retry-After": "1"})
                data += chunk
        holding.resize(len(data))
        return bytes(data)


async def read_chunks(request: Request, max_bytes: int) -> AsyncGenerator[bytes]:
    """Yield the chunks of a request's body.

    Raises:
        APIError: 413 if it declares more than `max_bytes`, 499 if the client disconnects before its end.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > max_bytes):
        raise _too_large(max_bytes)
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        raise client_gone() from None


def _too_large(max_bytes: int) -> APIError:
    message = f"The request body is larger than the maximum of {max_bytes} bytes."
    return APIError(413, message, None, "request_too_large")


def _decompressor(request: Request) -> Callable[[bytes], AsyncGenerator[bytes]] | None:
    """What decompresses the request's body; None for a plain one. Raise APIError 415 for another Content-Encoding."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity":
        return None
    if encoding not in ("zstd", *_ZLIB_FORMATS):
        supported = "zstd, gzip, deflate"
        message = f"The Content-Encoding {encoding[:100]!r} is not supported; send one of {supported}."
        raise APIError(415, message, None, "unsupported_content_encoding", {"Accept-Encoding": supported})
    decompress = _unzstd if encoding == "zstd" else partial(_inflate, _ZLIB_FORMATS[encoding])
    return partial(_decompressed, encoding, decompress)


async def _decompressed(
    encoding: str, decompress: Callable[[bytes], Iterator[bytes]], data: bytes
) -> AsyncGenerator[bytes]:
    """Decompress in threads, piece by piece. Raise APIError 400 for invalid data."""
    pieces = decompress(data)
    try:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece
    except (zlib.error, ZstdError, EOFError):
        raise APIError(400, f"The body is not valid {encoding} data.", None, "invalid_content_encoding") from None


def _unzstd(data: bytes) -> Iterator[bytes]:
    """Raise EOFError for incomplete data and for data after its end."""
    stream = ZstdDecompressor(options={DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG})
    while not stream.eof:
        piece = stream.decompress(data, _PIECE)
        if not piece and not stream.eof:
            raise EOFError
        data = b""  # the stream keeps what it has not read
        yield piece
    if stream.unused_data:
        raise EOFError


def _inflate(wbits: int, data: bytes) -> Iterator[bytes]:
    """As `_unzstd`, for the formats of zlib."""
    stream = zlib.decompressobj(wbits)
    while not stream.eof:
        piece = stream.decompress(data, _PIECE)
        if not piece and not stream.eof:
            raise EOFError
        data = stream.unconsumed_tail
        yield piece
    if stream.unused_data:
        raise EOFError


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        APIError: 400 for invalid JSON, another type, or too many items.
    """
    if _items(body) > _MAX_ITEMS:
        message = f"The body has more than {_MAX_ITEMS} arrays, objects, keys and strings."
        raise APIError(400, message, None, "invalid_json")
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        reason = str(error).split(":")[0]
        raise APIError(400, f"The body is not valid JSON: {reason}.", None, "invalid_json") from None
    if not isinstance(data, dict):
        raise APIError(400, "The body must be a JSON object.", None, "invalid_json")
    return data


def _items(body: bytes) -> int:
    """Arrays, objects, keys and strings of valid JSON; brackets in strings count, too."""
    quotes = body.replace(rb"\\", b"") if rb"\\" in body else body
    strings = (quotes.count(b'"') - quotes.count(rb"\"")) // 2
    return strings + body.count(b"[") + body.count(b"{")
