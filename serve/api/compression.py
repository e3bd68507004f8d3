"""gzip for JSON answers: many numbers are long, and shrink to a third. Done in threads, away from the event loop."""

import asyncio
import gzip
import re
import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request

_LEAST = 16 << 10  # bytes; below, the network is no slower than the compression
_LEVEL = 1  # numbers hardly shrink further at the higher ones, which take many times as long
_REFUSED = re.compile(r"\bgzip\s*;\s*q=0(\.0*)?\s*(,|$)")
HEADERS = {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}


def takes_gzip(request: Request) -> bool:
    """Whether the client says so."""
    accepted = request.headers.get("accept-encoding", "").lower()
    return "gzip" in accepted and not _REFUSED.search(accepted)


async def compressed(data: bytes) -> bytes | None:
    """A whole answer, smaller; None for one that is better sent as it is."""
    return await asyncio.to_thread(gzip.compress, data, _LEVEL, mtime=0) if len(data) >= _LEAST else None


async def compressed_pieces(pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """An answer that comes in pieces, each sent as it comes."""
    stream = zlib.compressobj(_LEVEL, wbits=zlib.MAX_WBITS | 16)
    async with aclosing(pieces):
        async for piece in pieces:
            part = await asyncio.to_thread(stream.compress, piece)
            if part:
                yield part
    yield stream.flush()
