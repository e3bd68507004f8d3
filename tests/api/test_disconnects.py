"""A disconnect frees the request's resources in the engine."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import Request

from serve.api import middleware
from serve.api.json_stream import Body, Placeholder, make_body
from serve.api.middleware import AnswerRecord
from serve.api.sse import json_or_disconnect, stream_or_disconnect
from tests.support.http_client import (
    PATHS,
    Connection,
    Gate,
    Server,
    body_of,
)


@PATHS
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["prefill", "decode"])
async def test_disconnect_before_first_token(fresh_server: Server, path: str, stream: bool, name: str) -> None:
    gate = fresh_server.runner.before_call = Gate(name)
    connection = Connection(path, body_of(path, stream=stream, max_tokens=400, n=2, ignore_eos=True))
    run = asyncio.create_task(connection.run(fresh_server.app))
    await gate.reached()
    connection.leave()
    await run
    gate.open()
    await fresh_server.assert_idle()
    assert [name for name, _ in fresh_server.runner.calls].count("decode") == 1  # of the step that was running


@PATHS
@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_while_generating(fresh_server: Server, path: str, stream: bool) -> None:
    gate = fresh_server.runner.before_call = Gate("decode", after=3)
    connection = Connection(path, body_of(path, stream=stream, max_tokens=400, n=2, ignore_eos=True))
    run = asyncio.create_task(connection.run(fresh_server.app))
    await gate.reached()
    if stream:
        await connection.data()
    connection.leave()
    await run
    gate.open()
    await fresh_server.assert_idle()
    assert [name for name, _ in fresh_server.runner.calls].count("decode") == 4


@PATHS
@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_while_queued(fresh_server: Server, path: str, stream: bool) -> None:
    """The request waits behind four running ones, the maximum, which are not affected."""
    gate = fresh_server.runner.before_call = Gate("decode")
    others = [asyncio.create_task(fresh_server.complete(max_tokens=4)) for _ in range(4)]
    await gate.reached()
    connection = Connection(path, body_of(path, stream=stream))
    run = asyncio.create_task(connection.run(fresh_server.app))
    async with asyncio.timeout(20):
        while fresh_server.engine.num_requests < 5:
            await asyncio.sleep(0)
    connection.leave()
    await run
    gate.open()
    assert [(await other)["choices"][0]["text"] for other in others] == ["Hell"] * 4
    await fresh_server.assert_idle()


@PATHS
async def test_disconnect_at_end(fresh_server: Server, path: str) -> None:
    connection = Connection(path, body_of(path, stream=True, max_tokens=1))
    run = asyncio.create_task(connection.run(fresh_server.app))
    while b"[DONE]" not in await connection.data():
        pass
    connection.leave()
    await run
    await fresh_server.assert_idle()


@pytest.mark.parametrize("kind", ["events", "json", "gzip"])
async def test_disconnect_between_first_piece_and_head_closes_the_rest_at_once(kind: str) -> None:
    closed: list[str] = []
    left = asyncio.Event()

    async def rest(pieces: list[Any]) -> AsyncGenerator[Any]:
        try:
            for piece in pieces:
                yield piece
        finally:
            closed.append("rest")

    async def body() -> Body:
        return make_body([Placeholder(rest([b"1", b"2"]))])

    async def receive() -> Any:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        assert message["type"] == "http.response.start"
        left.set()
        await asyncio.Event().wait()  # the transport is full

    record = AnswerRecord("id", "POST", "/")
    headers = [(b"accept-encoding", b"gzip")] if kind == "gzip" else []
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, middleware._RECORD: record}
    request = Request(scope, receive)
    if kind == "events":
        response = await stream_or_disconnect(request, rest([{"choices": []}] * 2), lambda: closed.append("request"))
    else:
        response = await json_or_disconnect(request, body(), lambda: closed.append("request"))
    async with asyncio.timeout(20):
        await response(scope, receive, send)
    assert closed == ["request", "rest"]
    assert record.error == "client_gone"
