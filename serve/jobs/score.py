"""Scoring: texts to token ids, and token ids to the log-probs of every token."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import batched, takewhile
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.token_logprobs import TokenLogprobs, empty_logprobs
from serve.engine.request import FinishReason, PromptScoring, Request, SamplingParams, TokenEvent
from serve.jobs.request_queue import RequestError, RequestQueue
from serve.jobs.results import Score, token_columns
from serve.text.chat import ChatFormat, PromptError, check_messages, encode_text
from serve.text.tokenizer import Tokenizer

_INT64 = 2**63


@dataclass(frozen=True, slots=True)
class EncodedText:
    token_ids: list[int]  # at least one
    completion_start: int | None = None  # index of the completion's first token, if the text has a completion


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """Encodes strings, token ids, chats, and pairs of a prompt and a completion.

    Errors are PromptErrors that name the text by its path, `param`.
    """

    chats: ChatFormat
    vocab_size: int  # V
    add_special_tokens: bool = True  # around strings; a chat has the template's

    def text(self, value: Any, param: str, tools: Any = None) -> EncodedText:
        """Encode a string, a list of token ids, or the messages of a chat, whose template may use `tools`.

        The last message of a chat is its completion if it is the assistant's and not the only one.
        """
        if isinstance(value, str):
            return _checked(self._encode(value, param), None, param)
        if not is_chat(value):
            return _checked(self._token_ids(value, param), None, param)
        messages = check_messages(value, param=param)
        has_answer = len(messages) > 1 and messages[-1]["role"] == "assistant"
        return self._chat(messages, len(messages) - 1 if has_answer else None, tools, param)

    def pair(self, prompt: Any, completion: Any, params: tuple[str, str], tools: Any = None) -> EncodedText:
        """Encode a prompt and its completion: two strings, two lists of token ids, or two lists of messages.

        A token that spans the end of the prompt and the start of the completion belongs to the completion.
        """
        param, completion_param = params
        if isinstance(prompt, str) and isinstance(completion, str):
            ids = self._encode(prompt + completion, completion_param)
            return _checked(ids, _common_prefix(ids, self._encode(prompt, param)), param)
        if is_chat(prompt) and is_chat(completion):
            messages = check_messages(prompt, param=param)
            return self._chat(
                [*messages, *check_messages(completion, param=completion_param)], len(messages), tools, param
            )
        if isinstance(prompt, list) and isinstance(completion, list):
            ids = self._token_ids(prompt, param)
            return _checked([*ids, *self._token_ids(completion, completion_param)], len(ids), param)
        raise PromptError(param, f"`{param}` and `{completion_param}` must both be strings, token ids or messages.")

    def _chat(
        self, messages: list[dict[str, Any]], completion_start: int | None, tools: Any, param: str
    ) -> EncodedText:
        variables = {"tools": tools} if tools else {}
        text = self.chats.render(messages, variables=variables, add_generation_prompt=False, param=param)
        ids = self.chats.encode(text, param=param)
        if completion_start is None:
            return EncodedText(ids)
        opening = self.chats.render(messages[:completion_start], variables=variables, param=param)
        return _checked(ids, _common_prefix(ids, self.chats.encode(opening, param=param)), param)

    def _encode(self, text: str, param: str) -> list[int]:
        return encode_text(self.chats.tokenizer, text, add_special_tokens=self.add_special_tokens, param=param)

    def _token_ids(self, value: Any, param: str) -> list[int]:
        if not isinstance(value, list):
            message = f"`{param}` must be a string, a list of token ids or a list of messages."
            raise PromptError(param, message, "invalid_type")
        return checked_token_ids(value, self.vocab_size, param)


def checked_token_ids(values: Iterable[Any], vocab_size: int, param: str) -> list[int]:
    """Token ids from integers of any type, such as NumPy's. Raise PromptError for an item that is not a token id."""
    token_ids = []
    for index, value in enumerate(values):
        if isinstance(value, bool) or not (isinstance(value, Integral) or is_huge_integer(value)):
            raise PromptError(f"{param}[{index}]", f"`{param}[{index}]` is not a token id.", "invalid_type")
        token_id = int(value)
        if not 0 <= token_id < vocab_size:
            message = f"`{param}[{index}]`: {token_id} is not in the vocabulary of {vocab_size} tokens."
            raise PromptError(f"{param}[{index}]", message)
        token_ids.append(token_id)
    return token_ids


def is_huge_integer(value: Any) -> bool:
    """True for an integer of more than 64 bits, which a JSON parser returns as a float."""
    return isinstance(value, float) and value.is_integer() and abs(value) >= _INT64


def is_chat(value: Any) -> bool:
    """True for a list whose first item may be a message."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _checked(token_ids: list[int], completion_start: int | None, param: str) -> EncodedText:
    if not token_ids:
        raise PromptError(param, f"`{param}` gives no tokens.")
    if completion_start == len(token_ids):
        raise PromptError(param, "The completion gives no tokens.")
    if completion_start == 0:
        raise PromptError(param, "The prompt gives no tokens, so the completion's first token has no log-prob.")
    return EncodedText(token_ids, completion_start)


def _common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    pairs = zip(ids, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens begin..end-1 of a text, run as one request; those from `first` on are scored."""

    begin: int
    end: int
    first: int


def first_window(tokens: int) -> list[Window]:
    """The window from the start of a text; none for one token, which has no log-prob."""
    return [Window(0, tokens, 1)] if tokens > 1 else []


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    token_ids: list[int]
    windows: Sequence[Window]  # none: no token is scored


