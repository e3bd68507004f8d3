"""Engine: streams, limits, aborts, stops and failures of the thread, as an event loop sees them.

ENDLESS requests would run for minutes: whatever a test does while one runs happens before its end.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from compiled.state import MAX_REQUESTED_IDS
from model.kv_cache import PAGE_SIZE
from serve.engine.client import RequestHandle
from serve.engine.engine import Engine
from serve.engine.request import (
    EngineLimits,
    EngineOptions,
    EngineStoppedError,
    FinishReason,
    NotPinnedError,
    PromptScoring,
    QueueFullError,
    Request,
    SamplingParams,
    TokenEvent,
)
from tests.support.fake_runner import (
    VOCAB_SIZE,
    FakeRunner,
    InjectedError,
    K,
    alone,
    greedy,
    hidden_after,
    outcome_of,
    prompt_of,
)
from tests.support.http_client import Gate

LONG = 100_000  # tokens
ENDLESS = greedy(LONG - 1000)
TIMEOUT = 20  # seconds after which something hangs; never reached otherwise


@asynccontextmanager
async def running(
    runner: FakeRunner,
    *,
    max_waiting: int = 8,
    max_model_len: int | None = None,
    pin_seconds: float = 1000,
    max_waiting_tokens: int | None = None,
    seed: int | None = None,
) -> AsyncIterator[Engine]:
    length = runner.buckets.pages_per_row * 64 if max_model_len is None else max_model_len
    limits = EngineLimits(
        max_model_len=length,
        max_logprobs=K,
        vocab_size=VOCAB_SIZE,
        cache_tokens=(runner.pages - 1) * PAGE_SIZE,
        max_scored_ids=MAX_REQUESTED_IDS,
        whole_vocabulary=True,
    )
    options = EngineOptions(
        max_num_batched_tokens=68,
        max_num_queued_reqs=max_waiting,
        max_num_queued_tokens=max_waiting_tokens,
        seed=seed,
        pin_seconds=pin_seconds,
    )
    engine = Engine(runner, limits, options)
    engine.start()
    try:
        yield engine
    finally:
        runner.before_call = lambda _: None
        await asyncio.to_thread(engine.stop)


def endless_runner(*, pages: int = 4000) -> FakeRunner:
    return FakeRunner(pages=pages, decode_rows=(1, 2), pages_per_row=LONG // 64 + 1)


async def events_of(handle: RequestHandle) -> list[TokenEvent]:
    """All events that are left of a request."""
    async with asyncio.timeout(TIMEOUT):
        return [event async for event in handle]


async def collect(engine: Engine, request: Request) -> list[TokenEvent]:
    """All events of a request that is admitted now."""
    return await events_of(engine.admit(request))


def run(engine: Engine, request: Request) -> asyncio.Task[list[TokenEvent]]:
    """Admits a request and collects its events in a task."""
    return asyncio.create_task(events_of(engine.admit(request)))


async def first(handle: RequestHandle) -> TokenEvent:
    async with asyncio.timeout(TIMEOUT):
        return await anext(handle)


async def check_empty(engine: Engine) -> None:
    """Runs a request, and fails unless nothing is left of it and of any other."""
    request = Request("probe", prompt_of(70), greedy(3, prompt_logprobs=True))
    assert outcome_of(await collect(engine, request)) == alone(request)
    await asyncio.to_thread(engine.stop)
    engine.assert_idle()


async def test_streams_are_those_of_the_core() -> None:
    async with running(FakeRunner(pages=12)) as engine:
        requests = [
            Request(
                f"{i}",
                prompt_of(20 * i + 1, i),
                SamplingParams(30, i % 2, seed=i, prompt=PromptScoring() if i > 2 else None),
            )
            for i in range(8)
        ]
        answers = await asyncio.gather(*(collect(engine, request) for request in requests))
        for request, events in zip(requests, answers, strict=True):
            assert outcome_of(events) == alone(request)
        await check_empty(engine)


async def test_requests_from_another_event_loop() -> None:
    async with running(FakeRunner()) as engine:
        here, there = Request("here", prompt_of(9, 1), greedy(20)), Request("there", prompt_of(9, 2), greedy(20))
        answers = await asyncio.gather(
            collect(engine, here), asyncio.to_thread(lambda: asyncio.run(collect(engine, there)))
        )
        assert [outcome_of(events) for events in answers] == [alone(here), alone(there)]


def seed_of(handle: RequestHandle) -> int:
    """The seed in use."""
    return handle._state.seed


async def test_seeds_are_taken_as_64_bits_or_drawn() -> None:
    async with running(FakeRunner()) as engine:
        for asked, used in ((0, 0), (7, 7), (-1, 2**64 - 1), (-(2**63), 2**63), (2**63 - 1, 2**63 - 1)):
            handle = engine.admit(Request("a", [1, 2, 3], SamplingParams(4, seed=asked)))
            assert outcome_of(await events_of(handle)) == alone(handle.request)
            assert seed_of(handle) == used
        drawn = []
        for _ in range(2):
            handle = engine.admit(Request("a", [1], SamplingParams(1)))
            await events_of(handle)
            drawn.append(seed_of(handle))
        assert drawn[0] != drawn[1]


async def test_one_seed_of_the_engine_gives_one_run_of_seeds() -> None:
    runs = []
    for seed in (1, 1, 2):
        async with running(FakeRunner(), seed=seed) as engine:
            handles = [engine.admit(Request(f"{i}", [1], SamplingParams(1))) for i in range(3)]
            for handle in handles:
                await events_of(handle)
            runs.append([seed_of(handle) for handle in handles])
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) == 3


async def test_too_many_prompt_tokens() -> None:
    async with running(endless_runner(), max_waiting_tokens=100) as engine:
        a = run(engine, Request("a", prompt_of(120), ENDLESS))  # alone, even one that is too long may come
        with pytest.raises(QueueFullError):
            await collect(engine, Request("b", [1], greedy(1)))
        engine.abort("a")
        await a
        b, c = run(engine, Request("b", prompt_of(60), ENDLESS)), Request("c", prompt_of(41), greedy(1))
        with pytest.raises(QueueFullError):
            await collect(engine, c)
        c = Request("c", prompt_of(40), greedy(1))
        assert outcome_of(await collect(engine, c)) == alone(c)
        engine.abort("b")
        await b
        await check_empty(engine)


async def test_too_many_requests() -> None:
    async with running(endless_runner(), max_waiting=2) as engine:
        endless = [run(engine, Request(f"{i}", [i], ENDLESS)) for i in range(2)]
        with pytest.raises(QueueFullError):
            await collect(engine, Request("c", [3], greedy(1)))
        engine.abort("0")
        await endless[0]
        request = Request("c", prompt_of(9), greedy(1))
        assert outcome_of(await collect(engine, request)) == alone(request)
        engine.abort("1")
        await endless[1]
        await check_empty(engine)


async def test_abort_ends_a_stream_and_no_other() -> None:
    async with running(endless_runner()) as engine:
        with engine.admit(Request("a", [1], ENDLESS)) as a:
            b = run(engine, Request("b", [2], greedy(300)))
            before = [await first(a) for _ in range(3)]
            engine.abort("a")
            engine.abort("a")
            engine.abort("nobody")
            events = before + await events_of(a)
            assert events[-1].finish_reason is FinishReason.ABORT
            assert events[-1].token_ids == []
            assert all(event.finish_reason is None for event in events[:-1])
            assert outcome_of(await b).reason is FinishReason.LENGTH
        await check_empty(engine)


async def test_a_waiting_request_can_be_aborted() -> None:
    async with running(endless_runner()) as engine:
        running_ones = [run(engine, Request(f"{i}", [i], ENDLESS)) for i in range(2)]
        waiting = run(engine, Request("waiting", [3], greedy(1)))
        engine.abort("waiting")
        (event,) = await waiting
        assert (event.finish_reason, event.token_ids) == (FinishReason.ABORT, [])
        for i, task in enumerate(running_ones):
            assert not task.done()
            engine.abort(f"{i}")
            await task
        await check_empty(engine)


async def test_closing_a_stream_early_aborts() -> None:
    async with running(endless_runner(), max_waiting=1000) as engine:
        with engine.admit(Request("a", [1], ENDLESS)) as handle:
            await first(handle)
        await check_empty(engine)


async def test_cancelling_the_reader_aborts() -> None:
    async with running(endless_runner()) as engine:
        started = asyncio.Event()

        async def read() -> None:
            with engine.admit(Request("a", [1], ENDLESS)) as events:
                async for _ in events:
                    started.set()

        reader = asyncio.create_task(read())
        async with asyncio.timeout(TIMEOUT):
            await started.wait()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await check_empty(engine)


async def test_stop_ends_open_streams_and_takes_no_more() -> None:
    async with running(endless_runner()) as engine:
        assert engine.ready
        with engine.admit(Request("a", [1], ENDLESS)) as a:
            await first(a)
            others = [run(engine, Request(f"{i}", [i], ENDLESS)) for i in range(3)]
            await asyncio.to_thread(engine.stop)
            with pytest.raises(EngineStoppedError):
                await events_of(a)
            ends = await asyncio.gather(*others, return_exceptions=True)
            assert [type(end) for end in ends] == [EngineStoppedError] * 3
        assert not any((engine.ready, engine.failed))
        with pytest.raises(EngineStoppedError):
            await collect(engine, Request("late", [1], greedy(1)))
        engine.stop()


@pytest.mark.parametrize(("prompt", "max_tokens"), [(0, 1), (257, 0), (300, 10), (150, 50), (192, 1)])
async def test_what_could_never_fit_is_refused(prompt: int, max_tokens: int) -> None:
    async with running(FakeRunner(pages=4), max_waiting=1, max_model_len=256) as engine:
        with pytest.raises(ValueError, match=r"1 to 256 tokens, not \d+|needs \d+ tokens of cache; there are 192"):
            await collect(engine, Request("a", [1] * prompt, greedy(max_tokens, prompt_logprobs=True)))
        for fitting in (192, 100):
            request = Request("a", prompt_of(fitting), greedy(192 - fitting, prompt_logprobs=True))
            assert outcome_of(await collect(engine, request)) == alone(request)
        await check_empty(engine)


async def test_a_failed_step_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    runner = FakeRunner()
    runner.fail_once("decode", after=2)
    async with running(runner) as engine:
        events = await collect(engine, Request("a", [1], greedy(50)))
        assert (events[-1].finish_reason, events[-1].error) == (FinishReason.ERROR, "the engine failed on this request")
        assert len(events) == 2  # the token of the step that was not read yet is lost with the request
        assert engine.ready
        assert runner.resets == 1
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        await check_empty(engine)


async def test_a_failure_without_recovery_stops_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    runner = endless_runner()

    def before_call(name: str) -> None:
        if name == "reset" or (name == "decode" and len(runner.calls) >= 200):
            raise InjectedError(name)

    runner.before_call = before_call
    async with running(runner) as engine:
        answers = await asyncio.gather(*(collect(engine, Request(f"{i}", [i], ENDLESS)) for i in range(4)))
        for events in answers:
            assert (events[-1].finish_reason, events[-1].error) == (FinishReason.ERROR, "the engine has stopped")
        assert engine.failed
        assert not engine.ready
        assert len(caplog.records) == 2
        with pytest.raises(EngineStoppedError):
            await collect(engine, Request("late", [1], greedy(1)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_nobody_is_left_waiting_when_the_thread_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise SystemExit

    async with running(endless_runner()) as engine:
        await collect(engine, Request("held", prompt_of(20), whole(0)))
        with engine.admit(Request("a", [1], ENDLESS)) as a:
            await first(a)
            monkeypatch.setattr(engine._core, "step", broken)
            events = await events_of(a)
        assert events[-1].finish_reason is FinishReason.ERROR
        with pytest.raises(EngineStoppedError):
            await collect(engine, Request("late", [1], greedy(1)))
        with pytest.raises(EngineStoppedError):
            await engine.full_logprobs("held", 0, 1)


async def test_a_call_that_fails_ends_what_runs_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Any) -> None:
        raise InjectedError

    async with running(endless_runner()) as engine:
        with engine.admit(Request("a", [1], ENDLESS)) as a:
            await first(a)
            with monkeypatch.context() as patch:
                patch.setattr(engine._core, "abort", broken)
                engine.abort("a")
                events = await events_of(a)
        assert events[-1].finish_reason is FinishReason.ERROR
        assert len(caplog.records) == 1
        await check_empty(engine)


async def test_a_request_that_cannot_be_queued_is_the_only_one_to_fail(caplog: pytest.LogCaptureFixture) -> None:
    async with running(endless_runner()) as engine:
        with engine.admit(Request("a", [1], ENDLESS)) as a:
            await first(a)
            odd = SamplingParams(5, min_tokens=2, stop_token_ids=frozenset({VOCAB_SIZE + 64}))
            events = await collect(engine, Request("b", [1], odd))
            assert [(event.finish_reason, event.error) for event in events] == [
                (FinishReason.ERROR, "it could not be queued")
            ]
            await first(a)
        assert len(caplog.records) == 1
        await check_empty(engine)


def whole(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens, temperature=0.0, prompt=PromptScoring(whole=True))


async def test_rows_of_the_whole_vocabulary_until_they_are_given_up() -> None:
    async with running(FakeRunner(), max_waiting=1) as engine:
        prompt = prompt_of(20)
        assert len(await collect(engine, Request("a", prompt, whole(2)))) == 2
        rows = await engine.full_logprobs("a", 3, 2)
        expected = [[-((token + hidden_after(prompt[:n])) % 7) / 8 for token in range(VOCAB_SIZE)] for n in (4, 5)]
        np.testing.assert_array_equal(rows, np.asarray(expected, np.float32))
        with pytest.raises(QueueFullError):  # what is held counts
            await collect(engine, Request("b", [1], greedy(1)))
        engine.abort("a")
        with pytest.raises(NotPinnedError):
            await engine.full_logprobs("a", 3, 2)
        await check_empty(engine)


async def test_rows_are_asked_for_in_vain_where_the_device_fails_or_the_engine_stops(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = FakeRunner()
    async with running(runner) as engine:
        await collect(engine, Request("a", prompt_of(20), whole(0)))
        runner.fail_once("vocabulary")
        with pytest.raises(EngineStoppedError):
            await engine.full_logprobs("a", 0, 1)
        assert len(caplog.records) == 1
        assert (await engine.full_logprobs("a", 0, 1)).shape == (1, VOCAB_SIZE)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(EngineStoppedError):
            await engine.full_logprobs("a", 0, 1)


async def test_a_request_waits_while_a_held_one_has_the_pages() -> None:
    async with running(FakeRunner(pages=4)) as engine:
        await collect(engine, Request("a", prompt_of(150), whole(0)))
        b = Request("b", prompt_of(100, 1), greedy(5))
        waiting = run(engine, b)
        await engine.full_logprobs("a", 0, 1)  # the engine has seen b by now
        assert not waiting.done()
        engine.abort("a")
        assert outcome_of(await waiting) == alone(b)
        await check_empty(engine)


async def test_a_hold_that_nobody_uses_gives_way() -> None:
    async with running(FakeRunner(pages=4), pin_seconds=0) as engine:
        await collect(engine, Request("a", prompt_of(150), whole(0)))
        b = Request("b", prompt_of(100, 1), greedy(5))
        assert outcome_of(await collect(engine, b)) == alone(b)
        with pytest.raises(NotPinnedError):
            await engine.full_logprobs("a", 0, 1)
        await check_empty(engine)


async def test_rows_for_many_readers_leave_room_for_steps() -> None:
    runner = FakeRunner()
    async with running(runner, max_waiting=9) as engine:
        names = [f"{i}" for i in range(5)]
        for name in names:
            await collect(engine, Request(name, prompt_of(20), whole(0)))
        with engine.admit(Request("a", [1], greedy(400))) as a:
            await first(a)
            runner.calls.clear()
            await asyncio.gather(*(engine.full_logprobs(name, 0, 1) for name in names))
            order = [name for name, _ in list(runner.calls) if name in ("vocabulary", "decode")]
        assert order.count("vocabulary") == len(names)
        assert all(pair != ("vocabulary", "vocabulary") for pair in pairwise(order))
        for name in names:
            engine.abort(name)
        await check_empty(engine)


async def test_an_engine_with_nothing_to_do_is_not_silent() -> None:
    async with running(FakeRunner()) as engine:
        await collect(engine, Request("a", prompt_of(5), greedy(3)))
        async with asyncio.timeout(TIMEOUT):
            while engine.silent_for:  # it has a last look whether there is more
                await asyncio.sleep(0)
        await collect(engine, Request("b", prompt_of(5), greedy(3)))


async def test_an_engine_that_is_given_up_leaves_nobody_waiting() -> None:
    runner = endless_runner()
    async with running(runner) as engine:
        held = Request("held", prompt_of(10), SamplingParams(1, prompt=PromptScoring(whole=True)))
        await collect(engine, held)
        gate = runner.before_call = Gate("decode")
        running_one = run(engine, Request("a", prompt_of(5), greedy(LONG)))
        await gate.reached()
        rows = asyncio.create_task(engine.full_logprobs("held", 0, 1))
        await asyncio.sleep(0)
        assert engine.silent_for > 0
        engine.give_up()
        assert (await running_one)[-1].finish_reason is FinishReason.ERROR
        with pytest.raises(EngineStoppedError):
            await rows
        for question in (collect(engine, Request("b", prompt_of(5), greedy(1))), engine.full_logprobs("held", 0, 1)):
            with pytest.raises(EngineStoppedError):
                await question
        assert (engine.ready, engine.hangs) == (False, True)
        engine.stop()  # does not wait for the thread
        gate.open()
