"""What both endpoints do: requests to the engine, events to text with their numbers."""

import math
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serve.api.errors import APIError, engine_error, invalid, shutting_down
from serve.api.middleware import Work
from serve.api.requests import GenerationRequest
from serve.api.sampling_params import stop_strings
from serve.engine.request import (
    DeadlineError,
    EngineLimits,
    EngineStoppedError,
    FinishReason,
    PromptScoring,
    QueueFullError,
    QueueTimeoutError,
    Request,
    SamplingParams,
    TokenEvent,
    TokenScores,
    empty_scores,
)
from serve.text.detokenizer import Detokenizer, StopStrings
from serve.text.tokenizer import Tokenizer

_NOT_SHOWN = empty_scores(0, 0)


class Engine(Protocol):
    """The engine as HTTP sees it; `serve.engine.engine.Engine` says what its methods do."""

    limits: EngineLimits

    @property
    def ready(self) -> bool: ...
    @property
    def load(self) -> int: ...
    def submit(self, request: Request) -> AsyncGenerator[TokenEvent]: ...
    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None: ...
    async def vocabulary(self, request_id: str, start: int, count: int) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """Of one HTTP request."""

    queue_seconds: float = math.inf  # that the first of its choices may wait in the engine
    end_by: float = math.inf  # in seconds of time.monotonic(): by then all must have ended


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event adds to one choice."""

    text: str
    token_ids: list[int]
    scores: TokenScores  # one row per token id; none where the choice shows none
    cached_tokens: int = 0  # of the prompt; the same in all deltas
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_scores: TokenScores | None = None


@dataclass(slots=True)
class Choice:
    """One answer in the making: the engine's request, and how its tokens become text."""

    index: int
    request: Request
    stop: StopStrings
    include_stop: bool
    skip_special_tokens: bool
    prompt_index: int
    eos_token_ids: frozenset[int]  # ending with one of these has no stop_reason
    first: bool  # of its prompt: it carries the prompt's scores
    shows: bool  # the numbers of its tokens
    num_tokens: int = 0  # generated so far

    async def deltas(self, engine: Engine, tokenizer: Tokenizer) -> AsyncGenerator[Delta]:
        """The engine's events with their text; ends after the delta that has a finish reason.

        Raises:
            APIError: 429 when the queue is full, 500 when the engine fails, 503 when it has stopped.
        """
        detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=self.skip_special_tokens,
            stop=self.stop,
            include_stop_str_in_output=self.include_stop,
        )
        try:
            async with aclosing(events_of(engine, self.request)) as events:
                async for event in events:
                    delta = self._delta(event, detokenizer)
                    self.num_tokens += len(delta.token_ids)
                    if detokenizer.stopped_by is not None:
                        engine.abort(self.request.id, FinishReason.STOP)
                    yield delta
                    if delta.finish_reason is not None:
                        return
        finally:
            engine.abort(self.request.id)

    def _delta(self, event: TokenEvent, detokenizer: Detokenizer) -> Delta:
        text, count = "", 0
        for token_id in event.token_ids:
            count += 1
            if token_id != event.stop_token_id or self.include_stop:
                text += detokenizer.push(token_id)
            if detokenizer.stopped_by is not None:
                break
        reason: str | None = event.finish_reason
        stop_reason: str | int | None = None
        if detokenizer.stopped_by is not None:
            reason, stop_reason = "stop", detokenizer.stopped_by
        elif reason is not None:
            text += detokenizer.finish()
            stop_reason = None if event.stop_token_id in self.eos_token_ids else event.stop_token_id
        return Delta(
            text=text,
            token_ids=event.token_ids[:count],
            scores=event.scores[:count] if self.shows else _NOT_SHOWN,
            cached_tokens=event.cached_tokens,
            finish_reason=reason,
            stop_reason=stop_reason,
            prompt_scores=event.prompt_scores,
        )


