"""Texts through the engine: many at once, results in their order."""

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass

import numpy as np

from serve.cli.score.errors import LineError, ScoreError
from serve.cli.score.source import Line
from serve.cli.score.texts import Text
from serve.cli.score.windows import Window
from serve.engine.client import EngineClient
from serve.engine.request import (
    EngineStoppedError,
    FinishReason,
    PromptScoring,
    Request,
    SamplingParams,
    TokenEvent,
    TokenScores,
    empty_scores,
)


@dataclass(frozen=True, slots=True)
class Work:
    """A line, and what is to be scored of it."""

    line: Line
    text: Text | None = None
    windows: tuple[Window, ...] = ()
    error: str | None = None  # why there is no text

    @property
    def num_tokens(self) -> int:
        """That are held until the line is written."""
        return len(self.text.token_ids) if self.text else 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a line: scores, or an error."""

    work: Work
    scores: TokenScores | None = None  # row i: token i + 1, up to the end of the last window
    error: str | None = None


@dataclass(frozen=True, slots=True)
class InFlight:
    """Bounds of what has been read and is not written."""

    requests: int  # in the engine at once; so many lines, too
    tokens: int  # of their texts; a longer text is alone


class Pipeline:
    """Scores lines. Its memory is bounded by `InFlight`, or by one text that is longer."""

    def __init__(self, engine: EngineClient, bounds: InFlight, alternatives: int) -> None:
        """`alternatives` are kept of each token."""
        self._engine = engine
        self._bounds = bounds
        self._alternatives = alternatives
        self._slots = asyncio.Semaphore(bounds.requests)

    async def outcomes(self, works: Iterator[Work]) -> AsyncGenerator[Outcome]:
        """What became of each, in order; reads no further ahead than the bounds say.

        Raises:
            ScoreError: the engine has stopped.
        """
        pending: deque[tuple[Work, asyncio.Task[Outcome]]] = deque()
        try:
            for work in works:
                while pending and self._is_full([each.num_tokens for each, _ in pending], work.num_tokens):
                    yield await pending.popleft()[1]
                pending.append((work, asyncio.create_task(self._outcome(work))))
                await asyncio.sleep(0)  # what is read is submitted before more is read
                while pending and pending[0][1].done():
                    yield await pending.popleft()[1]
            while pending:
                yield await pending.popleft()[1]
        finally:
            for _, task in pending:
                task.cancel()
            await asyncio.gather(*(task for _, task in pending), return_exceptions=True)

    def _is_full(self, tokens: list[int], more: int) -> bool:
        return len(tokens) >= self._bounds.requests or sum(tokens) + more > self._bounds.tokens

    async def _outcome(self, work: Work) -> Outcome:
        if work.text is None:
            return Outcome(work, error=work.error)
        windows = [self._window(work.text.token_ids, each) for each in work.windows]
        parts: list[TokenScores] = []
        for result in await asyncio.gather(*windows, return_exceptions=True):
            if isinstance(result, LineError):
                return Outcome(work, error=str(result))
            if isinstance(result, BaseException):
                raise result
            parts.append(result)
        return Outcome(work, _joined(parts))

    async def _window(self, token_ids: list[int], window: Window) -> TokenScores:
        async with self._slots:
            prompt = token_ids[window.begin : window.end]
            start = window.first - window.begin
            params = SamplingParams(max_tokens=0, prompt=PromptScoring(start))
            event = await self._last_event(Request(uuid.uuid4().hex, prompt, params))
        if event.finish_reason is not FinishReason.LENGTH:
            raise LineError(f"the engine failed: {event.error or 'the request was aborted'}")
        scores = event.prompt_scores
        if scores is None or len(scores.logprob) != len(prompt) - 1:
            raise LineError("the engine failed: it returned another number of log-probs than tokens")
        return _checked(scores[start - 1 :], self._alternatives)

    async def _last_event(self, request: Request) -> TokenEvent:
        """The one event of a request that chooses nothing."""
        try:
            with self._engine.admit(request) as handle:
                async for event in handle:
                    return event
        except EngineStoppedError:
            raise ScoreError("the engine has stopped") from None
        except ValueError as error:
            raise LineError(str(error)) from error
        raise ScoreError("the engine has stopped")


def _checked(scores: TokenScores, alternatives: int) -> TokenScores:
    """Copies of what is kept.

    Raises:
        LineError: a number is none.
    """
    kept = TokenScores(
        scores.logprob.copy(),
        scores.rank.copy(),
        scores.top_ids[:, :alternatives].copy(),
        scores.top_ranks[:, :alternatives].copy(),
        scores.top_logprobs[:, :alternatives].copy(),
    )
    if not ((kept.logprob < np.inf).all() and (kept.top_logprobs < np.inf).all()):
        raise LineError("the engine failed: a log-prob is not a number")
    return kept


def _joined(parts: list[TokenScores]) -> TokenScores:
    if len(parts) == 1:
        return parts[0]
    names = TokenScores.__slots__
    if not parts:
        return empty_scores(0, 0)
    return TokenScores(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
