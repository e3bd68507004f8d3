"""Limits of one request: time in the queue and in total, memory of its body, tokens waiting for a slow reader."""

import asyncio
import json
import math
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import pytest

from serve.api.errors import APIError
from serve.api.generation import Unread, merge
from serve.api.middleware import Readiness
from serve.api.request_body import Budget, Holding
from serve.engine.request import FinishReason, QueueFullError, Request, SamplingParams
from serve.text.detokenizer import StopStrings
from tests.support.http_client import (
    CHAT,
    COMPLETIONS,
    PATHS,
    Connection,
    Gate,
    Server,
    body_of,
    chat_body,
    completion_body,
    error_of,
    events_of,
    serving,
)


@PATHS
@pytest.mark.parametrize("stream", [False, True])
async def test_queue_timeout_is_503(path: str, stream: bool) -> None:
    async with serving(None, max_model_len=5000, pages=400, queue_timeout=0.05) as server:
        others = [asyncio.create_task(ended(server, str(i))) for i in range(4)]  # as many as can run at the same time
        async with asyncio.timeout(20):
            while server.engine.gauges.running < 4:
                await asyncio.sleep(0)
        gate = server.runner.before_call = Gate("decode")
        await gate.reached()
        response = await server.post(path, body_of(path, stream=stream))
        error = error_of(response, 503)
        assert (error["type"], error["code"]) == ("service_unavailable", "queue_timeout")
        assert response.headers["retry-after"] == "1"
        for i in range(4):
            server.engine.abort(str(i))
        gate.open()
        # They ran until now, as they have no limit.
        assert await asyncio.gather(*others) == [FinishReason.ABORT] * 4
        await server.assert_idle()


async def ended(server: Server, name: str) -> FinishReason | None:
    """Run a long request without limits; returns its finish reason."""
    params = SamplingParams(4000, temperature=0)
    return [event.finish_reason async for event in server.engine.admit(Request(name, [1, 2], params))][-1]


async def test_queue_timeout_ignores_own_choices() -> None:
    async with serving(queue_timeout=0.05) as server:
        gate = server.runner.before_call = Gate("decode", after=1)
        task = asyncio.create_task(server.complete(prompt=["a", "b", "c", "d", "e", "f"], max_tokens=4))
        await gate.reached()
        await asyncio.wait([task], timeout=0.1)  # the last two choices wait for longer than the queue timeout
        gate.open()
        assert [choice["text"] for choice in (await task)["choices"]] == ["Hell"] * 6


@PATHS
@pytest.mark.parametrize("limit_of", ["server", "request", "both"])
async def test_request_timeout_is_504(path: str, limit_of: str) -> None:
    config = {"server": 0.05, "request": math.inf, "both": 1000.0}[limit_of]
    fields = {} if limit_of == "server" else {"timeout": 0.05}
    async with serving(request_timeout=config) as server:
        gate = server.runner.before_call = Gate("decode")
        error = error_of(await server.post(path, body_of(path, **fields)), 504)
        assert (error["type"], error["code"], error["param"]) == ("timeout", "deadline_exceeded", "timeout")
        gate.open()
        await server.assert_idle()
        assert [name for name, _ in server.runner.calls].count("decode") == 1


async def test_request_timeout_in_stream_is_event(fresh_server: Server) -> None:
    gate = fresh_server.runner.before_call = Gate("decode", after=3)
    *chunks, error, done = events_of(await fresh_server.post(COMPLETIONS, completion_body(stream=True, timeout=2)))
    assert [json.loads(chunk)["choices"][0]["text"] for chunk in chunks] == ["H", "e"]
    assert (json.loads(error)["error"]["code"], done) == ("deadline_exceeded", "[DONE]")
    gate.open()
    await fresh_server.assert_idle()


async def test_request_timeout_not_reached(server: Server) -> None:
    assert (await server.complete(timeout=1000))["choices"][0]["text"] == "Hello"
    assert (await server.chat(timeout=1000))["choices"][0]["message"]["content"] == "Hello"


