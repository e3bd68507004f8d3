"""Answers that are generated and not yet read: rendered in batches, and limited in total and per API key."""

import asyncio
import json
import re
import socket
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest
from starlette.applications import Starlette

from model.token_logprobs import empty_logprobs
from serve.api import prompt_logprobs, unsent
from serve.api.chat import ChatCompletions
from serve.api.errors import APIError
from serve.api.generation import Choice, Unread, merge
from serve.api.request_body import Budget, Holding
from serve.api.unsent import Unsent, unsent_bytes
from serve.config.config import ServeConfig
from serve.engine.request import TokenEvent
from serve.jobs.output import Output
from tests.api.test_limits import FakeChoice
from tests.support.http_client import (
    CHAT,
    COMPLETIONS,
    PATHS,
    Connection,
    Gate,
    Server,
    alter_events,
    body_of,
    completion_body,
    error_of,
    events_of,
    serving,
)
from tests.support.listening import listening

MIB = 1 << 20
SCRIPT = b"x" * 300
# Arrays of 0.5 MiB and 2 MiB of JSON, of which 0.2 MiB are in memory at a time.
LARGE: dict[str, Any] = {"n": 16, "max_tokens": 300}
OPTIONS: dict[str, Any] = {"max_unsent_bytes": MIB}


def large_body(path: str, **fields: Any) -> dict[str, Any]:
    logprobs = {"logprobs": True, "top_logprobs": 3} if path == CHAT else {"logprobs": 3}
    return body_of(path, **LARGE | logprobs | fields)


async def used_bytes(server: Server) -> int:
    return gauge_in((await server.client.get("/metrics")).text)


def gauge_in(text: str) -> int:
    return int(float(re.findall(r"^logprobd:unsent_bytes\{.*\} (\S+)$", text, re.MULTILINE)[0]))


async def assert_returned(server: Server) -> None:
    assert await used_bytes(server) == 0
    await server.assert_idle()


class Reader(Connection):
    """A client that reads nothing but the head until `reading` is set."""

    def __init__(self, path: str, body: Any, key: str = "") -> None:
        super().__init__(path, body)
        self.headers = [(b"authorization", f"Bearer {key}".encode())]
        self.reading, self.blocked = asyncio.Event(), asyncio.Event()
        self.status, self.size, self.complete = 0, 0, False

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        if message["type"] == "http.response.body":
            self.blocked.set()
            await self.reading.wait()
            self.size += len(message["body"])
            self.complete = not message.get("more_body", False)


@asynccontextmanager
async def blocked(app: Starlette, *readers: Reader) -> Any:
    """Readers whose answers wait to be read; they read when the block ends."""
    async with asyncio.timeout(60):
        runs = [asyncio.create_task(reader.run(app)) for reader in readers]
        for reader in readers:
            await reader.blocked.wait()
        try:
            yield
        finally:
            for reader in readers:
                reader.reading.set()
            await asyncio.gather(*runs)


