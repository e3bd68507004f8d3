"""JSON as bytes: large values are streamed into placeholders of the document, and gzip runs in threads."""

import asyncio
import gzip
import re
import uuid
import zlib
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

_MIN_GZIP = 16 << 10  # bytes; compressing less takes longer than sending it
_GZIP_LEVEL = 1  # higher levels shrink numbers hardly further and take many times as long
_NO_GZIP = re.compile(r"\bgzip\s*;\s*q=0(\.0*)?\s*(,|$)")
GZIP_HEADERS = {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}


def dump(value: Any) -> bytes:
    """Serialize to JSON. A numpy float32 becomes the shortest text that parses to the same float32."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def dump_list(parts: Iterable[list[Any]]) -> orjson.Fragment:
    """The JSON of one list, made part by part; no part is empty."""
    return orjson.Fragment(b"[" + b",".join(dump(part)[1:-1] for part in parts) + b"]")


def json_response(value: Any) -> Response:
    return Response(dump(value), media_type="application/json")


class Placeholder:
    """A placeholder in a value for JSON text that is generated in pieces.

    Not a dataclass, because orjson would serialize its fields.
    """

    def __init__(self, pieces: AsyncGenerator[bytes]) -> None:
        self.pieces = pieces


@dataclass(frozen=True, slots=True)
class Body:
    """A JSON document, split at its placeholders."""

    parts: list[bytes]  # one more than placeholders: before, between and after them
    placeholders: list[Placeholder]

    async def pieces(self) -> AsyncGenerator[bytes]:
        """The document in pieces. The first one includes the start of the first placeholder, to fail early."""
        text = self.parts[0]
        for placeholder, after in zip(self.placeholders, self.parts[1:], strict=True):
            async with aclosing(placeholder.pieces) as pieces:
                async for piece in pieces:
                    yield text + piece
                    text = b""
            text += after
        yield text


def make_body(value: Any) -> Body:
    """Serialize a value that may contain `Placeholder`s."""
    mark = uuid.uuid4().hex  # 122 random bits: no client can place it in the value
    placeholders: list[Placeholder] = []

    def replace(part: Any) -> str:
        if not isinstance(part, Placeholder):
            raise TypeError(f"{type(part).__name__} has no JSON")
        placeholders.append(part)
        return mark

    data = orjson.dumps(value, default=replace, option=orjson.OPT_SERIALIZE_NUMPY)
    return Body(data.split(f'"{mark}"'.encode()), placeholders)


def accepts_gzip(request: Request) -> bool:
    accepted = request.headers.get("accept-encoding", "").lower()
    return "gzip" in accepted and not _NO_GZIP.search(accepted)


async def compress(data: bytes) -> bytes | None:
    """`data` compressed; None if it is too small to gain from it."""
    return await asyncio.to_thread(gzip.compress, data, _GZIP_LEVEL, mtime=0) if len(data) >= _MIN_GZIP else None


async def compress_pieces(pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    stream = zlib.compressobj(_GZIP_LEVEL, wbits=zlib.MAX_WBITS | 16)
    async with aclosing(pieces):
        async for piece in pieces:
            part = await asyncio.to_thread(stream.compress, piece)
            if part:
                yield part
    yield stream.flush()
