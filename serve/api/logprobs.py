"""`logprobs` of generated tokens and echoed prompts. Values stay float32 until orjson writes their shortest form.

lm-eval compares `token_logprobs[i]` with the values of `top_logprobs[i]` for equality, so both must be written alike.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from model.token_logprobs import TokenLogprobs, clamp_logprobs
from serve.api.errors import engine_error
from serve.jobs.output import Output
from serve.text.detokenizer import Echo
from serve.text.tokenizer import Tokenizer

# Of a token in `logprobs` of completions: its name, its log-prob, the log-probs of its alternatives by name, their ids,
# and the code points of the text that precede it.
type LogprobRow = tuple[str, np.float32 | None, dict[str, np.float32] | None, list[int] | None, int]


@dataclass(frozen=True, slots=True)
class TokenNames:
    """Formats tokens as text or as `token_id:123`."""

    tokenizer: Tokenizer
    as_ids: bool

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_ids else self.tokenizer.token_text(token_id)


def clamp(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probs with -inf replaced by -9999; APIError 500 for NaN and +inf, which orjson would write as null."""
    if not (values < np.inf).all():
        raise engine_error("The engine failed: a log-probability is not a number.")
    return clamp_logprobs(values)


def wire_logprobs(logprobs: TokenLogprobs, rows: int, k: int, *, first: int = 0) -> TokenLogprobs:
    """Log-probs as all answers contain them: checked, with k alternatives and without infinities.

    Args:
        rows: expected number of rows.
        first: index of the first row to return; earlier ones may be NaN.

    Raises:
        APIError: 500 for the wrong number of rows or alternatives, or for NaN. A list that is silently too short would
            be a wrong answer.
    """
    tables = (logprobs.top_ids, logprobs.top_ranks, logprobs.top_logprobs)
    if any(len(column) != rows for column in (logprobs.logprob, logprobs.rank, *tables)) or (
        rows and any(table.shape[1] < k for table in tables)
    ):
        raise engine_error("The engine returned the wrong number of log-probabilities.")
    part = logprobs[first:]
    tops = clamp(part.top_logprobs[:, :k])
    return TokenLogprobs(clamp(part.logprob), part.rank, part.top_ids[:, :k], tops, top_ranks=part.top_ranks[:, :k])


@dataclass(frozen=True, slots=True)
class TokenDetails:
    """Values of generated tokens besides their log-probs; None if the request has no use for them."""

    allowed_mass: Sequence[np.float32] | None = None
    forced: Sequence[bool] | None = None
    processed: NDArray[np.float32] | None = None  # log-probs in the sampling distribution

    @classmethod
    def of(cls, output: Output, alternatives: int, *, with_mass: bool, with_processed: bool) -> Self:
        """Raise APIError 500 if values are missing, or are not numbers."""
        count, mass, processed = len(output.token_ids), None, None
        if with_mass:
            mass = output.allowed_mass
            if len(mass) != count or len(output.forced) != count or not np.isfinite(mass).all():
                raise engine_error("The engine returned the wrong allowed probabilities.")
        if with_processed:
            processed = wire_logprobs(output.all_processed(alternatives), count, alternatives).logprob
        return cls(mass, output.forced if with_mass else None, processed)

    def __getitem__(self, rows: slice) -> "TokenDetails":
        return TokenDetails(
            self.allowed_mass and self.allowed_mass[rows],
            self.forced and self.forced[rows],
            None if self.processed is None else self.processed[rows],
        )

    def entry(self, row: int) -> dict[str, Any]:
        """Keys of a token's entry in `logprobs.content`; `forced` only if it is true."""
        entry: dict[str, Any] = {}
        if self.processed is not None:
            entry["processed_logprob"] = self.processed[row]
        if self.allowed_mass is not None:
            entry["allowed_mass"] = self.allowed_mass[row]
        if self.forced is not None and self.forced[row]:
            entry["forced"] = True
        return entry

    def columns(self, num_echoed: int) -> dict[str, list[Any]]:
        """Columns of `logprobs` of completions, which start with null for echoed tokens."""
        names = {"processed_logprobs": self.processed, "allowed_mass": self.allowed_mass, "forced": self.forced}
        return {name: [*[None] * num_echoed, *column] for name, column in names.items() if column is not None}