@pytest.mark.parametrize("fields", [{}, {"prompt_logprobs": 3}, {"prompt_logprobs": 3, "logprob_token_ids": [1, 2]}])
@PATHS
async def test_batches_give_the_same_bytes(path: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    body = large_body(path, max_tokens=20, n=7, request_id="same") | fields
    if "logprob_token_ids" in fields:
        body |= {"top_logprobs": 0} if path == CHAT else {"logprobs": 1}
    if path == COMPLETIONS:
        body |= {"prompt": ["a prompt", "another"], "echo": True}
    async with serving(SCRIPT) as server:
        await server.post(path, body)  # for equal numbers of cached tokens
        once = await server.post(path, body)
        monkeypatch.setattr(unsent, "_BATCH", 1 << 10)
        monkeypatch.setattr(prompt_logprobs, "_LARGE", 8)
        monkeypatch.setattr(prompt_logprobs, "_BLOCK_ENTRIES", 2)
        batches = await server.post(path, body, **{"accept-encoding": "gzip"})
        assert (once.status_code, batches.status_code) == (200, 200)
        assert "content-length" in once.headers
        assert "content-length" not in batches.headers
        created = re.compile(rb'"created":\d+')
        assert created.sub(b"", batches.content) == created.sub(b"", once.content)


async def test_long_choice_in_blocks_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(SCRIPT) as server:
        body = large_body(CHAT, n=1, request_id="same")
        blocks = await server.post(CHAT, body | {"cache_salt": "blocks"})
        monkeypatch.setattr("serve.api.chat._BLOCK", 1 << 20)
        whole = await server.post(CHAT, body | {"cache_salt": "whole"})
        created = re.compile(rb'"created":\d+')
        assert created.sub(b"", blocks.content) == created.sub(b"", whole.content)


@PATHS
async def test_memory_of_rendering_does_not_grow_with_the_number_of_choices(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Unsent.batches

    def traced(self: Unsent, outputs: Sequence[Output]) -> Iterator[list[tuple[Choice, Output]]]:
        tracemalloc.start()  # generation has ended
        return batches(self, outputs)

    monkeypatch.setattr(Unsent, "batches", traced)
    async with serving(SCRIPT) as server:
        reader = Reader(path, large_body(path, n=64))
        reader.reading.set()
        try:
            await reader.run(server.app)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert reader.complete
        assert reader.size > MIB
        assert peak < 3 * MIB  # rendered at once: 10 to 14 MiB


async def test_repeated_prompt_counts_as_json_of_each_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    batches = Unsent.batches

    def counted(self: Unsent, outputs: Sequence[Output]) -> Iterator[list[tuple[Choice, Output]]]:
        for batch in batches(self, outputs):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(Unsent, "batches", counted)
    monkeypatch.setattr("serve.api.unsent._BATCH", 1024)
    body = completion_body(prompt=[7] * 200, n=8, max_tokens=1)
    async with serving() as server:
        for fields, expected in (({}, [8]), ({"return_token_ids": True}, [1] * 8), ({"echo": True}, [3, 3, 2])):
            sizes.clear()
            answer = await server.post(COMPLETIONS, body | fields)
            assert len(answer.json()["choices"]) == 8
            assert sizes == expected


@PATHS
async def test_eight_slow_readers_hold_no_more_than_the_budget(path: str) -> None:
    readers = [Reader(path, large_body(path, n=3)) for _ in range(8)]
    async with serving(SCRIPT, max_unsent_bytes=2 * MIB) as server:
        async with blocked(server.app, *readers):
            assert sum(reader.status == 200 for reader in readers) >= 4
            assert 0 < await used_bytes(server) <= 2 * MIB
        assert {reader.status for reader in readers} <= {200, 429}
        assert all(reader.complete for reader in readers)  # none is truncated
        await assert_returned(server)


@pytest.mark.slow
def test_eight_slow_readers_of_a_real_server() -> None:
    data = json.dumps(large_body(CHAT)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"

    def unsent_of(client: httpx2.Client) -> int:
        return gauge_in(client.get("/metrics").text)

    with ExitStack() as stack:
        url, server = stack.enter_context(listening(script=SCRIPT, max_unsent_bytes=2 * MIB, send_buffer=4096))
        client = stack.enter_context(httpx2.Client(base_url=url))
        host, port = url.removeprefix("http://").split(":")
        connections = [stack.enter_context(socket.socket()) for _ in range(8)]
        for connection in connections:
            connection.settimeout(60)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.sendall(f"{head}Connection: close\r\n\r\n".encode() + data)
        answers = [connection.recv(12) for connection in connections]  # the rest waits in the server
        assert set(answers) == {b"HTTP/1.1 200", b"HTTP/1.1 429"}
        assert 0 < unsent_of(client) <= 2 * MIB
        assert client.post(CHAT, json=body_of(CHAT, max_tokens=20)).status_code == 200
        for answer, connection in zip(answers, connections, strict=True):
            rest = stack.enter_context(connection.makefile("rb")).read()
            assert rest.endswith(b"\r\n0\r\n\r\n" if answer.endswith(b"200") else b"}}")
            assert len(rest) > MIB or answer.endswith(b"429")
        end = time.monotonic() + 30
        while unsent_of(client):
            assert time.monotonic() < end
        assert server.engine.num_requests == 0


@PATHS
async def test_full_budget_refuses_large_answers_only(path: str) -> None:
    async with serving(SCRIPT, **OPTIONS) as server:
        async with blocked(server.app, Reader(path, large_body(path))):
            response = await server.post(path, large_body(path, ignore_eos=True))
            error = error_of(response, 429)
            assert (error["code"], error["type"]) == ("unsent_answers", "rate_limit_exceeded")
            assert response.headers["retry-after"] == "1"
            assert (await server.post(path, body_of(path, max_tokens=20))).status_code == 200
            stream = events_of(await server.post(path, large_body(path, n=1, stream=True)))
            assert stream[-1] == "[DONE]"
            assert "error" not in stream[-2]
        assert (await server.post(path, large_body(path, ignore_eos=True))).status_code == 200
        await assert_returned(server)


async def test_key_with_unread_answers_does_not_refuse_others() -> None:
    async with serving(SCRIPT, max_unsent_bytes=2 * MIB, api_key=("sk-1", "sk-2")) as server:
        body = large_body(CHAT, ignore_eos=True)
        async with blocked(server.app, Reader(CHAT, body, "sk-1")):
            response = await server.post(CHAT, body, Authorization="Bearer sk-1")
            assert error_of(response, 429)["code"] == "unsent_answers"
            assert (await server.post(CHAT, body, Authorization="Bearer sk-2")).status_code == 200
        assert (await server.post(CHAT, body, Authorization="Bearer sk-1")).status_code == 200


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 300}])
@PATHS
async def test_answer_certain_to_exceed_budget_is_400(path: str, fields: dict[str, Any]) -> None:
    async with serving(SCRIPT, **OPTIONS) as server:
        error = error_of(await server.post(path, large_body(path, n=40, **fields)), 400)
        assert (error["code"], error["param"]) == ("answer_too_large", "n")
        assert "--max-unsent-bytes" in error["message"]
        assert [name for name, _ in server.runner.calls].count("decode") < 20
        await assert_returned(server)