def stream_scores[R: ScoreRequest](
    queue: RequestQueue, requests: Iterable[R], alternatives: int
) -> AsyncGenerator[tuple[R, TokenLogprobs | RequestError]]:
    """Score texts at the same time; yield each with its log-probs, in order, or with the engine's error.

    Row i of the log-probs is token i + 1, up to the end of the last window. Raises EngineStoppedError.
    """

    async def run(request: R) -> tuple[R, TokenLogprobs | RequestError]:
        windows = (_score_window(queue, request.token_ids, window, alternatives) for window in request.windows)
        results = await asyncio.gather(*windows, return_exceptions=True)
        for result in results:
            if isinstance(result, RequestError):
                return request, result
            if isinstance(result, BaseException):
                raise result
        logprobs = [result for result in results if isinstance(result, TokenLogprobs)]
        return request, TokenLogprobs.concatenate(logprobs or [empty_logprobs(0, alternatives)])

    return queue.run_in_order(requests, run, lambda request: len(request.token_ids))


async def score_texts(
    queue: RequestQueue, tokenizer: Tokenizer, texts: Sequence[EncodedText], alternatives: int
) -> AsyncGenerator[Score]:
    """Score texts that fit the context, in order. Raises as `stream_scores`, and RequestError for a failed text."""
    requests = [ScoreRequest(text.token_ids, first_window(len(text.token_ids))) for text in texts]
    remaining = enumerate(texts)
    async with aclosing(stream_scores(queue, requests, alternatives)) as results:
        async for request, result in results:
            if isinstance(result, RequestError):
                raise result
            index, text = next(remaining)
            columns = token_columns(tokenizer, request.token_ids, result, starts_sequence=True)
            yield Score(index=index, completion_start=text.completion_start, **columns)


async def _score_window(queue: RequestQueue, token_ids: list[int], window: Window, alternatives: int) -> TokenLogprobs:
    prompt = token_ids[window.begin : window.end]
    start = window.first - window.begin
    request = Request(uuid.uuid4().hex, prompt, SamplingParams(max_tokens=0, prompt=PromptScoring(start)))
    event = await _scored(queue, request)
    logprobs = event.prompt_logprobs
    if logprobs is None or len(logprobs.logprob) != len(prompt) - 1:
        raise RequestError("the engine failed: the number of log-probs does not match the number of tokens")
    return checked_logprobs(logprobs[start - 1 :], alternatives)


@dataclass(frozen=True, slots=True, eq=False)
class Continuation:
    """Log-probs of N tokens after a prompt, with the requested ids as alternatives."""

    logprobs: TokenLogprobs  # [N]
    cached_tokens: int  # of the prompt


async def score_continuation(
    queue: RequestQueue, prompt: Sequence[int], token_ids: Sequence[int], requested_ids: tuple[int, ...] = ()
) -> Continuation:
    """Score `token_ids`, at least one, after a prompt in one engine request.

    Raises as `RequestQueue.events`, and RequestError if a log-prob is NaN.
    """
    params = SamplingParams(max_tokens=0, prompt=PromptScoring(len(prompt), requested_ids))
    event = await _scored(queue, Request(uuid.uuid4().hex, [*prompt, *token_ids], params))
    rows = None if event.prompt_logprobs is None else event.prompt_logprobs[len(prompt) - 1 :]
    if rows is None or len(rows.logprob) != len(token_ids) or rows.top_logprobs.shape[1] < len(requested_ids):
        raise RequestError("the engine failed: the number of log-probs does not match the number of tokens")
    return Continuation(checked_logprobs(rows, len(requested_ids)), min(event.cached_tokens, len(prompt)))


@dataclass(frozen=True, slots=True, eq=False)
class NextTokens:
    """Log-probs of L tokens after a prompt, over the full vocabulary."""

    logprobs: NDArray[np.float32]  # [L]
    ranks: NDArray[np.int32]  # [L]
    cached_tokens: int  # of the prompt


async def score_next_tokens(
    queue: RequestQueue, prompt: Sequence[int], token_ids: Sequence[int], max_requested_ids: int
) -> NextTokens:
    """Score `token_ids`, at least one, after a prompt: one engine request per `max_requested_ids` of them.

    Raises as `RequestQueue.events`, and RequestError if a log-prob is NaN.
    """
    # The row of the first token, which follows the prompt, is of the distribution that is asked for.
    parts = [
        await score_continuation(queue, prompt, requested[:1], requested)
        for requested in batched(token_ids, max_requested_ids, strict=False)
    ]
    return NextTokens(
        np.concatenate([part.logprobs.top_logprobs[0] for part in parts]),
        np.concatenate([part.logprobs.top_ranks[0] for part in parts]),
        parts[0].cached_tokens,
    )


async def _scored(queue: RequestQueue, request: Request) -> TokenEvent:
    """The event of a request that generates nothing."""
    async with aclosing(queue.events(request)) as events:
        event = await anext(events)
    if event.finish_reason is not FinishReason.LENGTH:
        raise RequestError("the engine failed: it did not finish the request")
    return event


def checked_logprobs(logprobs: TokenLogprobs, alternatives: int) -> TokenLogprobs:
    """Copies of the log-probs with the first `alternatives` columns. Raise RequestError if a log-prob is NaN."""
    copy = logprobs.map(lambda column: column[:, :alternatives].copy() if column.ndim > 1 else column.copy())
    if not ((copy.logprob < np.inf).all() and (copy.top_logprobs < np.inf).all()):
        raise RequestError("the engine failed: a log-prob is NaN")
    return copy
