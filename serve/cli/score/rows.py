"""The output's rows, and their sums."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from serve.cli.score.run import Outcome
from serve.cli.score.texts import Text
from serve.cli.score.totals import Sums, perplexity
from serve.engine.request import TokenScores
from serve.text.tokenizer import Tokenizer

_LOWEST = np.float32(-9999.0)  # what the server writes for a token of probability 0; JSON has no infinity


@dataclass(frozen=True, slots=True)
class RowWriter:
    """Makes rows of JSON."""

    tokenizer: Tokenizer
    alternatives: int  # shown of each token
    per_token: bool  # else sums only
    windowed: bool  # tell of each row how many windows it took
    id_as_text: bool  # for Parquet, whose columns have one type

    def row(self, outcome: Outcome) -> tuple[bytes, Sums]:
        """A row of an outcome that has scores, with its line's end, and what it adds to the totals."""
        text, scores = outcome.work.text, outcome.scores
        assert text is not None
        assert scores is not None
        ids = text.token_ids[: len(scores.logprob) + 1]
        lengths = [len(self.tokenizer.token_bytes(token_id)) for token_id in ids]
        logprobs = np.maximum(scores.logprob, _LOWEST)
        sums = _sums(logprobs, scores.rank, text, len(ids))
        of_text = np.array([not self.tokenizer.is_special(token_id) for token_id in ids[1:]], bool)
        sums.bytes, sums.text_logprob = int(np.array(lengths[1:], int)[of_text].sum()), _sum(logprobs[of_text])
        row: dict[str, Any] = {"line": outcome.work.line.number}
        if text.id is not None:
            row["id"] = self._id(text.id)
        if self.per_token:
            row |= self._columns(ids, lengths, logprobs, scores)
        row |= {
            "num_tokens": len(ids),
            "num_scored": sums.scored,
            "logprob": sums.logprob,
            "perplexity": perplexity(sums.logprob, sums.scored),
            "bits_per_byte": sums.bits_per_byte,
        }
        if self.windowed:
            row["windows"] = len(outcome.work.windows)
        if len(ids) < len(text.token_ids):
            row["truncated"] = len(text.token_ids) - len(ids)
        if text.completion_start is not None:
            row |= _completion(text.completion_start, sums)
        return orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n", sums

    def _id(self, value: Any) -> Any:
        return value if isinstance(value, str) or not self.id_as_text else orjson.dumps(value).decode()

    def _columns(
        self, ids: list[int], lengths: list[int], logprobs: NDArray[np.float32], scores: TokenScores
    ) -> dict[str, Any]:
        columns: dict[str, Any] = {
            "token_ids": ids,
            "tokens": [self.tokenizer.token_text(token_id) for token_id in ids],
            "byte_lengths": lengths,
            "logprobs": _after_null(logprobs),
            "ranks": _after_null(scores.rank),
        }
        if self.alternatives:
            columns["top_token_ids"] = _after_null(scores.top_ids)
            columns["top_logprobs"] = _after_null(np.maximum(scores.top_logprobs, _LOWEST))
        return columns


def _after_null(rows: NDArray[Any]) -> orjson.Fragment:
    """A JSON list of null, for the first token, and the rows."""
    written = orjson.dumps(np.ascontiguousarray(rows), option=orjson.OPT_SERIALIZE_NUMPY)
    return orjson.Fragment(b"[null]" if len(rows) == 0 else b"[null," + written[1:])


def _sums(logprobs: NDArray[np.float32], ranks: NDArray[np.int32], text: Text, num_tokens: int) -> Sums:
    sums = Sums(
        lines=1,
        tokens=num_tokens,
        scored=len(logprobs),
        logprob=_sum(logprobs),
        rank_1=int((ranks == 1).sum()),
    )
    start = text.completion_start
    if start is None or num_tokens < len(text.token_ids):  # the sums of a part would be taken for those of the whole
        return sums
    sums.completions = 1
    sums.completion_tokens = num_tokens - start
    sums.completion_logprob = _sum(logprobs[start - 1 :])
    sums.greedy = int((ranks[start - 1 :] == 1).all())
    return sums


def _completion(start: int, sums: Sums) -> dict[str, Any]:
    known = sums.completions == 1
    number = perplexity(sums.completion_logprob, sums.completion_tokens)
    return {
        "completion_start": start,
        "completion_logprob": sums.completion_logprob if known else None,
        "completion_perplexity": number if known else None,
        "is_greedy": bool(sums.greedy) if known else None,
    }


def _sum(logprobs: NDArray[np.float32]) -> float:
    """Rounded once, so that it does not depend on an order."""
    return math.fsum(logprobs.tolist())