@pytest.mark.parametrize("timeout", [0, -1, 1e9, "5", True])
async def test_timeout_invalid_value(server: Server, timeout: Any) -> None:
    assert error_of(await server.post(COMPLETIONS, completion_body(timeout=timeout)), 400)["param"] == "timeout"


@PATHS
async def test_slow_reader_is_cut_off(path: str) -> None:
    """A slow reader first gets the waiting tokens, then the error."""
    async with serving(b"x" * 400, max_unread_tokens=8) as server:
        reading = asyncio.Event()
        connection = SlowReader(path, body_of(path, stream=True, max_tokens=400), reading)
        run = asyncio.create_task(connection.run(server.app))
        async with asyncio.timeout(20):
            await connection.blocked.wait()
            while server.engine.num_requests:
                await asyncio.sleep(0)
        assert not run.done()
        assert [name for name, _ in server.runner.calls].count("decode") < 100
        reading.set()
        await run
        *chunks, error, done = connection.events()
        assert 8 <= len(chunks) < 20
        assert (json.loads(error)["error"]["code"], done) == ("slow_reader", "[DONE]")
        await server.assert_idle()


async def test_slow_reader_ends_all_choices() -> None:
    async with serving(b"x" * 400, max_unread_tokens=8) as server:
        reading = asyncio.Event()
        connection = SlowReader(COMPLETIONS, completion_body(stream=True, max_tokens=400, n=3), reading)
        run = asyncio.create_task(connection.run(server.app))
        async with asyncio.timeout(20):
            await connection.blocked.wait()
            while server.engine.num_requests:
                await asyncio.sleep(0)
        reading.set()
        await run
        *chunks, error, _ = connection.events()
        assert len(chunks) >= 8  # the unread deltas come before the error
        assert json.loads(error)["error"]["code"] == "slow_reader"
        await server.assert_idle()


async def test_unread_tokens_unlimited_without_stream() -> None:
    async with serving(b"x" * 400, max_unread_tokens=8) as server:
        assert (await server.complete(max_tokens=400, n=2))["usage"]["completion_tokens"] == 800


class SlowReader(Connection):
    """A client that stops reading after the first chunk until `read` is called."""

    def __init__(self, path: str, body: Any, reading: asyncio.Event) -> None:
        super().__init__(path, body)
        self._reading = reading
        self.blocked = asyncio.Event()
        self.data_sent: list[bytes] = []

    def events(self) -> list[str]:
        """The data of all events."""
        return [event.removeprefix("data: ") for event in b"".join(self.data_sent).decode().split("\n\n")[:-1]]

    async def _send(self, message: Any) -> None:
        self.data_sent.append(message.get("body", b""))
        if message.get("body"):
            self.blocked.set()
            await self._reading.wait()


async def test_bodies_total_size_is_limited() -> None:
    """Four bodies of the maximum size; further ones are refused until there is room. A small one is always accepted."""
    large = json.dumps(completion_body()).encode() + b" " * 400_000
    async with serving(max_body_bytes=1 << 20) as server:
        waiting = [Sending(COMPLETIONS, b" " * (1 << 20)) for _ in range(4)]
        runs = [asyncio.create_task(client.talk(server.app)) for client in waiting]
        async with asyncio.timeout(20):
            for client in waiting:
                await client.body_read.wait()
        response = await server.post(COMPLETIONS, large)
        assert error_of(response, 503)["code"] == "too_many_bodies"
        assert response.headers["retry-after"] == "1"
        assert (await server.complete())["choices"][0]["text"] == "Hello"
        for client in waiting:
            client.leave()
        await asyncio.gather(*runs)
        assert (await server.post(COMPLETIONS, large)).status_code == 200


class Sending(Connection):
    """A client that has sent part of its body."""

    def __init__(self, path: str, part: bytes) -> None:
        super().__init__(path, None)
        self.body_read = asyncio.Event()
        self._incoming = Noticed(self.body_read)
        self._incoming.put_nowait({"type": "http.request", "body": part, "more_body": True})


