"""Engine: admission, events, limits and aborts, as an event loop sees them."""

import asyncio

import pytest

from serve.engine.client import RequestHandle
from serve.engine.engine import Engine
from serve.engine.request import (
    DeadlineError,
    EngineStoppedError,
    FinishReason,
    PromptScoring,
    QueueFullError,
    QueueTimeoutError,
    Request,
    SamplingParams,
)
from tests.support.engines import (
    ENDLESS,
    TIMEOUT,
    assert_idle,
    endless_runner,
    events_of,
    next_event,
    run,
    running_engine,
    start,
)
from tests.support.fake_runner import FakeRunner, alone, greedy, outcome_of, prompt_of


async def test_admit_many_requests() -> None:
    async with running_engine(FakeRunner(pages=12)) as engine:
        requests = [
            Request(
                f"{i}",
                prompt_of(20 * i + 1, i),
                SamplingParams(30, i % 2, seed=i, prompt=PromptScoring() if i > 2 else None),
            )
            for i in range(8)
        ]
        answers = await asyncio.gather(*(run(engine, request) for request in requests))
        for request, events in zip(requests, answers, strict=True):
            assert outcome_of(events) == alone(request)


async def test_admit_from_another_event_loop(engine: Engine) -> None:
    here, there = Request("here", prompt_of(9, 1), greedy(20)), Request("there", prompt_of(9, 2), greedy(20))
    answers = await asyncio.gather(run(engine, here), asyncio.to_thread(lambda: asyncio.run(run(engine, there))))
    assert [outcome_of(events) for events in answers] == [alone(here), alone(there)]


def test_admit_without_event_loop() -> None:
    async def make() -> Engine:
        async with running_engine(FakeRunner()) as engine:
            return engine

    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.run(make()).admit(Request("a", [1], greedy(1)))


def seed_of(handle: RequestHandle) -> int:
    """The seed in use."""
    return handle._state.seed


async def test_seed_is_64_bits_or_drawn(engine: Engine) -> None:
    for seed, expected in ((0, 0), (7, 7), (-1, 2**64 - 1), (-(2**63), 2**63), (2**63 - 1, 2**63 - 1)):
        handle = engine.admit(Request("a", [1, 2, 3], SamplingParams(4, seed=seed)))
        assert outcome_of(await events_of(handle)) == alone(handle.request)
        assert seed_of(handle) == expected
    drawn = []
    for _ in range(2):
        handle = engine.admit(Request("a", [1], SamplingParams(1)))
        await events_of(handle)
        drawn.append(seed_of(handle))
    assert drawn[0] != drawn[1]


async def test_seed_of_engine_determines_drawn_seeds() -> None:
    runs = []
    for seed in (1, 1, 2):
        async with running_engine(FakeRunner(), max_waiting=1, seed=seed) as engine:
            seeds = []
            for i in range(3):
                handle = engine.admit(Request(f"{i}", [1], SamplingParams(1)))
                with pytest.raises(QueueFullError):  # which draws no seed
                    engine.admit(Request("refused", [1], SamplingParams(1)))
                await events_of(handle)
                seeds.append(seed_of(handle))
            runs.append(seeds)
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) == 3


async def test_queue_full_of_prompt_tokens() -> None:
    async with running_engine(endless_runner(), max_num_queued_tokens=100) as engine:
        a = engine.admit(Request("a", prompt_of(120), ENDLESS))  # alone, a prompt above the limit is admitted
        with pytest.raises(QueueFullError, match="max_num_queued_tokens"):
            engine.admit(Request("b", [1], greedy(1)))
        a.abort()
        with engine.admit(Request("b", prompt_of(60), ENDLESS)):
            with pytest.raises(QueueFullError):
                engine.admit(Request("c", prompt_of(41), greedy(1)))
            c = Request("c", prompt_of(40), greedy(1))
            assert outcome_of(await run(engine, c)) == alone(c)


async def test_queue_full_of_requests() -> None:
    async with running_engine(endless_runner(), max_waiting=2) as engine:
        a, b = (engine.admit(Request(name, [1], ENDLESS)) for name in "ab")
        request = Request("c", prompt_of(9), greedy(1))
        with pytest.raises(QueueFullError, match="max_num_queued_reqs"):
            engine.admit(request)
        a.abort()  # frees its place at once
        assert outcome_of(await run(engine, request)) == alone(request)
        b.abort()


async def test_bypass_limits_of_queue() -> None:
    async with running_engine(FakeRunner(), max_waiting=1, max_num_queued_tokens=1) as engine:
        handles = [engine.admit(Request(f"{i}", prompt_of(9, i), greedy(1)), bypass_limits=bool(i)) for i in range(3)]
        for handle in handles:
            assert outcome_of(await events_of(handle)) == alone(handle.request)


