"""Many clients over real connections: disconnects at any time, more requests than rows, slow readers.

Rows, pages, file descriptors and memory must return to their initial values.
"""

import asyncio
import gc
import json
import os
import random
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from serve.api.middleware import Readiness
from serve.engine.client import RequestHandle
from serve.engine.observer import EngineGauges
from tests.support.http_client import Gate, Server, completion_body, record_handles, serving
from tests.support.listening import listening

SECONDS = 60  # only reached if something hangs
IDLE = EngineGauges(running=0, waiting=0, pinned=0, cache_usage=0)
TOKENS = 24
LONG = {"max_tokens": TOKENS, "ignore_eos": True}


def raw(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    """Return the bytes of an HTTP request."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def leaving(url: str, choose: random.Random) -> None:
    """Send a long request and disconnect: while sending, before the answer, or within it."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    request = raw(completion_body(**LONG, n=choose.randint(1, 3), stream=choose.random() < 0.7, prompt_logprobs=2))
    moment = choose.choice(("sending", "sent", "reading", "reading"))
    try:
        writer.write(request[: choose.randrange(len(request))] if moment == "sending" else request)
        await writer.drain()
        if moment == "reading":
            await reader.read(choose.randrange(1, 4000))
    finally:
        if choose.random() < 0.5:
            writer.transport.abort()  # a reset instead of an orderly close
        writer.close()


async def staying(url: str, choose: random.Random) -> None:
    """Read the answer to its end and check that it is complete."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    stream = choose.random() < 0.5
    request = raw(completion_body(**LONG, stream=stream)).replace(b"Host: a", b"Host: a\r\nConnection: close")
    writer.write(request)
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200 "), answer[:200]
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") if stream else b'"completion_tokens":%d' % TOKENS in answer


async def crowd(count: int, at_once: int, client: Callable[[int], Awaitable[None]]) -> None:
    places = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with places:
            await client(number)

    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*(one(number) for number in range(count)))


def wait_until_idle(server: Server, readiness: Readiness) -> None:
    """Wait until the server is idle."""

    async def idle() -> None:
        async with asyncio.timeout(5):
            while readiness.running or server.engine.num_requests or server.engine.gauges != IDLE:
                await asyncio.sleep(0)

    asyncio.run(idle())


def open_files() -> int:
    return len(list(Path(f"/proc/{os.getpid()}/fd").iterdir()))


@pytest.mark.slow
def test_thousand_clients_disconnect_at_any_time(caplog: pytest.LogCaptureFixture) -> None:
    choose, readiness = random.Random(9), Readiness()
    with listening(script=b"x" * TOKENS, max_waiting=1000, readiness=readiness) as (url, server):
        before_all = open_files()

        def round_of(count: int) -> tuple[int, int]:
            """Return open files and allocated bytes after `count` disconnects."""
            asyncio.run(crowd(count, 20, lambda _: leaving(url, choose)))
            wait_until_idle(server, readiness)
            server.runner.calls.clear()
            gc.collect()
            return open_files(), tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            _, before = round_of(200)  # warm-up
            files, after = round_of(1000)
        finally:
            tracemalloc.stop()
        assert after - before < 400_000  # only growing tables; a leak per client would be thousands of bytes
        assert [record for record in caplog.records if record.name == "asyncio"] == []  # all generators are closed
        assert files <= before_all + 5  # uvicorn's loop has a few
        asyncio.run(crowd(4, 4, lambda _: staying(url, choose)))


def test_third_of_two_hundred_clients_disconnects() -> None:
    choose, readiness = random.Random(10), Readiness()
    leaves = [choose.random() < 1 / 3 for _ in range(200)]
    with listening(script=b"x" * TOKENS, max_waiting=1000, readiness=readiness) as (url, server):
        asyncio.run(crowd(200, 200, lambda i: leaving(url, choose) if leaves[i] else staying(url, choose)))
        wait_until_idle(server, readiness)
        asyncio.run(server.assert_idle())


async def test_requests_beyond_the_rows_are_served_in_order() -> None:
    """Lower priorities come first; within a priority, first come, first served."""
    async with serving(b"x" * 8, max_waiting=64) as server:
        handles = record_handles(server)
        gate = server.runner.before_call = Gate("prefill")
        choose = random.Random(11)
        priorities = [choose.randrange(3) for _ in range(64)]
        asked = []
        async with asyncio.timeout(SECONDS):
            for number, priority in enumerate(priorities):
                asked.append(
                    asyncio.create_task(server.complete(prompt=[number + 1, 5], max_tokens=8, priority=priority))
                )
                while len(handles) <= number:
                    await asyncio.sleep(0)
                await gate.reached()  # the first request runs before the others arrive
            gate.open()
            answers = await asyncio.gather(*asked)
        assert [answer["usage"]["completion_tokens"] for answer in answers] == [8] * 64
        ran = sorted(handles[1:], key=lambda handle: handle.times.scheduled)
        assert ran == sorted(handles[1:], key=_place)
        await server.assert_idle()


def _place(handle: RequestHandle) -> tuple[int, int]:
    return handle.request.priority, handle.request.prompt_token_ids[0]


async def test_requests_beyond_the_queue_are_refused() -> None:
    async with serving(b"x" * 8, max_waiting=10) as server:
        gate = server.runner.before_call = Gate("decode")
        first = asyncio.create_task(server.complete(max_tokens=8))
        await gate.reached()
        asked = [asyncio.create_task(server.post("/v1/completions", completion_body(max_tokens=8))) for _ in range(63)]
        done, _ = await asyncio.wait(asked, timeout=SECONDS, return_when=asyncio.FIRST_COMPLETED)
        assert done  # refused at once
        gate.open()
        responses = [await each for each in asked]
        await first
        assert {response.status_code for response in responses} == {200, 429}
        assert all("retry-after" in response.headers for response in responses if response.status_code == 429)
        await server.assert_idle()