@PATHS
async def test_answer_that_exceeds_budget_while_generated_is_400(path: str) -> None:
    async with serving(SCRIPT, **OPTIONS) as server:
        error = error_of(await server.post(path, large_body(path, n=40)), 400)
        assert (error["code"], error["param"]) == ("answer_too_large", "n")
        await assert_returned(server)


@PATHS
@pytest.mark.parametrize("stream", [False, True])
async def test_budget_returned_after_disconnect_in_generation(path: str, stream: bool) -> None:
    async with serving(SCRIPT, **OPTIONS) as server:
        gate = server.runner.before_call = Gate("decode", after=400)
        connection = Connection(path, large_body(path, ignore_eos=True, prompt_logprobs=3, stream=stream))
        run = asyncio.create_task(connection.run(server.app))
        await gate.reached()
        connection.leave()
        await run
        gate.open()
        await assert_returned(server)


@PATHS
async def test_budget_returned_after_disconnect_in_answer(path: str) -> None:
    async with serving(SCRIPT, **OPTIONS) as server:
        reader = Reader(path, large_body(path))
        async with blocked(server.app, reader):
            assert await used_bytes(server) > 0
            reader.leave()
        assert not reader.complete
        await assert_returned(server)


@PATHS
@pytest.mark.parametrize("stream", [False, True])
async def test_budget_returned_after_engine_failure(path: str, stream: bool) -> None:
    async with serving(SCRIPT, **OPTIONS) as server:
        server.runner.fail_once("decode", after=400)
        response = await server.post(path, large_body(path, ignore_eos=True, stream=stream))
        assert response.status_code == (200 if stream else 500)
        assert "engine_error" in response.text
        await assert_returned(server)


async def test_failure_between_batches_closes_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    choices_of, calls = ChatCompletions._choices_of, 0

    def fail(self: Any, job: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError
        return choices_of(self, job, batch)

    monkeypatch.setattr(ChatCompletions, "_choices_of", fail)
    async with serving(SCRIPT, **OPTIONS) as server:
        reader = Reader(CHAT, large_body(CHAT))
        reader.reading.set()
        with pytest.raises(MemoryError):
            await reader.run(server.app)
        assert reader.status == 200
        assert not reader.complete
        await assert_returned(server)


async def test_nan_in_last_batch_is_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsent, "_BATCH", 1)

    ended = 0

    def spoil(event: TokenEvent) -> TokenEvent:
        nonlocal ended
        ended += event.finish_reason is not None
        if event.finish_reason is None or ended < LARGE["n"]:
            return event
        nan = np.full_like(event.logprobs.logprob, np.nan)
        return replace(event, logprobs=replace(event.logprobs, logprob=nan))

    async with serving(SCRIPT) as server:
        alter_events(server, spoil)
        error = error_of(await server.post(CHAT, large_body(CHAT, max_tokens=3)), 500)
        assert error["code"] == "engine_error"


async def test_stream_ends_when_its_unread_deltas_exceed_the_budget() -> None:
    choices: list[Any] = [FakeChoice(0, 1000)]
    unused: Any = None
    budget = Budget(10_000)
    deltas = merge(choices, unused, Unread(1 << 20, Holding(budget)))
    read = [await anext(deltas)]

    async def rest() -> None:
        async for delta in deltas:
            read.append(delta)  # noqa: PERF401  # the deltas before the failure count

    with pytest.raises(APIError, match="slowly"):
        await rest()
    assert len(read) == ((64 << 10) + 10_000) // (1024 + 8)
    assert budget.used == 0


async def test_budget_returned_when_deltas_are_not_read() -> None:
    choice = FakeChoice(0, 100)
    choices: list[Any] = [choice]
    unused: Any = None
    budget = Budget(1 << 20)
    deltas = merge(choices, unused, Unread(1 << 20, Holding(budget)))
    await anext(deltas)
    await choice.closed.wait()
    assert budget.used == 99 * (1024 + 8) - (64 << 10)
    await deltas.aclose()
    assert budget.used == 0


def test_output_does_not_keep_the_arrays_of_steps() -> None:
    output, steps = Output(), [empty_logprobs(16, 3) for _ in range(200)]
    for i, step in enumerate(steps):
        step.logprob[:] = i
        output.add(Output(token_ids=[i], logprobs=[step[i % 16 : i % 16 + 1]]))
    assert output.all_logprobs(3).logprob.tolist() == list(range(200))
    views = [part for part in output.logprobs if any(np.shares_memory(part.logprob, step.logprob) for step in steps)]
    assert len(views) <= 64
    assert output.nbytes == 200 * (64 + 12 * 4)


async def test_small_option_is_refused() -> None:
    async with serving() as server:
        limits = server.engine.limits
        with pytest.raises(ValueError, match="argument --max-unsent-bytes: 1000 is less than"):
            unsent_bytes(ServeConfig(max_unsent_bytes=1000), limits)
        assert unsent_bytes(ServeConfig(), limits) == 1 << 30
        assert unsent_bytes(ServeConfig(), replace(limits, max_model_len=1 << 22, cache_tokens=1 << 22)) > 1 << 30
