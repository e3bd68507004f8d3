"""What both endpoints do: fields to SamplingParams, requests to the engine, events to text with their numbers."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from serve.engine.detokenize import Detokenizer
from serve.engine.request import (
    EngineLimits,
    EngineStoppedError,
    FinishReason,
    QueueFullError,
    Request,
    SamplingParams,
    TokenEvent,
    TokenScores,
)
from serve.openai.errors import APIError, engine_error, invalid
from serve.openai.schema import GenerationRequest
from serve.text.tokenizer import Tokenizer

GREEDY_BELOW = 1e-5  # temperatures under it are 0
_MAX_STOP_STRINGS = 10_000
_MAX_STOP_CHARACTERS = 100_000  # of all strings; preparing them takes time on the event loop
_AT_ONCE = 64  # of the choices of one HTTP request: a long list of prompts leaves room in the queue for others


class Engine(Protocol):
    """The engine as HTTP sees it."""

    limits: EngineLimits

    @property
    def ready(self) -> bool: ...
    def submit(self, request: Request) -> AsyncIterator[TokenEvent]: ...
    def abort(self, request_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event adds to one choice."""

    text: str
    token_ids: list[int]
    scores: TokenScores
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_scores: TokenScores | None = None


@dataclass(slots=True)
class Choice:
    """One answer in the making: the engine's request, and how its tokens become text."""

    index: int
    request: Request
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    prompt_index: int
    eos_token_ids: frozenset[int]  # ending with one of these has no stop_reason
    first: bool  # of its prompt: it carries the prompt's scores

    async def deltas(self, engine: Engine, tokenizer: Tokenizer) -> AsyncGenerator[Delta]:
        """The engine's events with their text; ends after the delta that has a finish reason.

        Raises:
            APIError: 429 when the queue is full, 500 when the engine fails.
        """
        detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=self.skip_special_tokens,
            stop=self.stop,
            include_stop_str_in_output=self.include_stop,
        )
        try:
            async for event in engine.submit(self.request):
                delta = self._delta(event, detokenizer)
                yield delta
                if delta.finish_reason is not None:
                    return
        except QueueFullError:
            message = "Too many requests are waiting. Try again later."
            raise APIError(429, message, None, "rate_limit_exceeded", {"Retry-After": "1"}) from None
        except EngineStoppedError:
            raise APIError(503, "The server is shutting down.", None, "engine_stopped") from None
        finally:
            engine.abort(self.request.id)

    def _delta(self, event: TokenEvent, detokenizer: Detokenizer) -> Delta:
        if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise engine_error(f"The engine failed: {event.error}." if event.error else "The request was aborted.")
        text, count = "", 0
        for token_id in event.token_ids:
            count += 1
            if token_id != event.stop_token_id or self.include_stop:
                text += detokenizer.push(token_id)
            if detokenizer.stopped_by is not None:
                break
        ids, scores = event.token_ids[:count], _first_rows(event.scores, count)
        if detokenizer.stopped_by is not None:
            return Delta(text, ids, scores, "stop", detokenizer.stopped_by, event.prompt_scores)
        if event.finish_reason is None:
            return Delta(text, ids, scores, None, None, event.prompt_scores)
        stop = event.stop_token_id
        stop_reason = None if stop in self.eos_token_ids else stop
        text += detokenizer.finish()
        return Delta(text, ids, scores, event.finish_reason.value, stop_reason, event.prompt_scores)


