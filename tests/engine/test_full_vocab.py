"""Engine.full_vocab_logprobs: rows over the full vocabulary of requests whose pages are pinned."""

import asyncio
from itertools import pairwise

import numpy as np
import pytest

from serve.engine.engine import Engine
from serve.engine.request import (
    EngineStoppedError,
    NotPinnedError,
    PromptScoring,
    QueueFullError,
    Request,
    SamplingParams,
)
from tests.support.engines import next_event, run, running_engine, start
from tests.support.fake_runner import VOCAB_SIZE, FakeRunner, alone, greedy, hidden_after, outcome_of, prompt_of


def full_vocab(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens, temperature=0.0, prompt=PromptScoring(full_vocab=True))


async def test_full_vocab_logprobs_until_abort() -> None:
    async with running_engine(FakeRunner(), max_waiting=1) as engine:
        prompt = prompt_of(20)
        assert len(await run(engine, Request("a", prompt, full_vocab(2)))) == 2
        rows = await engine.full_vocab_logprobs("a", 3, 2)
        expected = [[-((token + hidden_after(prompt[:n])) % 7) / 8 for token in range(VOCAB_SIZE)] for n in (4, 5)]
        np.testing.assert_array_equal(rows, np.asarray(expected, np.float32))
        with pytest.raises(QueueFullError):  # pinned requests count
            engine.admit(Request("b", [1], greedy(1)))
        engine.abort("a")
        with pytest.raises(NotPinnedError):
            await engine.full_vocab_logprobs("a", 3, 2)


async def test_full_vocab_logprobs_after_device_failure_and_stop(
    engine: Engine, runner: FakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    await run(engine, Request("a", prompt_of(20), full_vocab(0)))
    runner.fail_once("vocabulary")
    with pytest.raises(EngineStoppedError):
        await engine.full_vocab_logprobs("a", 0, 1)
    assert len(caplog.records) == 1
    assert (await engine.full_vocab_logprobs("a", 0, 1)).shape == (1, VOCAB_SIZE)
    await asyncio.to_thread(engine.stop)
    with pytest.raises(EngineStoppedError):
        await engine.full_vocab_logprobs("a", 0, 1)


async def test_pinned_pages_delay_other_requests() -> None:
    async with running_engine(FakeRunner(pages=4)) as engine:
        await run(engine, Request("a", prompt_of(150), full_vocab(0)))
        b = Request("b", prompt_of(100, 1), greedy(5))
        waiting = start(engine, b)
        await engine.full_vocab_logprobs("a", 0, 1)  # the engine has seen b by now
        assert not waiting.done()
        engine.abort("a")
        assert outcome_of(await waiting) == alone(b)


async def test_expired_lease_frees_pages() -> None:
    async with running_engine(FakeRunner(pages=4), pin_seconds=0) as engine:
        await run(engine, Request("a", prompt_of(150), full_vocab(0)))
        b = Request("b", prompt_of(100, 1), greedy(5))
        assert outcome_of(await run(engine, b)) == alone(b)
        with pytest.raises(NotPinnedError):
            await engine.full_vocab_logprobs("a", 0, 1)


async def test_full_vocab_logprobs_calls_alternate_with_steps() -> None:
    runner = FakeRunner()
    async with running_engine(runner, max_waiting=9) as engine:
        names = [f"{i}" for i in range(5)]
        for name in names:
            await run(engine, Request(name, prompt_of(20), full_vocab(0)))
        with engine.admit(Request("a", [1], greedy(400))) as handle:
            await next_event(handle)
            runner.calls.clear()
            await asyncio.gather(*(engine.full_vocab_logprobs(name, 0, 1) for name in names))
            order = [name for name, _ in list(runner.calls) if name in ("vocabulary", "decode")]
        assert order.count("vocabulary") == len(names)
        assert all(pair != ("vocabulary", "vocabulary") for pair in pairwise(order))
        for name in names:
            engine.abort(name)
