"""Probabilities of given tokens after a prompt: POST /v1/score (SGLang's) and /generative_scoring (vLLM's)."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from model.token_logprobs import clamp_logprobs
from serve.api.context import Context
from serve.api.errors import APIError, engine_error, invalid
from serve.api.generation import engine_errors
from serve.api.job import usage
from serve.api.json_stream import Body, make_body
from serve.api.middleware import AnswerRecord, record_of
from serve.api.parsing import validate
from serve.api.request_body import Holding, json_object
from serve.api.request_group import RequestGroup
from serve.api.requests import GenerativeScoringRequest, RequestFields, ScoreRequest
from serve.api.sse import json_or_disconnect
from serve.api.validation import check_cache_salt, check_ids, check_size, served_name
from serve.engine.request import EngineLimits
from serve.jobs.generate import check_text_length
from serve.jobs.request_queue import RequestError
from serve.jobs.score import NextTokens, score_next_tokens
from serve.text.chat import encode_text

logger = logging.getLogger(__name__)

_MAX_ITEMS = 4096
_MAX_PROMPT_TOKENS = 4 << 20  # of all items, at 4 bytes each
_MAX_SCORES = 4 << 20
_SCORE_BYTES = 25  # of JSON


@dataclass(frozen=True, slots=True)
class ScoringJob:
    group: RequestGroup
    prompt_tokens: int
    answer_bytes: int  # an upper bound
    run: Callable[[], Awaitable[Any]]  # raises RequestError and the exceptions of the engine
    render: Callable[[Any], dict[str, Any]]  # the answer of what `run` returns; slow, for a thread


class ScoringHandler[B: RequestFields](ABC):
    """An endpoint that scores prompts: read, validate, tokenize, run, render. It has no streams."""

    model: type[B]  # of the request body
    operation: str  # in traces

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, request: HTTPRequest) -> Response:
        record = record_of(request)
        async with self._context.bodies.read(request) as data:
            job = await asyncio.to_thread(self._prepare, data, record)
        del data  # not needed while the prompts are scored
        try:
            record.charge(job.prompt_tokens)
        except APIError as error:
            error.param = None  # there is no `max_tokens`
            raise
        record.measure = partial(job.group.work, job.prompt_tokens)
        holding = Holding(self._context.unsent, record.key)
        try:
            _reserve(holding, job.answer_bytes)
            return await json_or_disconnect(request, self._answer(job), holding.close)
        except BaseException:
            holding.close()
            raise

    def _prepare(self, data: bytes, record: AnswerRecord) -> ScoringJob:
        """Validate and tokenize a request. Slow: run it in a thread."""
        context, config = self._context, self._context.config
        body = self._validate(self._parse(data))
        name = served_name(body.model, context.model.names)
        record.generation = {
            "gen_ai.operation.name": self.operation,
            "gen_ai.provider.name": "logprobd",
            "gen_ai.request.model": body.model or name,
            "gen_ai.response.model": name,
        }
        if config.enable_log_requests:
            fields = repr(body.model_dump(exclude_none=True))[: config.max_log_len]
            logger.warning("request %s: %s %s", record.request_id, self.operation, fields)
        return self._job(body, name, record)

    def _parse(self, data: bytes) -> dict[str, Any]:
        return json_object(data)

    def _validate(self, values: dict[str, Any]) -> B:
        body = validate(self.model, values, self._context.unknown_fields)
        check_cache_salt("cache_salt", body.cache_salt)
        return body

    async def _answer(self, job: ScoringJob) -> Body:
        with engine_errors(self._context.metrics.on_rejected):
            try:
                result = await job.run()
            except RequestError as error:
                raise engine_error(f"{str(error).capitalize()}.") from None
        return await asyncio.to_thread(lambda: make_body(job.render(result)))

    @abstractmethod
    def _job(self, body: B, name: str, record: AnswerRecord) -> ScoringJob:
        """Tokenize a request. `name` is the model's in the answer."""


def _reserve(holding: Holding, size: int) -> None:
    """Raise APIError 400 for an answer that is larger than the budget, 429 if there is no room for it now."""
    if holding.resize(size):
        return
    if size <= holding.limit:
        message = "Too many answers are waiting to be sent. Read them, or try again later."
        raise APIError(429, message, None, "unsent_answers", {"Retry-After": "1"})
    message = f"The answer may need {size} bytes of memory, more than the maximum of {holding.limit}"
    raise invalid(None, f"{message} (--max-unsent-bytes): send fewer per request.", "answer_too_large")