async def test_abort_finishes_one_request(endless_engine: Engine) -> None:
    a, b = endless_engine.admit(Request("a", [1], ENDLESS)), start(endless_engine, Request("b", [2], greedy(300)))
    first = [await next_event(a) for _ in range(3)]
    a.abort()
    endless_engine.abort("a")
    endless_engine.abort("unknown")
    events = first + await events_of(a)
    assert events[-1].finish_reason is FinishReason.ABORT
    assert events[-1].token_ids == []
    assert all(event.finish_reason is None for event in events[:-1])
    assert outcome_of(await b).reason is FinishReason.LENGTH


async def test_abort_waiting_request(endless_engine: Engine) -> None:
    tasks = [start(endless_engine, Request(f"{i}", [i], ENDLESS)) for i in range(2)]
    waiting = endless_engine.admit(Request("waiting", [3], greedy(1)))
    waiting.abort()
    (event,) = await events_of(waiting)
    assert (event.finish_reason, event.token_ids) == (FinishReason.ABORT, [])
    for i, task in enumerate(tasks):
        assert not task.done()
        endless_engine.abort(f"{i}")
        await task


async def test_handle_exit_aborts(endless_engine: Engine) -> None:
    with endless_engine.admit(Request("a", [1], ENDLESS)) as handle:
        await next_event(handle)
    assert (await events_of(handle))[-1].finish_reason is FinishReason.ABORT


async def test_handle_after_finish_has_no_events(engine: Engine) -> None:
    handle = engine.admit(Request("a", [1], greedy(1)))
    assert len(await events_of(handle)) == 1
    assert await events_of(handle) == []


async def test_handle_has_times_and_cached_tokens(engine: Engine) -> None:
    for cached in (0, 64):
        handle = engine.admit(Request("a", prompt_of(70), greedy(3)))
        await events_of(handle)
        times = handle.times
        assert 0 < times.arrived <= times.scheduled <= times.first <= times.last
        assert handle.cached_tokens == cached


async def test_cancelled_reader_aborts(endless_engine: Engine) -> None:
    started = asyncio.Event()

    async def read() -> None:
        with endless_engine.admit(Request("a", [1], ENDLESS)) as handle:
            async for _ in handle:
                started.set()

    reader = asyncio.create_task(read())
    async with asyncio.timeout(TIMEOUT):
        await started.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader


async def test_queue_timeout(endless_engine: Engine) -> None:
    tasks = [start(endless_engine, Request(f"{i}", [i], ENDLESS, queue_timeout=TIMEOUT)) for i in range(2)]
    with (
        pytest.raises(QueueTimeoutError),
        endless_engine.admit(Request("a", [1], greedy(1), queue_timeout=0)) as handle,
    ):
        await next_event(handle)
    for i, task in enumerate(tasks):
        endless_engine.abort(f"{i}")
        assert (await task)[-1].finish_reason is FinishReason.ABORT


async def test_deadline(endless_engine: Engine) -> None:
    with pytest.raises(DeadlineError), endless_engine.admit(Request("a", [1], ENDLESS, deadline=0)) as handle:
        await events_of(handle)


async def test_stop_ends_open_streams(endless_engine: Engine) -> None:
    engine = endless_engine
    assert engine.ready
    handle = engine.admit(Request("a", [1], ENDLESS))
    await next_event(handle)
    tasks = [start(engine, Request(f"{i}", [i], ENDLESS)) for i in range(3)]
    await asyncio.to_thread(engine.stop)
    with pytest.raises(EngineStoppedError):
        await events_of(handle)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [EngineStoppedError] * 3
    assert not any((engine.ready, engine.failed))
    with pytest.raises(EngineStoppedError):
        engine.admit(Request("late", [1], greedy(1)))
    engine.stop()


@pytest.mark.parametrize(("prompt", "max_tokens"), [(0, 1), (257, 0), (300, 10), (150, 50), (192, 1)])
async def test_admit_impossible_size(prompt: int, max_tokens: int) -> None:
    async with running_engine(FakeRunner(pages=4), max_waiting=1, max_model_len=256) as engine:
        with pytest.raises(ValueError, match=r"1 to 256 tokens, not \d+|needs \d+ tokens of cache; there are 192"):
            engine.admit(Request("a", [1] * prompt, greedy(max_tokens, prompt_logprobs=True)))
        for fitting in (192, 100):
            request = Request("a", prompt_of(fitting), greedy(192 - fitting, prompt_logprobs=True))
            assert outcome_of(await run(engine, request)) == alone(request)


async def test_seconds_in_step_is_zero_when_idle(engine: Engine) -> None:
    await run(engine, Request("a", prompt_of(5), greedy(3)))
    async with asyncio.timeout(TIMEOUT):
        while engine.seconds_in_step:  # one more iteration finds nothing to do
            await asyncio.sleep(0)


async def test_assert_idle_finds_unfinished_request(endless_engine: Engine) -> None:
    with endless_engine.admit(Request("a", [1], ENDLESS)) as handle:
        await next_event(handle)
        with pytest.raises(AssertionError, match="1 unfinished"):
            await asyncio.to_thread(assert_idle, endless_engine)
