"""Request bodies with a Content-Encoding: decompressed within the limits of a plain body."""

import asyncio
import gzip
import json
import random
import string
import sys
import zlib
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from serve.api.request_body import _PIECE
from tests.support.http_client import COMPLETIONS, Server, answered, completion_body, error_of, serving

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_BODY = 3 * _PIECE
FORMATS: dict[str, Callable[[bytes], bytes]] = {
    "zstd": zstd.compress,
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "GZip": gzip.compress,
    "identity": bytes,
}
SERVER_OPTIONS: dict[str, Any] = {"max_body_bytes": MAX_BODY}
EACH = pytest.mark.parametrize("encoding", ["zstd", "gzip", "deflate"])


def noise(size: int) -> str:
    """Letters that compress badly, so that a decompressor has input left when its output is full."""
    return "".join(random.Random(size).choices(string.ascii_letters, k=size))


async def send(server: Server, encoding: str, data: bytes, path: str = COMPLETIONS) -> httpx2.Response:
    return await server.post(path, data, **{"content-encoding": encoding})


async def refused(server: Server, encoding: str, data: bytes, status: int = 400) -> str | None:
    code: str | None = error_of(await send(server, encoding, data), status)["code"]
    return code


@pytest.mark.parametrize("encoding", FORMATS)
async def test_compressed_body_is_read(server: Server, encoding: str) -> None:
    data = FORMATS[encoding](json.dumps(completion_body()).encode())
    assert answered(await send(server, encoding, data))["choices"][0]["text"] == "Hello"
    ids = FORMATS[encoding](b'{"tokens": [72, 105]}')
    assert answered(await send(server, encoding, ids, "/detokenize"))["prompt"] == "Hi"


@EACH
@pytest.mark.parametrize("size", [_PIECE - 1, _PIECE, _PIECE + 1, MAX_BODY])
async def test_body_of_several_pieces(server: Server, encoding: str, size: int) -> None:
    body = json.dumps(completion_body(user="")).encode()
    data = FORMATS[encoding](body.replace(b'"user": ""', b'"user": "' + noise(size - len(body)).encode() + b'"'))
    assert answered(await send(server, encoding, data))["choices"][0]["text"] == "Hello"


@EACH
async def test_error_body_too_large_when_decompressed(server: Server, encoding: str) -> None:
    body = json.dumps(completion_body()).encode()
    assert await refused(server, encoding, FORMATS[encoding](body.ljust(MAX_BODY + 1)), 413) == "request_too_large"
    assert answered(await send(server, encoding, FORMATS[encoding](body.ljust(MAX_BODY))))


@EACH
async def test_bomb_is_not_decompressed_beyond_the_limit(
    server: Server, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[int] = []
    to_thread = asyncio.to_thread

    async def counted(function: Callable[..., object], *args: object) -> object:
        result = await to_thread(function, *args)
        pieces.append(len(result) if isinstance(result, bytes) else 0)
        return result

    monkeypatch.setattr("serve.api.request_body.asyncio.to_thread", counted)
    assert await refused(server, encoding, FORMATS[encoding](b" " * (64 << 20)), 413) == "request_too_large"
    assert pieces == [_PIECE] * 4


@EACH
async def test_error_invalid_data(server: Server, encoding: str) -> None:
    data = FORMATS[encoding](json.dumps(completion_body(user=noise(1000))).encode())
    for wrong in (b"", data[:-1], data[: len(data) // 2], data + b"{}", data + data, b"{}"):
        assert await refused(server, encoding, wrong) == "invalid_content_encoding"


async def test_error_zstd_window_larger_than_8_mebibytes(server: Server) -> None:
    """A decompressor allocates the window that the data declares, whatever its size."""
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 24, zstd.CompressionParameter.content_size_flag: 0}
    compressor = zstd.ZstdCompressor(options=options)
    data = compressor.compress(json.dumps(completion_body()).encode()) + compressor.flush()
    assert await refused(server, "zstd", data) == "invalid_content_encoding"


@pytest.mark.parametrize("encoding", ["br", "gzip, zstd", "", "zstd;q=1"])
async def test_error_unknown_encoding(server: Server, encoding: str) -> None:
    response = await send(server, encoding, b"{}")
    assert error_of(response, 415)["code"] == "unsupported_content_encoding"
    assert response.headers["accept-encoding"] == "zstd, gzip, deflate"


async def test_decompressed_bytes_count_in_the_memory_of_all_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a body is decompressed, both forms are in memory."""
    monkeypatch.setattr("serve.api.request_body._MAX_LARGE", 1)
    async with serving(**SERVER_OPTIONS) as server:
        body = json.dumps(completion_body()).encode()
        large = body.replace(b'"Hi"', b'"Hi", "user": "' + noise(MAX_BODY // 2).encode() + b'"')
        packed = FORMATS["gzip"](large.ljust(MAX_BODY))
        assert len(packed) > 1 << 16
        assert await refused(server, "gzip", packed, 503) == "too_many_bodies"
        assert answered(await server.post(COMPLETIONS, large))
        assert answered(await send(server, "gzip", FORMATS["gzip"](body)))
