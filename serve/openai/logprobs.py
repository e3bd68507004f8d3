"""Log-prob objects of the wire. Numbers stay float32 until orjson prints their shortest form: one path for all.

lm-eval compares `token_logprobs[i]` with the values of `top_logprobs[i]` for equality, so both must come out alike.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.engine.request import TokenScores
from serve.text.token_strings import decoded_tokens
from serve.text.tokenizer import Tokenizer

_LOWEST = np.float32(-9999.0)  # what OpenAI writes for a token of probability 0; JSON has no infinity


@dataclass(frozen=True, slots=True)
class TokenNames:
    """How tokens are written: as text, or as `token_id:123`."""

    tokenizer: Tokenizer
    as_ids: bool

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_ids else self.tokenizer.token_text(token_id)


def clamped(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probs with -inf as -9999."""
    return np.maximum(values, _LOWEST)


def chat_content(names: TokenNames, token_ids: Sequence[int], scores: TokenScores, k: int) -> list[dict[str, Any]]:
    """`logprobs.content` of chat: an entry per token, with the k most likely tokens, best first.

    `token_id` and `rank` are ours: distinct tokens can read alike.
    """
    logprobs, tops = clamped(scores.logprob), clamped(scores.top_logprobs)
    return [
        _chat_entry(names, token_id, logprobs[i], int(scores.rank[i]))
        | {"top_logprobs": [_chat_entry(names, int(scores.top_ids[i, j]), tops[i, j], j + 1) for j in range(k)]}
        for i, token_id in enumerate(token_ids)
    ]


def _chat_entry(names: TokenNames, token_id: int, logprob: np.float32, rank: int) -> dict[str, Any]:
    return {
        "token": names(token_id),
        "logprob": logprob,
        "bytes": list(names.tokenizer.token_bytes(token_id)),
        "token_id": token_id,
        "rank": rank,
    }


def prompt_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], scores: TokenScores, k: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: null for the first token, then the actual token's entry and the k best beside it."""
    logprobs, tops = clamped(scores.logprob), clamped(scores.top_logprobs)
    result: list[dict[str, dict[str, Any]] | None] = [None]
    for i, actual in enumerate(token_ids[1:]):
        numbers = {actual: (logprobs[i], int(scores.rank[i]))}
        for j in range(k):
            numbers.setdefault(int(scores.top_ids[i, j]), (tops[i, j], j + 1))
        decoded = decoded_tokens(tokenizer, token_ids[max(0, i - 3) : i + 1], list(numbers))
        result.append(
            {
                str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": name}
                for (token_id, (logprob, rank)), name in zip(numbers.items(), decoded, strict=True)
            }
        )
    return result


class CompletionLogprobs:
    """Makes the legacy completions `logprobs` object, in one piece or chunk by chunk."""

    def __init__(self, names: TokenNames, k: int, *, skip_special_tokens: bool) -> None:
        self._names = names
        self._k = k
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # code points of the returned text before the next token

    def echo(self, token_ids: Sequence[int], scores: TokenScores, *, hidden: frozenset[int]) -> dict[str, Any]:
        """The prompt's tokens: the first has no number. Tokens in `hidden` (an added BOS) take no room in the text."""
        rows = [self._row(token_ids[0], hidden, None, None, 0)]
        rows += [
            self._row(token, hidden, scores, clamped(scores.logprob)[i], i) for i, token in enumerate(token_ids[1:])
        ]
        return _columns(rows)

    def output(self, token_ids: Sequence[int], scores: TokenScores, *, hidden: frozenset[int]) -> dict[str, Any]:
        """Generated tokens."""
        logprobs = clamped(scores.logprob)
        return _columns([self._row(token, hidden, scores, logprobs[i], i) for i, token in enumerate(token_ids)])

    def _row(
        self, token_id: int, hidden: frozenset[int], scores: TokenScores | None, logprob: np.float32 | None, i: int
    ) -> tuple[str, np.float32 | None, dict[str, np.float32] | None, int, list[int] | None]:
        offset = self._offset
        special = self._skip_special_tokens and self._names.tokenizer.is_special(token_id)
        if token_id not in hidden and not special:
            self._offset += len(self._decoder.decode(self._names.tokenizer.token_bytes(token_id)))
        if scores is None or logprob is None:
            return self._names(token_id), None, None, offset, None
        top = {self._names(token_id): logprob}
        tops = clamped(scores.top_logprobs[i])
        for j in range(self._k):
            # Distinct tokens that read alike share a key: the higher value stays, and top_token_ids tells them apart.
            name = self._names(int(scores.top_ids[i, j]))
            top[name] = max(top.get(name, _LOWEST), tops[j])
        return self._names(token_id), logprob, top, offset, scores.top_ids[i, : self._k].tolist()


def _columns(rows: list[Any]) -> dict[str, Any]:
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "top_token_ids")
    return (
        dict(zip(names, (list(column) for column in zip(*rows, strict=True)), strict=True))
        if rows
        else {name: [] for name in names}
    )


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several column objects as one."""
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}
