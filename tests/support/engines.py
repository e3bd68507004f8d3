"""Running engines with a fake runner, and helpers that read their events."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

from compiled.state import MAX_REQUESTED_IDS
from model.kv_cache import PAGE_SIZE
from serve.engine.client import RequestHandle
from serve.engine.engine import Engine
from serve.engine.request import EngineLimits, EngineOptions, Request, TokenEvent
from tests.support.fake_runner import VOCAB_SIZE, FakeRunner, K, alone, greedy, outcome_of, prompt_of

LONG = 100_000  # tokens
ENDLESS = greedy(LONG - 1000)  # runs for minutes, so a test's actions come before its end
TIMEOUT = 20  # seconds, only reached if something hangs


@asynccontextmanager
async def running_engine(
    runner: FakeRunner, *, max_waiting: int = 8, max_model_len: int | None = None, **options: Any
) -> AsyncIterator[Engine]:
    """A running engine. If the test leaves it running, it must be idle at the end.

    Args:
        runner: the device.
        max_waiting: see EngineOptions.max_num_queued_reqs.
        max_model_len: the runner's maximum by default.
        options: fields of EngineOptions.
    """
    limits = EngineLimits(
        max_model_len=max_model_len or runner.buckets.pages_per_row * PAGE_SIZE,
        max_logprobs=K,
        vocab_size=VOCAB_SIZE,
        cache_tokens=(runner.pages - 1) * PAGE_SIZE,
        max_requested_ids=MAX_REQUESTED_IDS,
        full_vocab=True,
    )
    defaults = {"max_num_batched_tokens": 68, "max_num_queued_reqs": max_waiting, "pin_seconds": 1000}
    engine = Engine(runner, limits, EngineOptions(**defaults | options))
    engine.start()
    try:
        yield engine
        if engine.ready:
            await _check_idle(engine)
    finally:
        runner.before_call = lambda _: None
        await asyncio.to_thread(engine.stop)


def endless_runner() -> FakeRunner:
    """A runner for LONG requests, two at once."""
    return FakeRunner(pages=4000, decode_rows=(1, 2), pages_per_row=LONG // PAGE_SIZE + 1)


async def next_event(handle: RequestHandle) -> TokenEvent:
    async with asyncio.timeout(TIMEOUT):
        return await anext(handle)


async def events_of(handle: RequestHandle) -> list[TokenEvent]:
    """All remaining events of a request."""
    async with asyncio.timeout(TIMEOUT):
        return [event async for event in handle]


async def run(engine: Engine, request: Request) -> list[TokenEvent]:
    """Admit a request and return all of its events."""
    return await events_of(engine.admit(request))


def start(engine: Engine, request: Request) -> asyncio.Task[list[TokenEvent]]:
    """Admit a request and collect its events in a task."""
    return asyncio.create_task(events_of(engine.admit(request)))


def assert_idle(engine: Engine) -> None:
    """Raise AssertionError if a request is left or a page in use after all calls so far."""
    checked: Future[None] = Future()

    def check() -> None:
        scheduler = engine._core.scheduler
        try:
            assert not scheduler.num_requests, f"{scheduler.num_requests} unfinished requests"
            assert not scheduler.pinned, f"{len(scheduler.pinned)} pinned requests"
            assert not engine.num_requests, f"{engine.num_requests} open streams"
            scheduler.check()
        except AssertionError as error:
            checked.set_exception(error)
        else:
            checked.set_result(None)

    if engine._thread.is_alive():
        engine._inbox.put(check)
    else:
        check()
    checked.result(TIMEOUT)


async def _check_idle(engine: Engine) -> None:
    """A last request gets the right answer, and nothing remains of any request."""
    request = Request("probe", prompt_of(70), greedy(3, prompt_logprobs=True))
    assert outcome_of(await run(engine, request)) == alone(request)
    await asyncio.to_thread(assert_idle, engine)