@dataclass(frozen=True, slots=True)
class _Scored:
    """The scores of all items, in their order."""

    probabilities: list[list[float]]
    logprobs: list[NDArray[np.float32]]
    cached_tokens: int


class _LabelScoring[B: (ScoreRequest, GenerativeScoringRequest)](ScoringHandler[B]):
    applies_softmax: bool  # by default
    operation = "score"

    def _job(self, body: B, name: str, record: AnswerRecord) -> ScoringJob:
        limits = self._context.engine.limits
        items: Sequence[str | list[int]] = [body.items] if isinstance(body.items, str) else body.items
        if len(items) > _MAX_ITEMS:
            message = f"`items` has {len(items)} entries, more than the maximum of {_MAX_ITEMS}."
            raise invalid("items", message, "array_above_max_length")
        temperature, labels = self._temperature(body), self._labels(body, len(items))
        scores = sum(map(len, labels))
        if scores > _MAX_SCORES:
            message = f"The answer would contain {scores} scores, more than the maximum of {_MAX_SCORES}."
            raise invalid("label_token_ids", message, "too_many_logprobs")
        prompts: list[array[int]] = []
        total = 0
        for i, ids in enumerate(self._prompts(body, items)):
            check_scored_length(f"items[{i}]", f"Item {i} with the query", len(ids), limits)
            total += len(ids)
            if total > max(_MAX_PROMPT_TOKENS, 2 * limits.max_model_len):
                message = f"The prompts of `items` have more than {_MAX_PROMPT_TOKENS} tokens: send fewer per request."
                raise invalid("items", message, "array_above_max_length")
            prompts.append(array("i", ids))
        group = RequestGroup(self._context, record, body, body.cache_salt)
        width = 2 if body.return_token_logprobs else 1

        def render(scored: _Scored) -> dict[str, Any]:
            counts = usage(total, 0, scored.cached_tokens)
            return self._render(body, scored, {"model": name, "usage": counts}, record)

        run = partial(self._score, temperature, group, prompts, labels)
        return ScoringJob(group, total, (scores * width + len(items)) * _SCORE_BYTES, run, render)

    async def _score(
        self,
        temperature: float | None,
        group: RequestGroup,
        prompts: Sequence[array[int]],
        labels: Sequence[Sequence[int]],
    ) -> _Scored:
        limit = self._context.engine.limits.max_requested_ids

        async def score(pair: tuple[array[int], Sequence[int]]) -> NextTokens:
            return await score_next_tokens(group, pair[0].tolist(), pair[1], limit)

        scored = _Scored([], [], 0)
        pairs = zip(prompts, labels, strict=True)
        cached = 0
        async with aclosing(group.run_in_order(pairs, score, lambda pair: len(pair[0]))) as results:
            async for result in results:
                cached += result.cached_tokens
                logprobs = clamp_logprobs(result.logprobs)
                values = logprobs.astype(np.float64)
                values = np.exp(values) if temperature is None else _softmax(values / temperature)
                scored.probabilities.append(values.tolist())
                scored.logprobs.append(logprobs)
        return replace(scored, cached_tokens=cached)

    def _temperature(self, body: B) -> float | None:
        """Of the softmax that makes the labels' probabilities sum to 1; None: they are of the full vocabulary."""
        if self.applies_softmax if body.apply_softmax is None else body.apply_softmax:
            return body.temperature or 1.0
        if body.temperature not in (None, 1):
            raise invalid("temperature", "`temperature` needs `apply_softmax` to be true.")
        return None

    def _labels(self, body: B, items: int) -> list[list[int]]:
        """The label ids of each item."""
        values: Any = body.label_token_ids
        per_item = bool(values) and isinstance(values[0], list)
        if per_item and len(values) != items:
            message = (
                f"`label_token_ids` has {len(values)} lists for {items} items; send one per item, or one list of ids."
            )
            raise invalid("label_token_ids", message)
        for i, ids in enumerate(values if per_item else [values]):
            param = f"label_token_ids[{i}]" if per_item else "label_token_ids"
            if not ids:
                raise invalid(param, f"`{param}` must contain at least one id.", "empty_array")
            if len(set(ids)) != len(ids):
                raise invalid(param, f"`{param}` contains a duplicate id.")
            check_ids(param, ids, self._context.engine.limits)
        return values if per_item else [values] * items

    def _encode(self, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
        tokenizer, limits = self._context.model.tokenizer, self._context.engine.limits
        check_text_length(param, text, tokenizer, limits)
        check_size(param, text, limits)
        return encode_text(tokenizer, text, add_special_tokens=add_special_tokens, param=param)

    def _checked_ids(self, ids: list[int], param: str) -> list[int]:
        check_ids(param, ids, self._context.engine.limits)
        return ids

    @abstractmethod
    def _prompts(self, body: B, items: Sequence[str | list[int]]) -> Iterator[list[int]]:
        """The token ids of each item with the query."""

    @abstractmethod
    def _render(self, body: B, scored: _Scored, header: dict[str, Any], record: AnswerRecord) -> dict[str, Any]: ...


class Score(_LabelScoring[ScoreRequest]):
    """SGLang's: texts are joined before they are tokenized, and probabilities are of the full vocabulary by default."""

    model = ScoreRequest
    applies_softmax = False

    def _prompts(self, body: ScoreRequest, items: Sequence[str | list[int]]) -> Iterator[list[int]]:
        query = body.query
        for i, item in enumerate(items):
            if isinstance(item, str) and (query is None or isinstance(query, str)):
                texts = (item, query or "") if body.item_first else (query or "", item)
                yield self._encode("".join(texts), f"items[{i}]")
            elif isinstance(item, list) and (query is None or isinstance(query, list)):
                ids = (item, query or []) if body.item_first else (query or [], item)
                yield self._checked_ids([*ids[0], *ids[1]], f"items[{i}]")
            else:
                raise invalid("items", "`query` and `items` must both be texts, or both token ids.", "invalid_type")

    def _render(
        self, body: ScoreRequest, scored: _Scored, header: dict[str, Any], record: AnswerRecord
    ) -> dict[str, Any]:
        del record
        logprobs = scored.logprobs if body.return_token_logprobs else None
        return {"object": "scoring", "scores": scored.probabilities, "token_logprobs": logprobs} | header


class GenerativeScoring(_LabelScoring[GenerativeScoringRequest]):
    """vLLM's: query and items are tokenized apart, and the labels' probabilities sum to 1 by default."""

    model = GenerativeScoringRequest
    applies_softmax = True

    def _prompts(self, body: GenerativeScoringRequest, items: Sequence[str | list[int]]) -> Iterator[list[int]]:
        query, special = body.query, body.add_special_tokens is not False
        head = self._encode(query, "query", add_special_tokens=special) if isinstance(query, str) else query
        self._checked_ids(head, "query")
        for i, item in enumerate(items):
            tail = self._encode(item, f"items[{i}]", add_special_tokens=False) if isinstance(item, str) else item
            self._checked_ids(tail, f"items[{i}]")
            yield [*tail, *head] if body.item_first else [*head, *tail]

    def _render(
        self, body: GenerativeScoringRequest, scored: _Scored, header: dict[str, Any], record: AnswerRecord
    ) -> dict[str, Any]:
        data = [
            {"index": i, "object": "score", "score": probabilities[0]}
            | ({"probabilities": probabilities, "token_logprobs": logprobs} if body.return_token_logprobs else {})
            for i, (probabilities, logprobs) in enumerate(zip(scored.probabilities, scored.logprobs, strict=True))
        ]
        start = {"id": f"generative-scoring-{body.request_id or record.request_id}", "object": "list"}
        return start | {"created": int(time.time()), "data": data} | header


def check_scored_length(param: str, subject: str, tokens: int, limits: EngineLimits) -> None:
    """Refuse a prompt that is empty, or after which no token fits. `subject` names it in the message."""
    if not tokens:
        raise invalid(param, f"{subject} gives no tokens.")
    maximum = min(limits.max_model_len, limits.cache_tokens) - 1
    if tokens > maximum:
        message = f"{subject} has {tokens} tokens, more than the maximum of {maximum} before the token that is scored."
        raise invalid(param, message, "context_length_exceeded")


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(values - values.max())
    return np.asarray(weights / weights.sum())
