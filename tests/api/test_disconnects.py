"""A client that leaves frees what it held in the engine."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.support.http_client import (
    PATHS,
    Connection,
    Gate,
    Server,
    body_of,
    serving,
)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as server:
        yield server


@PATHS
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["prefill", "decode"])
async def test_a_client_leaves_before_the_first_token(server: Server, path: str, stream: bool, name: str) -> None:
    gate = server.runner.before_call = Gate(name)
    connection = Connection(path, body_of(path, stream=stream, max_tokens=400, n=2, ignore_eos=True))
    run = asyncio.create_task(connection.run(server.app))
    await gate.reached()
    connection.leave()
    await run
    gate.open()
    await server.assert_idle()
    assert [name for name, _ in server.runner.calls].count("decode") == 1  # of the step that was at work


@PATHS
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_leaves_in_the_middle(server: Server, path: str, stream: bool) -> None:
    gate = server.runner.before_call = Gate("decode", after=3)
    connection = Connection(path, body_of(path, stream=stream, max_tokens=400, n=2, ignore_eos=True))
    run = asyncio.create_task(connection.run(server.app))
    await gate.reached()
    if stream:
        await connection.data()
    connection.leave()
    await run
    gate.open()
    await server.assert_idle()
    assert [name for name, _ in server.runner.calls].count("decode") == 4


@PATHS
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_leaves_the_queue(server: Server, path: str, stream: bool) -> None:
    """It waits behind four others, as many as run at once; they are not disturbed."""
    gate = server.runner.before_call = Gate("decode")
    others = [asyncio.create_task(server.complete(max_tokens=4)) for _ in range(4)]
    await gate.reached()
    connection = Connection(path, body_of(path, stream=stream))
    run = asyncio.create_task(connection.run(server.app))
    async with asyncio.timeout(20):
        while len(server.engine._streams) < 5:
            await asyncio.sleep(0)
    connection.leave()
    await run
    gate.open()
    assert [(await other)["choices"][0]["text"] for other in others] == ["Hell"] * 4
    await server.assert_idle()


@PATHS
async def test_a_client_leaves_at_the_last_moment(server: Server, path: str) -> None:
    connection = Connection(path, body_of(path, stream=True, max_tokens=1))
    run = asyncio.create_task(connection.run(server.app))
    while b"[DONE]" not in await connection.data():
        pass
    connection.leave()
    await run
    await server.assert_idle()
