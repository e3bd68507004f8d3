"""Many lines in flight: results in order, within bounds, and each line with its own failure."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any, cast

import numpy as np
import pytest

from model.token_logprobs import TokenLogprobs, empty_logprobs
from serve.cli.batch.source import Line
from serve.cli.score.command import ScoreItem
from serve.cli.score.texts import Context, Text
from serve.engine.client import EngineClient, RequestHandle
from serve.engine.request import (
    EngineLimits,
    EngineStoppedError,
    FinishReason,
    Request,
    TokenEvent,
)
from serve.engine.request_state import RequestState
from serve.jobs.request_queue import RequestError, RequestQueue
from serve.jobs.score import EncodedText, stream_scores

type Outcome = tuple[ScoreItem, TokenLogprobs | RequestError]

K = 3


class FakeEngine:
    """Answers the last request first. A prompt's log-probs are its negated tokens.

    A prompt that starts with 0 fails, with 1 finds the engine stopped, with 2 gets a NaN.
    """

    limits = EngineLimits(1000, K, 1000, 1000, 128, full_vocab=False)

    def __init__(self) -> None:
        self.open: dict[str, Request] = {}
        self.most, self.most_tokens, self.all = 0, 0, 0

    def admit(self, request: Request) -> RequestHandle:
        if request.prompt_token_ids[0] == 1:
            raise EngineStoppedError
        self.open[request.id] = request
        self.all += 1
        self.most = max(self.most, len(self.open))
        self.most_tokens = max(self.most_tokens, sum(len(request.prompt_token_ids) for request in self.open.values()))
        return FakeHandle(cast("EngineClient", self), RequestState(request))

    def abort(self, request_id: str, _: FinishReason) -> None:
        del self.open[request_id]

    async def answer(self, request: Request) -> TokenEvent:
        prompt = request.prompt_token_ids
        while next(reversed(self.open)) != request.id:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        if prompt[0] == 0:
            return TokenEvent([], empty_logprobs(0, 0), FinishReason.ERROR, error="it broke")
        scores = empty_logprobs(len(prompt) - 1, K)
        scores.logprob[:] = -np.asarray(prompt[1:], np.float32)
        scores.top_logprobs[:] = 0
        if prompt[0] == 2:
            scores.logprob[-1] = np.nan
        return TokenEvent([], empty_logprobs(0, 0), FinishReason.LENGTH, prompt_logprobs=scores)


class FakeHandle(RequestHandle):
    async def __anext__(self) -> TokenEvent:
        engine: Any = self._engine
        event: TokenEvent = await engine.answer(self.request)
        return event


def items(texts: Sequence[list[int]], numbers: list[int], size: int = 1000) -> Iterator[ScoreItem]:
    context = Context(size, "window", size // 2)
    for number, ids in enumerate(texts, 1):
        numbers.append(number)
        line = Line(number, b"", 0, 0)
        if ids:
            yield ScoreItem(ids, context.windows(len(ids)), line, Text(EncodedText(ids)))
        else:
            yield ScoreItem([], (), line, error="it is empty")


def stream(engine: FakeEngine, queued: Iterator[ScoreItem], requests: int, tokens: int) -> AsyncGenerator[Outcome]:
    return stream_scores(RequestQueue(cast("EngineClient", engine), requests, tokens), queued, 2)


async def outcomes(
    engine: FakeEngine, texts: Sequence[list[int]], requests: int, tokens: int, size: int = 1000
) -> list[Outcome]:
    """All outcomes; asserts that no more items are read ahead than the bounds allow."""
    numbers: list[int] = []
    outcomes: list[Outcome] = []
    async with aclosing(stream(engine, items(texts, numbers, size), requests, tokens)) as results:
        async for outcome in results:
            outcomes.append(outcome)
            assert len(numbers) - len(outcomes) <= requests
    return outcomes


def scores_of(outcome: Outcome) -> TokenLogprobs:
    _, scores = outcome
    assert isinstance(scores, TokenLogprobs)
    return scores


def texts_of(count: int) -> list[list[int]]:
    return [[3, *range(4, 5 + i % 7)] for i in range(count)]


async def test_run_in_order_keeps_the_order_of_concurrent_items() -> None:
    engine, texts = FakeEngine(), texts_of(50)
    results = await outcomes(engine, texts, 8, 1000)
    assert [item.line.number for item, _ in results] == list(range(1, 51))
    for text, scores in zip(texts, map(scores_of, results), strict=True):
        assert (-scores.logprob).tolist() == text[1:]
        assert scores.top_logprobs.shape == (len(text) - 1, 2)
        assert scores.top_logprobs.base is None  # a copy, not a view of all alternatives
    assert engine.most == 8


async def test_run_in_order_bounds_tokens_and_runs_a_longer_text_alone() -> None:
    engine = FakeEngine()
    texts = [*texts_of(20), [3] * 70, *texts_of(20)]
    assert len(await outcomes(engine, texts, 8, 20)) == 41
    assert engine.most_tokens == 70
    small = FakeEngine()
    await outcomes(small, texts_of(40), 8, 20)
    assert 10 < small.most_tokens <= 20


async def test_windows_of_a_long_text_share_the_bound_of_requests() -> None:
    engine, text = FakeEngine(), [3, *range(4, 500)]
    [long, short] = await outcomes(engine, [text, [3, 4]], 4, 1000, size=20)
    assert (-scores_of(long).logprob).tolist() == text[1:]
    assert scores_of(short) is not None
    assert engine.most == 4
    assert engine.all > 40


async def test_score_of_one_token_sends_no_request() -> None:
    engine = FakeEngine()
    [outcome] = await outcomes(engine, [[5]], 4, 100)
    assert len(scores_of(outcome).logprob) == engine.all == 0


async def test_a_failed_request_affects_its_line_only() -> None:
    results = await outcomes(FakeEngine(), [[3, 4], [0, 4], [], [2, 4], [3, 5]], 8, 100)
    errors = [item.error or (str(result) if isinstance(result, RequestError) else None) for item, result in results]
    assert errors == [
        None,
        "the engine failed: it broke",
        "it is empty",
        "the engine failed: a log-prob is NaN",
        None,
    ]


async def test_run_in_order_ends_with_a_stopped_engine_and_aborts_the_rest() -> None:
    engine = FakeEngine()
    with pytest.raises(EngineStoppedError):
        await outcomes(engine, [[3, 4], [3, 4], [1, 4], [3, 5], [3, 6]], 8, 100)
    assert not engine.open


async def test_run_in_order_aborts_the_rest_when_closed() -> None:
    engine = FakeEngine()
    async with aclosing(stream(engine, items(texts_of(50), []), 8, 100)) as results:
        await anext(results)
        assert engine.open
    assert not engine.open