def chat_content(
    names: TokenNames, token_ids: Sequence[int], logprobs: TokenLogprobs, details: TokenDetails, *, with_chosen: bool
) -> list[dict[str, Any]]:
    """`logprobs.content` of chat: one entry per token, with its alternatives.

    `token_id` and `rank` extend OpenAI's schema, as different tokens can have equal texts. `logprobs` is the result of
    `wire_logprobs`. `with_chosen` adds the token itself before its alternatives, unless it is one of them.
    """
    tops, entries = logprobs.top_logprobs, []
    for i, token_id in enumerate(token_ids):
        entry = _chat_entry(names, token_id, logprobs.logprob[i], int(logprobs.rank[i]))
        ids = logprobs.top_ids[i].tolist()
        chosen = [entry.copy()] if with_chosen and token_id not in ids else []
        alternatives = [
            _chat_entry(names, other, tops[i, j], int(logprobs.top_ranks[i, j])) for j, other in enumerate(ids)
        ]
        entries.append(entry | details.entry(i) | {"top_logprobs": chosen + alternatives})
    return entries


def _chat_entry(names: TokenNames, token_id: int, logprob: np.float32, rank: int) -> dict[str, Any]:
    return {
        "token": names(token_id),
        "logprob": logprob,
        "bytes": list(names.tokenizer.token_bytes(token_id)),
        "token_id": token_id,
        "rank": rank,
    }


class CompletionLogprobs:
    """Builds the rows of one choice of a completion, at once or chunk by chunk."""

    def __init__(self, names: TokenNames, *, skip_special_tokens: bool) -> None:
        self._names = names
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # code points of the output's text before the next token

    def echo(self, token_ids: Sequence[int], logprobs: TokenLogprobs, echo: Echo) -> list[LogprobRow]:
        """The rows of an echoed prompt, which the output follows.

        `logprobs` is the result of `wire_logprobs` for the last tokens; those before them get null.
        """
        self._offset = len(echo.text)
        self._decoder.decode(echo.tail)
        start = len(token_ids) - len(logprobs.logprob)
        unscored = zip(token_ids[:start], echo.offsets, strict=False)
        rows: list[LogprobRow] = [(self._names(token), None, None, None, offset) for token, offset in unscored]
        return rows + self._rows(token_ids[start:], logprobs, echo.offsets[start:])

    def output(self, token_ids: Sequence[int], logprobs: TokenLogprobs) -> list[LogprobRow]:
        """The rows of generated tokens; `logprobs` is the result of `wire_logprobs`."""
        return self._rows(token_ids, logprobs, [self._output_offset(token) for token in token_ids])

    def _output_offset(self, token_id: int) -> int:
        offset, tokenizer = self._offset, self._names.tokenizer
        if not (self._skip_special_tokens and tokenizer.is_special(token_id)):
            self._offset += len(self._decoder.decode(tokenizer.token_bytes(token_id)))
        return offset

    def _rows(self, token_ids: Sequence[int], logprobs: TokenLogprobs, offsets: Sequence[int]) -> list[LogprobRow]:
        rows: list[LogprobRow] = []
        all_ids = logprobs.top_ids.tolist()
        for i, token_id in enumerate(token_ids):
            name = self._names(token_id)
            top = {name: logprobs.logprob[i]}
            ids: list[int] = all_ids[i]
            for j, other_id in enumerate(ids):
                # Tokens with equal texts share a key, which keeps the higher value; top_token_ids distinguishes them.
                other = self._names(other_id)
                logprob = logprobs.top_logprobs[i, j]
                top[other] = max(top.get(other, logprob), logprob)
            rows.append((name, logprobs.logprob[i], top, ids, offsets[i]))
        return rows


def completion_columns(rows: Sequence[LogprobRow]) -> dict[str, list[Any]]:
    """`logprobs` of completions."""
    names = ("tokens", "token_logprobs", "top_logprobs", "top_token_ids", "text_offset")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}