@dataclass(slots=True)
class Finished:
    """A whole choice."""

    choice: Choice
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenScores] = field(default_factory=list)
    cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_scores: TokenScores | None = None

    def add(self, delta: Delta) -> None:
        """Appends a delta."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.token_ids or not self.scores:
            self.scores.append(delta.scores)
        self.cached_tokens = delta.cached_tokens
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.prompt_scores = delta.prompt_scores or self.prompt_scores

    def all_scores(self) -> TokenScores:
        """The numbers of all tokens in one piece."""
        names = TokenScores.__slots__
        return TokenScores(*(np.concatenate([getattr(part, name) for part in self.scores]) for name in names))


async def events_of(engine: Engine, request: Request) -> AsyncGenerator[TokenEvent]:
    """Submits a request; its events, none of which tells a failure.

    Raises:
        APIError: as in `Choice.deltas`.
    """
    with engine_errors():
        async with aclosing(engine.submit(request)) as events:
            async for event in events:
                if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    message = f"The engine failed: {event.error}." if event.error else "The request was aborted."
                    raise engine_error(message)
                yield event


@contextmanager
def engine_errors() -> Iterator[None]:
    """Turns what the engine raises into what the client is told."""
    try:
        yield
    except QueueFullError:
        message = "Too many requests are waiting. Try again later."
        raise APIError(429, message, None, "rate_limit_exceeded", {"Retry-After": "1"}) from None
    except QueueTimeoutError:
        message = "The request waited in the queue for as long as it may. Try again later."
        raise APIError(503, message, None, "queue_timeout", {"Retry-After": "1"}) from None
    except DeadlineError:
        raise too_late() from None
    except EngineStoppedError:
        raise shutting_down() from None


def too_late() -> APIError:
    """504 for a request whose time is up."""
    return APIError(504, "The request did not end within its time.", "timeout", "deadline_exceeded")


def make_choices(
    body: GenerationRequest,
    prompts: Sequence[list[int]],
    max_tokens: Sequence[int],
    *,
    params: SamplingParams,
    scoring: PromptScoring | None,
    eos_token_ids: frozenset[int],
    shows: bool,
    cache_salt: str,
    times: TimeLimits,
) -> list[Choice]:
    """A choice for each of n answers to each prompt, in the order of their indices.

    Args:
        max_tokens: of each prompt's answers.
        params: what all answers share.
        scoring: what the first answer to each prompt tells about it.
        shows: the numbers of generated tokens. Where nobody asks for them they are not kept: there may be many.

    Raises:
        APIError: 400 that names a field.
    """
    n = body.n or 1
    stop = StopStrings(stop_strings(body))
    choices = []
    for index in range(len(prompts) * n):
        which, number = divmod(index, n)
        if params.min_tokens > max_tokens[which]:
            raise invalid("min_tokens", f"`min_tokens` is above the {max_tokens[which]} tokens that may be generated.")
        if index == 1:  # who waits behind the first waits for its own request, too
            times = replace(times, queue_seconds=math.inf)
        own = replace(
            params,
            max_tokens=max_tokens[which],
            seed=None if body.seed in (None, -1) else body.seed + number,
            prompt=scoring if number == 0 else None,
        )
        choices.append(
            Choice(
                index=index,
                request=make_request(body, prompts[which], own, cache_salt, times),
                stop=stop,
                include_stop=bool(body.include_stop_str_in_output),
                skip_special_tokens=body.skip_special_tokens is not False,
                prompt_index=which,
                eos_token_ids=eos_token_ids,
                first=number == 0,
                shows=shows,
            )
        )
    return choices


def make_request(
    body: GenerationRequest, prompt: list[int], params: SamplingParams, cache_salt: str, times: TimeLimits
) -> Request:
    """One request to the engine, with a name of its own."""
    return Request(uuid.uuid4().hex, prompt, params, body.priority or 0, cache_salt, times.queue_seconds, times.end_by)


def work_of(choices: Sequence[Choice]) -> Work:
    """What the engine did for choices that have ended, or were given up."""
    first = [choice.request for choice in choices if choice.first]
    ran = [choice.request.times for choice in choices if choice.request.times.admitted]
    told = [times for times in ran if times.last]
    return Work(
        prompt_tokens=sum(len(request.prompt_token_ids) for request in first),
        cached_tokens=sum(request.num_cached or 0 for request in first),
        completion_tokens=sum(choice.num_tokens for choice in choices),
        queue=max((times.admitted - times.arrived for times in ran), default=None),
        prefill=max(((times.first or times.last) - times.admitted for times in told), default=None),
        decode=max((times.last - times.first for times in told if times.first), default=None),
    )
