"""Engine: failures of steps, calls and the thread."""

import asyncio
import logging
from typing import Any

import pytest

from serve.engine.engine import Engine
from serve.engine.request import EngineStoppedError, FinishReason, PromptScoring, Request, SamplingParams
from tests.support.engines import ENDLESS, LONG, endless_runner, events_of, next_event, run, running_engine, start
from tests.support.fake_runner import VOCAB_SIZE, FakeRunner, InjectedError, greedy, prompt_of
from tests.support.http_client import Gate

PINNED = Request("pinned", prompt_of(20), SamplingParams(0, prompt=PromptScoring(full_vocab=True)))


async def test_step_failure_finishes_running_requests(
    engine: Engine, runner: FakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    runner.fail_once("decode", after=2)
    events = await run(engine, Request("a", [1], greedy(50)))
    assert (events[-1].finish_reason, events[-1].error) == (FinishReason.ERROR, "the engine failed on this request")
    assert len(events) == 2  # the token of the unread step is lost
    assert engine.ready
    assert runner.resets == 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_reset_failure_stops_engine(caplog: pytest.LogCaptureFixture) -> None:
    runner = endless_runner()

    def before_call(name: str) -> None:
        if name == "reset" or (name == "decode" and len(runner.calls) >= 200):
            raise InjectedError(name)

    runner.before_call = before_call
    async with running_engine(runner) as engine:
        answers = await asyncio.gather(*(run(engine, Request(f"{i}", [i], ENDLESS)) for i in range(4)))
        for events in answers:
            assert (events[-1].finish_reason, events[-1].error) == (FinishReason.ERROR, "the engine has stopped")
        assert engine.failed
        assert not engine.ready
        assert len(caplog.records) == 2
        with pytest.raises(EngineStoppedError):
            engine.admit(Request("late", [1], greedy(1)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_thread_exit_finishes_all_streams(endless_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def exit_thread() -> None:
        raise SystemExit

    await run(endless_engine, PINNED)
    handle = endless_engine.admit(Request("a", [1], ENDLESS))
    await next_event(handle)
    monkeypatch.setattr(endless_engine._core, "step", exit_thread)
    assert (await events_of(handle))[-1].finish_reason is FinishReason.ERROR
    await asyncio.to_thread(endless_engine._thread.join)
    with pytest.raises(EngineStoppedError):
        endless_engine.admit(Request("late", [1], greedy(1)))
    with pytest.raises(EngineStoppedError):
        await endless_engine.full_vocab_logprobs("pinned", 0, 1)


async def test_call_failure_finishes_running_requests(
    endless_engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise InjectedError

    handle = endless_engine.admit(Request("a", [1], ENDLESS))
    await next_event(handle)
    with monkeypatch.context() as patch:
        patch.setattr(endless_engine._core, "abort", fail)
        handle.abort()
        events = await events_of(handle)
    assert events[-1].finish_reason is FinishReason.ERROR
    assert len(caplog.records) == 1


async def test_add_failure_finishes_only_its_request(endless_engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with endless_engine.admit(Request("a", [1], ENDLESS)) as handle:
        await next_event(handle)
        params = SamplingParams(5, min_tokens=2, stop_token_ids=frozenset({VOCAB_SIZE + 64}))
        events = await run(endless_engine, Request("b", [1], params))
        assert [(event.finish_reason, event.error) for event in events] == [
            (FinishReason.ERROR, "it could not be queued")
        ]
        await next_event(handle)
    assert len(caplog.records) == 1


async def test_give_up_finishes_all_streams() -> None:
    runner = endless_runner()
    async with running_engine(runner) as engine:
        await run(engine, PINNED)
        gate = runner.before_call = Gate("decode")
        unfinished = start(engine, Request("a", prompt_of(5), greedy(LONG)))
        await gate.reached()
        rows = asyncio.create_task(engine.full_vocab_logprobs("pinned", 0, 1))
        await asyncio.sleep(0)
        assert engine.seconds_in_step > 0
        engine.abandon()
        assert (await unfinished)[-1].finish_reason is FinishReason.ERROR
        with pytest.raises(EngineStoppedError):
            await rows
        with pytest.raises(EngineStoppedError):
            engine.admit(Request("b", prompt_of(5), greedy(1)))
        with pytest.raises(EngineStoppedError):
            await engine.full_vocab_logprobs("pinned", 0, 1)
        assert (engine.ready, engine.is_hung) == (False, True)
        engine.stop()  # does not wait for the thread
        gate.open()
