"""Run the choices of a request in the engine and turn their events into text with log-probs."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from model.token_logprobs import TokenLogprobs
from serve.api.errors import APIError, engine_error, shutting_down
from serve.api.logprobs import CompletionLogprobs, wire_logprobs
from serve.api.middleware import Work
from serve.api.reply import ReplyWriter
from serve.api.request_body import Holding
from serve.api.requests import GenerationRequest
from serve.engine.client import EngineClient, RequestHandle
from serve.engine.request import (
    DeadlineError,
    EngineStoppedError,
    FinishReason,
    QueueFullError,
    QueueTimeoutError,
    Request,
    TokenEvent,
)
from serve.jobs.output import Output, OutputDecoder
from serve.text.detokenizer import Echo
from serve.tools.reply import ReplyFormat

_DELTA = 1 << 10  # bytes of a delta's objects
_MAX_ADMITTED = 64  # choices of one HTTP request in the engine; a long list of prompts must not fill the queue


@dataclass(eq=False, slots=True)
class Prompt:
    """A tokenized prompt, and its log-probs once its first choice has them."""

    ids: list[int]
    max_tokens: int  # to generate
    text: str = ""  # of a chat, for `prompt_text`
    echo: Echo = field(default_factory=Echo)  # precedes the output
    reply: ReplyFormat | None = None  # how its output is divided; None: all is content
    full_vocab_request: Request | None = None  # for log-probs over the full vocabulary, if they are requested
    token_logprobs: TokenLogprobs | None = None  # [len(ids) - 1], of every token but the first

    def logprobs(self, k: int, start: int) -> TokenLogprobs:
        """Log-probs of the tokens from `start` on, with k alternatives each; checked as in `wire_logprobs`."""
        if self.token_logprobs is None:
            raise engine_error("The engine returned no log-probabilities of the prompt.")
        return wire_logprobs(self.token_logprobs, len(self.ids) - 1, k, first=start - 1)


@dataclass(slots=True)
class Choice:
    """One choice: its engine request, and how the tokens become text."""

    index: int
    prompt: Prompt
    request: Request
    make_decoder: Callable[[Prompt], OutputDecoder]
    is_first_of_prompt: bool  # the choice whose request scores the prompt
    alternatives: int | None  # per generated token; None without log-probs
    handle: RequestHandle | None = None  # once it is admitted
    num_tokens: int = 0  # generated so far
    num_experts: int = 0  # tokens whose experts have been rendered
    columns: CompletionLogprobs | None = None  # of a completion whose first delta has been rendered
    writer: ReplyWriter | None = None  # of a chat with a reply format whose first delta has been rendered

    def admit(self, engine: EngineClient, *, bypass_limits: bool) -> None:
        """Queue the request if it is not admitted yet, see `Engine.admit`."""
        if self.handle is None:
            self.handle = engine.admit(self.request, bypass_limits=bypass_limits)

    def abort(self) -> None:
        if self.handle is not None:
            self.handle.abort()

    async def deltas(self) -> AsyncGenerator[Output]:
        """The admitted request's events as text; the last delta has a finish reason.

        Raises:
            APIError: 500, the engine failed on the request.
            QueueTimeoutError, DeadlineError, EngineStoppedError: see `RequestHandle`.
        """
        assert self.handle is not None
        decoder = self.make_decoder(self.prompt)
        async for event in self.handle:
            check_event(event)
            delta = decoder.output(event)
            if delta.prompt_logprobs is not None:
                self.prompt.token_logprobs = delta.prompt_logprobs
            if self.alternatives is None:
                delta.logprobs, delta.processed, delta.allowed_mass, delta.forced = [], [], [], []
            self.num_tokens += len(delta.token_ids)
            if decoder.found_stop:
                self.handle.abort(FinishReason.STOP)
            yield delta
            if delta.finish_reason is not None:
                return


def output_logprobs(output: Output, alternatives: int) -> TokenLogprobs:
    """Log-probs of the tokens of an output, checked as in `wire_logprobs`."""
    return wire_logprobs(output.all_logprobs(alternatives), len(output.token_ids), alternatives)


class Unread:
    """The deltas of a stream that wait for its reader, limited in number and memory."""

    def __init__(self, max_deltas: int, holding: Holding) -> None:
        self._max_deltas = max_deltas
        self._holding = holding
        self._count = 0

    def put(self, delta: Output) -> None:
        """Raise APIError 503 if there is no room for a delta."""
        if self._count >= self._max_deltas or not self._holding.resize(self._holding.size + _DELTA + delta.nbytes):
            message = "The answer was read too slowly: too many of its tokens were waiting to be sent."
            raise APIError(503, message, None, "slow_reader")
        self._count += 1

    def take(self, delta: Output) -> None:
        self._count -= 1
        self._holding.resize(self._holding.size - _DELTA - delta.nbytes)

    def close(self) -> None:
        self._holding.close()


async def merge(
    choices: Sequence[Choice], engine: EngineClient, unread: Unread | None = None
) -> AsyncGenerator[tuple[Choice, Output]]:
    """Run all choices and yield their deltas as they arrive; the first delta of a prompt is one of its first choice.

    All choices are aborted if one fails, or if `unread` has no room for a delta. The reader gets the error after the
    deltas before it.

    Raises:
        QueueFullError: the first choice finds the queue full.
        APIError, QueueTimeoutError, DeadlineError, EngineStoppedError: see `Choice.deltas`; 503 for a slow reader.
    """
    queue: asyncio.Queue[tuple[Choice, Output] | Exception | None] = asyncio.Queue()  # None: all choices have finished
    opened = {choice.prompt: asyncio.Event() for choice in choices}

    async def forward(choice: Choice) -> None:
        async with aclosing(choice.deltas()) as deltas:
            async for delta in deltas:
                if not choice.is_first_of_prompt:
                    await opened[choice.prompt].wait()
                if unread is not None:
                    unread.put(delta)
                queue.put_nowait((choice, delta))
                opened[choice.prompt].set()

    async def run() -> None:
        try:
            await _run_all(choices, engine, forward)
        except ExceptionGroup as group:
            queue.put_nowait(group.exceptions[0])  # for the reader, after the deltas before it
        queue.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            if unread is not None:
                unread.take(item[1])
            yield item
    finally:
        if unread is not None:
            unread.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _run_all(
    choices: Sequence[Choice], engine: EngineClient, run: Callable[[Choice], Coroutine[Any, Any, None]]
) -> None:
    """Admit the choices in order, at most `_MAX_ADMITTED` at once, and run each one.

    A full queue rejects only the first choice, when no work is lost. Later ones wait until a running choice of the same
    request finishes, or bypass the limits of the queue if none is running. Their order matters: a choice waits for the
    first one of its prompt, which must not wait behind it.
    """
    running: set[asyncio.Task[None]] = set()

    def try_admit(choice: Choice) -> bool:
        is_first = choice is choices[0]
        try:
            choice.admit(engine, bypass_limits=not running and not is_first)
        except QueueFullError:
            if is_first:
                raise
            return False
        return True

    try:
        async with asyncio.TaskGroup() as group:
            for choice in choices:
                while len(running) == _MAX_ADMITTED or not try_admit(choice):
                    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                task = group.create_task(run(choice))
                running.add(task)
                task.add_done_callback(running.discard)
    finally:
        for choice in choices:
            choice.abort()


def work_of(choices: Sequence[Choice]) -> Work:
    """The engine's work for choices that have finished or were aborted."""
    scoring = [choice for choice in choices if choice.is_first_of_prompt]
    handles = [choice.handle for choice in choices if choice.handle is not None]
    started = [handle.times for handle in handles if handle.times.scheduled]
    ended = [times for times in started if times.last]
    return Work(
        prompt_tokens=sum(len(choice.request.prompt_token_ids) for choice in scoring),
        cached_tokens=sum(choice.handle.cached_tokens for choice in scoring if choice.handle is not None),
        completion_tokens=sum(choice.num_tokens for choice in choices),
        queue_seconds=max((times.scheduled - times.arrived for times in started), default=None),
        prefill_seconds=max(((times.first or times.last) - times.scheduled for times in ended), default=None),
        decode_seconds=max((times.last - times.first for times in ended if times.first), default=None),
        first_token_seconds=min((times.first - times.arrived for times in started if times.first), default=None),
    )


