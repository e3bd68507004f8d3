"""gzip: for long JSON answers if the client accepts it, never for short answers and event streams."""

import gzip
import json
from typing import Any

import pytest

from tests.support.http_client import ExactRunner, Server, chat_body, completion_body

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = "0123456789" * 25


SERVER_OPTIONS: dict[str, Any] = {"runner": ExactRunner, "full_vocab": True}


async def raw(server: Server, path: str, body: dict[str, Any], accept: str | None) -> tuple[bytes, Any]:
    """An answer's bytes as sent, and its headers."""
    headers = {} if accept is None else {"accept-encoding": accept}
    request = server.client.build_request("POST", path, json=body, headers=headers)
    if accept is None:
        del request.headers["accept-encoding"]
    response = await server.client.send(request, stream=True)
    assert response.status_code == 200
    return b"".join([part async for part in response.aiter_raw()]), response.headers


def comparable(data: bytes) -> Any:
    """An answer's JSON without the fields that differ between equal requests."""
    return {name: value for name, value in json.loads(data).items() if name not in ("id", "created", "usage")}


@pytest.mark.parametrize("accept", ["gzip", "br, gzip;q=0.5", "deflate, GZIP"])
@pytest.mark.parametrize("full_vocab", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_gzip_long_answer(server: Server, path: str, full_vocab: bool, accept: str) -> None:
    fields: dict[str, Any] = {"max_tokens": 1, "prompt_logprobs": -1 if full_vocab else 3}
    body = chat_body(messages=[{"role": "user", "content": LONG}]) if path == CHAT else completion_body(prompt=LONG)
    zipped, headers = await raw(server, path, body | fields, accept)
    assert headers["content-encoding"] == "gzip"
    assert "Accept-Encoding" in headers["vary"]
    plain, bare = await raw(server, path, body | fields, None)
    assert "content-encoding" not in bare
    assert len(zipped) < len(plain) / 3
    assert comparable(gzip.decompress(zipped)) == comparable(plain)
    assert (await server.post(path, body | fields)).json()["model"]  # httpx decompresses it


@pytest.mark.parametrize("accept", [None, "identity", "br", "gzip;q=0", "gzip; q=0.000, br"])
@pytest.mark.parametrize("k", [3, -1])
async def test_gzip_not_accepted(server: Server, accept: str | None, k: int) -> None:
    data, headers = await raw(server, COMPLETIONS, completion_body(prompt=LONG, prompt_logprobs=k), accept)
    assert "content-encoding" not in headers
    assert data.startswith(b"{")


@pytest.mark.parametrize("fields", [{}, {"stream": True, "prompt": LONG, "prompt_logprobs": 3}])
async def test_gzip_not_for_short_answers_and_events(server: Server, fields: dict[str, Any]) -> None:
    data, headers = await raw(server, COMPLETIONS, completion_body(**fields), "gzip")
    assert "content-encoding" not in headers
    assert data.startswith((b"{", b"data: "))