@dataclass(slots=True)
class Finished:
    """A whole choice."""

    choice: Choice
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenScores] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_scores: TokenScores | None = None

    def add(self, delta: Delta) -> None:
        """Appends a delta."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.scores.append(delta.scores)
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.prompt_scores = delta.prompt_scores or self.prompt_scores

    def all_scores(self) -> TokenScores:
        """The numbers of all tokens; as many rows as tokens, or something was lost."""
        parts = self.scores
        whole = TokenScores(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in TokenScores.__slots__)
        )
        if len(whole.logprob) != len(self.token_ids):
            raise engine_error("The engine returned another number of log-probabilities than of tokens.")
        return whole


async def finish_all(choices: Sequence[Choice], engine: Engine, tokenizer: Tokenizer) -> list[Finished]:
    """Runs all choices of an answer to their ends; the failure of one ends all."""
    results = [Finished(choice) for choice in choices]
    async with aclosing(merge(choices, engine, tokenizer)) as deltas:
        async for choice, delta in deltas:
            results[choice.index].add(delta)
    return results


async def merge(
    choices: Sequence[Choice], engine: Engine, tokenizer: Tokenizer
) -> AsyncGenerator[tuple[Choice, Delta]]:
    """The deltas of all choices as they come, but of a prompt's choices the first one's first: it has the scores."""
    queue: asyncio.Queue[tuple[Choice, Delta] | None] = asyncio.Queue()
    slots = asyncio.Semaphore(_AT_ONCE)
    opened = {choice.prompt_index: asyncio.Event() for choice in choices}

    async def run(choice: Choice) -> None:
        try:
            async with slots, aclosing(choice.deltas(engine, tokenizer)) as deltas:
                async for delta in deltas:
                    if not choice.first:
                        await opened[choice.prompt_index].wait()
                    queue.put_nowait((choice, delta))
                    opened[choice.prompt_index].set()
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(run(choice)) for choice in choices]
    try:
        for _ in tasks:
            while (item := await queue.get()) is not None:
                yield item
            for task in tasks:  # a failure of one ends all
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def make_choices(
    body: GenerationRequest,
    prompts: Sequence[list[int]],
    max_tokens: Sequence[int],
    *,
    score_prompts: bool,
    limits: EngineLimits,
    tokenizer: Tokenizer,
) -> list[Choice]:
    """A choice for each of n answers to each prompt, in the order of their indices.

    Raises:
        APIError: 400 that names a field.
    """
    n = body.n or 1
    eos = frozenset() if body.ignore_eos else tokenizer.eos_token_ids
    stop_ids = eos | frozenset(body.stop_token_ids or ())
    _check_stop_ids(body, stop_ids, limits)
    stop = _stop_strings(body)
    seed = None if body.seed in (None, -1) else body.seed
    temperature = 1.0 if body.temperature is None else body.temperature
    choices = []
    for index in range(len(prompts) * n):
        which, number = divmod(index, n)
        if (body.min_tokens or 0) > max_tokens[which]:
            raise invalid("min_tokens", f"`min_tokens` is above the {max_tokens[which]} tokens that may be generated.")
        params = SamplingParams(
            max_tokens=max_tokens[which],
            temperature=0.0 if temperature < GREEDY_BELOW else max(temperature, 0.01),
            top_k=max(body.top_k or 0, 0),
            top_p=1.0 if body.top_p is None else body.top_p,
            min_p=body.min_p or 0.0,
            seed=None if seed is None else seed + number,
            min_tokens=body.min_tokens or 0,
            stop_token_ids=stop_ids,
            prompt_logprobs=score_prompts and number == 0,
        )
        choices.append(
            Choice(
                index=index,
                request=Request(uuid.uuid4().hex, prompts[which], params),
                stop=stop,
                include_stop=bool(body.include_stop_str_in_output),
                skip_special_tokens=body.skip_special_tokens is not False,
                prompt_index=which,
                eos_token_ids=eos,
                first=number == 0,
            )
        )
    return choices


def _check_stop_ids(body: GenerationRequest, stop_ids: frozenset[int], limits: EngineLimits) -> None:
    if any(token_id >= limits.vocab_size for token_id in body.stop_token_ids or ()):
        raise invalid("stop_token_ids", f"`stop_token_ids` holds an id outside the vocabulary of {limits.vocab_size}.")
    if body.min_tokens and len(stop_ids) > limits.max_banned_ids:
        raise invalid("stop_token_ids", f"With `min_tokens`, at most {limits.max_banned_ids} stop ids are allowed.")


def _stop_strings(body: GenerationRequest) -> tuple[str, ...]:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if "" in stop:
        raise invalid("stop", "`stop` cannot contain an empty string.")
    if len(stop) > _MAX_STOP_STRINGS:
        raise invalid("stop", f"`stop` has more than {_MAX_STOP_STRINGS} strings.", "array_above_max_length")
    if sum(map(len, stop)) > _MAX_STOP_CHARACTERS:
        raise invalid("stop", f"`stop` has more than {_MAX_STOP_CHARACTERS} characters.", "string_above_max_length")
    return stop


def _first_rows(scores: TokenScores, count: int) -> TokenScores:
    return TokenScores(scores.logprob[:count], scores.rank[:count], scores.top_ids[:count], scores.top_logprobs[:count])
