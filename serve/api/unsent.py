"""Unsent: the memory of one answer from its generation until it is sent."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from serve.api.errors import APIError, invalid
from serve.api.generation import Choice
from serve.api.request_body import SMALL, Holding
from serve.api.validation import PromptLogprobs
from serve.config.config import ServeConfig
from serve.engine.request import EngineLimits
from serve.jobs.output import Output

_DEFAULT_BYTES = 1 << 30
_BATCH = 256 << 10  # bytes of choices that are rendered together
# Bytes in memory, of arrays and of JSON.
_ARRAYS = 12  # of a log-prob: float32, id, rank
_JSON = 100  # of a log-prob
_TOKEN = 64  # id and text
_ID, _CHARACTER = 8, 2  # of a repeated prompt, as JSON
_EXPERT_ARRAY, _EXPERT_JSON = 2, 3  # of an expert's id: int16, base64
_VOCAB_ROW = 100  # of each token in a row of the full vocabulary: JSON, and eight rows of float32


def unsent_bytes(config: ServeConfig, limits: EngineLimits) -> int:
    """Bytes of all unsent answers.

    Raises:
        ValueError: the option is too small for one key's answer of full length.
    """
    width = limits.max_logprobs + 1
    token = _TOKEN + (_ARRAYS + _JSON) * width + (_EXPERT_ARRAY + _EXPERT_JSON) * math.prod(limits.routing or (0,))
    least = 2 * min(limits.max_model_len, limits.cache_tokens) * token
    if limits.full_vocab:
        least += 2 * _VOCAB_ROW * limits.vocab_size
    if config.max_unsent_bytes is None:
        return max(_DEFAULT_BYTES, least)
    if config.max_unsent_bytes < least:
        raise ValueError(
            f"argument --max-unsent-bytes: {config.max_unsent_bytes} is less than {least}, the bytes of two answers of "
            f"full length with {limits.max_logprobs} alternatives per token"
        )
    return config.max_unsent_bytes


@dataclass(slots=True)
class Unsent:
    """Counts the memory of one answer in the budget; see `Handler` for its life.

    A JSON answer has the arrays of all its choices and the JSON of one. The unread deltas of a stream are counted by
    `merge`, in a holding of their own.
    """

    holding: Holding
    choices: Sequence[Choice]
    requested: PromptLogprobs  # of the prompts
    limits: EngineLimits
    repeats: bool  # every choice contains the log-probs and, with `token_ids`, the ids of its prompt
    token_ids: bool
    stream: bool
    fixed_length: bool  # no stop string can end a choice
    _arrays: int = field(default=0, init=False)  # bytes
    _json: int = field(default=0, init=False)  # bytes of the largest choice so far
    _reserved: int = field(default=0, init=False)  # bytes that the answer will certainly need

    def reserve(self) -> None:
        """Hold what the answer needs in any case.

        Raises:
            APIError: 400 if it is more than the budget, 429 if there is no room for it now.
        """
        self._arrays = self._prompt_bytes()
        least, most = self._arrays, self._arrays
        if not self.stream:
            for choice in self.choices:
                params = choice.request.params
                fixed = self.fixed_length and not params.stop_token_ids
                least += self._choice_bytes(choice, params.max_tokens if fixed else params.min_tokens)
                most += self._choice_bytes(choice, params.max_tokens)
        self._reserved = max(least, min(most, SMALL + 1))  # a large answer needs room, however little
        self._hold(0)

    def add(self, choice: Choice, output: Output, delta: Output) -> None:
        """Count `delta`, which `output` of that choice contains now. Raises APIError as `reserve`."""
        self._arrays += delta.nbytes
        self._json = max(self._json, self._json_bytes(choice, len(output.token_ids)))
        self._hold(self._arrays + self._json)

    def batches(self, outputs: Sequence[Output]) -> Iterator[list[tuple[Choice, Output]]]:
        """The choices of a finished answer, split where the JSON of a batch becomes large."""
        batch: list[tuple[Choice, Output]] = []
        size = 0
        for choice, output in zip(self.choices, outputs, strict=True):
            batch.append((choice, output))
            size += self._json_bytes(choice, len(output.token_ids))
            if size > _BATCH:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def size_of(self, batch: Sequence[tuple[Choice, Output]]) -> int:
        """Bytes of a batch that has not been rendered."""
        return sum(self._choice_bytes(choice, len(output.token_ids)) for choice, output in batch)

    def _hold(self, size: int) -> None:
        size = max(size, self._reserved)
        if self.holding.resize(size):
            return
        if size <= self.holding.limit:
            message = "Too many answers are waiting to be sent. Read them, or try again later."
            raise APIError(429, message, None, "unsent_answers", {"Retry-After": "1"})
        param = "n" if len(self.choices) > 1 else "max_tokens"
        message = (
            f"The answer needs {size} bytes of memory, more than the maximum of {self.holding.limit} "
            "(--max-unsent-bytes): request fewer tokens, choices or log-probs, or stream."
        )
        raise invalid(param, message, "answer_too_large")

    def _prompt_bytes(self) -> int:
        """The prompts' log-probs, and what is written of them at a time."""
        requested, prompts = self.requested, {choice.prompt for choice in self.choices}
        if requested.scoring is None:
            return 0
        width = (len(requested.scoring.requested_ids) or self.limits.max_logprobs) + 1
        numbers = sum(len(prompt.ids) - requested.start for prompt in prompts) * width
        vocabulary = self.limits.vocab_size * _VOCAB_ROW if requested.full_vocab else 0
        return numbers * (_ARRAYS + (_JSON if requested.columns else 0)) + vocabulary

    def _choice_bytes(self, choice: Choice, tokens: int) -> int:
        alternatives = len(choice.request.params.requested_ids) or self.limits.max_logprobs
        own = tokens * (_TOKEN + (0 if choice.alternatives is None else _width(alternatives)) * _ARRAYS)
        return own + _EXPERT_ARRAY * self._experts(choice, tokens)

    def _json_bytes(self, choice: Choice, tokens: int) -> int:
        requested = self.requested
        repeated = requested.k if self.repeats and not requested.full_vocab else None
        width, prompt_width = _width(choice.alternatives), _width(repeated) + _width(requested.echo_k)
        prompt = len(choice.prompt.ids) * (prompt_width * _JSON + (_ID if self.token_ids and self.repeats else 0))
        own = tokens * (_TOKEN + width * _JSON) + _EXPERT_JSON * self._experts(choice, tokens)
        return own + prompt + len(choice.prompt.echo.text) * _CHARACTER

    def _experts(self, choice: Choice, tokens: int) -> int:
        """Number of ids of experts in a choice with `tokens` generated tokens."""
        start = choice.request.params.experts_start
        if start is None or self.limits.routing is None:
            return 0
        return (len(choice.prompt.ids) - start + tokens) * math.prod(self.limits.routing)


def _width(alternatives: int | None) -> int:
    return 0 if alternatives is None else alternatives + 1
