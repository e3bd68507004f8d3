"""Log-prob objects of the wire. Numbers stay float32 until orjson prints their shortest form: one path for all.

lm-eval compares `token_logprobs[i]` with the values of `top_logprobs[i]` for equality, so both must come out alike.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.api.errors import engine_error
from serve.engine.request import TokenScores
from serve.text.tokenizer import Tokenizer

type _Numbers = tuple[str, np.float32, dict[str, np.float32], list[int]]  # a token, its own, by name, the others' ids

_LOWEST = np.float32(-9999.0)  # what OpenAI writes for a token of probability 0; JSON has no infinity


@dataclass(frozen=True, slots=True)
class TokenNames:
    """How tokens are written: as text, or as `token_id:123`."""

    tokenizer: Tokenizer
    as_ids: bool

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_ids else self.tokenizer.token_text(token_id)


def clamped(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probs with -inf as -9999.

    Raises:
        APIError: 500 for NaN and +inf, which JSON would silently turn into null.
    """
    if not (values < np.inf).all():
        raise engine_error("The engine failed: a log-probability is not a number.")
    return np.maximum(values, _LOWEST)


def checked(scores: TokenScores, rows: int, alternatives: int) -> TokenScores:
    """The scores, of which as many rows and at least as many alternatives are there as are to be shown.

    Raises:
        APIError: 500 otherwise; a list that is silently too short would be a wrong answer.
    """
    whole = all(len(getattr(scores, name)) == rows for name in TokenScores.__slots__)
    tables = (scores.top_ids, scores.top_ranks, scores.top_logprobs)
    if not whole or (rows and any(table.shape[1] < alternatives for table in tables)):
        raise engine_error("The engine returned another number of log-probabilities than asked for.")
    return scores


def chat_content(names: TokenNames, token_ids: Sequence[int], scores: TokenScores, k: int) -> list[dict[str, Any]]:
    """`logprobs.content` of chat: an entry per token, with its first k alternatives.

    `token_id` and `rank` are ours: distinct tokens can read alike.
    """
    checked(scores, len(token_ids), k)
    logprobs, tops = clamped(scores.logprob), clamped(scores.top_logprobs)
    return [
        _chat_entry(names, token_id, logprobs[i], int(scores.rank[i]))
        | {
            "top_logprobs": [
                _chat_entry(names, int(scores.top_ids[i, j]), tops[i, j], int(scores.top_ranks[i, j])) for j in range(k)
            ]
        }
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


def prompt_columns(token_ids: Sequence[int], scores: TokenScores, k: int, start: int) -> dict[str, Any]:
    """The same numbers in columns, n = prompt - start rows each: less to write and to read than entries by name.

    Args:
        start: the first token with numbers, whose row is the first.
    """
    checked(scores, len(token_ids) - 1, k)
    rows = scores[start - 1 :]
    return {
        "start": start,
        "token_ids": token_ids[start:],  # [n]
        "logprobs": clamped(rows.logprob),  # [n]
        "ranks": rows.rank,  # [n]
        "top_token_ids": np.ascontiguousarray(rows.top_ids[:, :k]),  # [n, k]
        "top_logprobs": np.ascontiguousarray(clamped(rows.top_logprobs[:, :k])),  # [n, k]
        "top_ranks": np.ascontiguousarray(rows.top_ranks[:, :k]),  # [n, k]
    }


class CompletionLogprobs:
    """Makes the legacy completions `logprobs` object, in one piece or chunk by chunk.

    `text_offset` counts code points of the text that the client gets.
    """

    def __init__(self, names: TokenNames, k: int, *, skip_special_tokens: bool) -> None:
        """`k` alternatives are shown of each generated token."""
        self._names = names
        self._k = k
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # code points of the output's text before the next token

    def echo(
        self, token_ids: Sequence[int], scores: TokenScores, text: str, hidden: Sequence[bool], *, k: int, start: int
    ) -> dict[str, Any]:
        """The prompt's tokens, with k alternatives.

        Args:
            text: what is echoed for them; the output follows it.
            hidden: for each token, whether it takes no room in the text.
            start: tokens before it have no numbers; the first never has.
        """
        self._offset = len(text)
        checked(scores, len(token_ids) - 1, k)
        bare = [(self._names(token), None, None, None) for token in token_ids[:start]]
        numbers = self._numbers(token_ids[start:], scores[start - 1 :], k)
        return _columns([*bare, *numbers], self._prompt_offsets(token_ids, text, hidden))

    def output(self, token_ids: Sequence[int], scores: TokenScores) -> dict[str, Any]:
        """Generated tokens."""
        checked(scores, len(token_ids), self._k)
        return _columns(self._numbers(token_ids, scores, self._k), [self._output_offset(token) for token in token_ids])

    def _prompt_offsets(self, token_ids: Sequence[int], text: str, hidden: Sequence[bool]) -> list[int]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [
            "" if hides else decoder.decode(self._names.tokenizer.token_bytes(token))
            for token, hides in zip(token_ids, hidden, strict=True)
        ]
        # SentencePiece begins the first word with a space that the text does not have.
        offset = -1 if "".join(pieces).startswith(" ") and not text.startswith(" ") else 0
        offsets = []
        for piece in pieces:
            offsets.append(min(max(offset, 0), len(text)))
            offset += len(piece)
        return offsets

    def _output_offset(self, token_id: int) -> int:
        offset, tokenizer = self._offset, self._names.tokenizer
        if not (self._skip_special_tokens and tokenizer.is_special(token_id)):
            self._offset += len(self._decoder.decode(tokenizer.token_bytes(token_id)))
        return offset

    def _numbers(self, token_ids: Sequence[int], scores: TokenScores, k: int) -> list[_Numbers]:
        logprobs, tops = clamped(scores.logprob), clamped(scores.top_logprobs)
        rows = []
        for i, token_id in enumerate(token_ids):
            name = self._names(token_id)
            top = {name: logprobs[i]}
            ids: list[int] = scores.top_ids[i, :k].tolist()
            for j, other_id in enumerate(ids):
                # Tokens that read alike share a key: the higher value stays, and top_token_ids tells them apart.
                other = self._names(other_id)
                top[other] = max(top.get(other, _LOWEST), tops[i, j])
            rows.append((name, logprobs[i], top, ids))
        return rows


def _columns(rows: Sequence[_Numbers | tuple[str, None, None, None]], offsets: list[int]) -> dict[str, Any]:
    names = ("tokens", "token_logprobs", "top_logprobs", "top_token_ids")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)} | {"text_offset": offsets}


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several column objects as one."""
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}