class Noticed(asyncio.Queue[dict[str, Any]]):
    """Signals when more is requested than available."""

    def __init__(self, exhausted: asyncio.Event) -> None:
        super().__init__()
        self._exhausted = exhausted

    async def get(self) -> dict[str, Any]:
        if self.empty():
            self._exhausted.set()
        return await super().get()


async def test_draining_refuses_new_and_finishes_running() -> None:
    readiness = Readiness()
    async with serving(readiness=readiness, api_key=("sk-1",)) as server:
        key = {"Authorization": "Bearer sk-1"}
        gate = server.runner.before_call = Gate("decode", after=1)
        running = asyncio.create_task(server.post(COMPLETIONS, completion_body(stream=True), **key))
        await gate.reached()
        readiness.draining = True
        for path in ("/health", "/ready", "/ping"):
            assert (await server.client.get(path)).status_code == 503
        assert (await server.client.get("/live")).status_code == 200
        response = await server.post(CHAT, chat_body(), **key)
        assert error_of(response, 503)["code"] == "engine_stopped"
        assert response.headers["retry-after"] == "2"
        error_of(await server.post(CHAT, chat_body()), 401)
        gate.open()
        assert events_of(await running)[-1] == "[DONE]"


async def test_merge_yields_deltas_before_failure() -> None:
    ended, failed = FakeChoice(0, 1), FakeChoice(1, 9)
    choices: list[Any] = [ended, failed]
    unused: Any = None
    deltas = merge(choices, unused, Unread(8, Holding(Budget(1 << 20))))
    read = [await anext(deltas)]
    async with asyncio.timeout(20):
        await failed.closed.wait()

    async def rest() -> None:
        async for delta in deltas:
            read.append(delta)  # noqa: PERF401  # the deltas before the failure count

    with pytest.raises(APIError, match="slowly"):
        await rest()
    assert len(read) == 8  # max_unread


async def test_merge_waiting_choices_run_concurrently_later() -> None:
    """A queue that was full once does not serialize the choices for good."""
    room = Room(2)
    choices: list[Any] = [QueuedChoice(index, room) for index in range(12)]
    unused: Any = None
    read = asyncio.create_task(collected(merge(choices, unused)))
    async with asyncio.timeout(20):
        await room.is_full()
        room.places = 5
        room.finish(1)  # the waiting choices then try again
        await room.is_full()
        assert (room.running, room.peak) == (5, 5)
        room.places = 0  # other clients fill the queue
        while len(room.ended) < 12:
            room.finish(len(room.ended) + 1)
            await asyncio.sleep(0)
        await read
    assert room.ended == list(range(12))


async def test_merge_waiting_choices_keep_order() -> None:
    """Even if there is room again before the next choice tries."""
    room = Room(1, grows=True)
    choices: list[Any] = [QueuedChoice(index, room) for index in range(6)]
    unused: Any = None
    read = asyncio.create_task(collected(merge(choices, unused)))
    async with asyncio.timeout(20):
        while not room.entered:
            await asyncio.sleep(0)
        room.finish(6)
        await read
    assert room.entered == list(range(6))


async def collected(deltas: AsyncGenerator[Any]) -> list[Any]:
    return [delta async for delta in deltas]


class Room:
    """A queue with a limited length."""

    def __init__(self, places: int, *, grows: bool = False) -> None:
        """`grows`: there is one more place after each refusal, as if another client had left."""
        self.places, self.running, self.peak = places, 0, 0
        self.entered: list[int] = []
        self.ended: list[int] = []
        self._grows = grows
        self._may_end = 0

    async def is_full(self) -> None:
        """Fails unless all places are taken soon."""
        for _ in range(100):  # turns of the loop: enough for every task to proceed
            await asyncio.sleep(0)
        assert self.running == self.places

    def finish(self, count: int) -> None:
        """Let the choices with lower indices end."""
        self._may_end = count

    def enter(self, index: int, *, bypass_limits: bool) -> None:
        """Take a place, or raise QueueFullError."""
        if self.running >= self.places and not bypass_limits:
            self.places += self._grows
            raise QueueFullError("max_num_queued_reqs")
        self.entered.append(index)
        self.running += 1
        self.peak = max(self.peak, self.running)

    async def stay(self, index: int) -> None:
        """Wait until `finish` allows this choice to end."""
        while self._may_end <= index:
            await asyncio.sleep(0)
        self.running -= 1
        self.ended.append(index)