def span_attributes(body: GenerationRequest, header: Mapping[str, Any], *, operation: str) -> dict[str, Any]:
    """Attributes of a request's span; those without a value are None."""
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "logprobd",
        "gen_ai.request.model": body.model or header["model"],
        "gen_ai.request.choice.count": body.n,
        "gen_ai.request.max_tokens": body.max_tokens,
        "gen_ai.request.temperature": body.temperature,
        "gen_ai.request.top_p": body.top_p,
        "gen_ai.response.id": header["id"],
        "gen_ai.response.model": header["model"],
    }


def check_event(event: TokenEvent) -> None:
    """Raise APIError for an event that reports a failure: 400 if the request's grammar is its cause, else 500."""
    if event.grammar_failed:
        raise APIError(400, f"The output cannot continue: {event.error}.", None, "grammar_error")
    if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
        raise engine_error(f"The engine failed: {event.error}." if event.error else "The request was aborted.")


@contextmanager
def engine_errors(on_rejected: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Turn the engine's exceptions into APIErrors; `on_rejected` gets the name of the limit when the queue is full."""
    try:
        yield
    except QueueFullError as error:
        on_rejected(error.limit)
        message = "Too many requests are waiting. Try again later."
        raise APIError(429, message, None, "rate_limit_exceeded", {"Retry-After": "1"}) from None
    except QueueTimeoutError:
        message = "The request timed out in the queue. Try again later."
        raise APIError(503, message, None, "queue_timeout", {"Retry-After": "1"}) from None
    except DeadlineError:
        message = "The request did not finish within its timeout."
        raise APIError(504, message, "timeout", "deadline_exceeded") from None
    except EngineStoppedError:
        raise shutting_down() from None