class QueuedChoice:
    """A choice that stays in the queue until it may finish."""

    def __init__(self, index: int, room: Room) -> None:
        self.prompt, self.is_first_of_prompt = index, True
        self._index, self._room = index, room

    def admit(self, _: object, *, bypass_limits: bool) -> None:
        """See `Choice`."""
        self._room.enter(self._index, bypass_limits=bypass_limits)

    def abort(self) -> None:
        """See `Choice`."""

    async def deltas(self) -> AsyncGenerator[int]:
        """See `Choice`."""
        await self._room.stay(self._index)
        yield self._index


async def test_merge_failure_ends_other_choices() -> None:
    endless, failed = FakeChoice(0, None), FakeChoice(1, 3, RuntimeError("no"))
    choices: list[Any] = [endless, failed]
    unused: Any = None
    with pytest.raises(RuntimeError, match="no"):
        async for _ in merge(choices, unused):
            pass
    assert endless.closed.is_set()
    assert endless.aborted


class FakeDelta(int):
    nbytes = 8


class FakeChoice:
    """Yields `count` deltas at once, then fails or finishes; with None it waits forever."""

    def __init__(self, prompt: int, count: int | None, error: Exception | None = None) -> None:
        self.prompt, self.is_first_of_prompt = prompt, True
        self._count, self._error = count, error
        self.closed = asyncio.Event()
        self.aborted = False

    def admit(self, _: object, *, bypass_limits: bool) -> None:
        """See `Choice`."""

    def abort(self) -> None:
        """See `Choice`."""
        self.aborted = True

    async def deltas(self) -> AsyncGenerator["FakeDelta"]:
        """Numbers in place of outputs."""
        try:
            for number in range(self._count or 0):
                yield FakeDelta(number)
            if self._error is not None:
                raise self._error
            if self._count is None:
                await asyncio.Event().wait()
        finally:
            self.closed.set()


async def test_stop_strings_prepared_once_per_request(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Counted(StopStrings):
        def __init__(self, stop: Sequence[str]) -> None:
            sizes.append(len(stop))
            super().__init__(stop)

    monkeypatch.setattr("serve.api.handler.StopStrings", Counted)
    async with serving() as server:
        answer = await server.complete(prompt=["a", "b"], n=4, stop=["l", "xyz"])
    assert [choice["text"] for choice in answer["choices"]] == ["He"] * 8
    assert sizes == [2]


async def test_prompt_texts_freed_while_generating() -> None:
    """Neither the body, nor unknown fields, nor the sources of the prompt stay in memory."""
    async with serving(b"x" * 400) as server:
        await server.complete(user="x" * (1 << 20))  # creates what later requests share
        gate = server.runner.before_call = Gate("decode")
        bodies = [completion_body(user="x" * (1 << 20), max_tokens=400, request_id=f"r{i}") for i in range(8)]
        tracemalloc.start()
        try:
            tasks = [
                asyncio.create_task(server.client.post(COMPLETIONS, content=Once(body), headers=JSON))
                for body in bodies
            ]
            async with asyncio.timeout(20):
                while server.engine.num_requests < 8:
                    await asyncio.sleep(0)
            await gate.reached()
            size, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        gate.open()
        await asyncio.gather(*tasks)
    assert size < 4 << 20


JSON = {"content-type": "application/json"}


class Once:
    """A body that its client frees after sending."""

    def __init__(self, body: Any) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield json.dumps(self._body).encode()
