"""Rows of the output as JSON, their sums, and their conversion to CSV and Parquet."""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from model.token_logprobs import TokenLogprobs, clamp_logprobs
from serve.cli.batch.journal import LineSums
from serve.cli.score.config import ScoreConfig
from serve.cli.score.texts import Text
from serve.jobs.results import logprob_sum, perplexity
from serve.text.tokenizer import Tokenizer

_BLOCK = 4 * 2**20  # bytes of JSON, read at once
_GROUP = 32 * 2**20  # bytes of columns in a row group
_SUMS = (
    *("num_tokens", "num_scored", "logprob", "perplexity", "bits_per_byte", "windows", "truncated"),
    *("completion_start", "completion_logprob", "completion_perplexity", "is_greedy"),
)


@dataclass(slots=True)
class Sums(LineSums):
    tokens: int = 0
    scored: int = 0  # tokens with a log-prob
    logprob: float = 0.0  # nats
    bytes: int = 0  # of the scored tokens without special ones, which are not part of the text
    text_logprob: float = 0.0  # of these tokens, nats
    rank_1: int = 0  # tokens of rank 1
    completions: int = 0
    completion_tokens: int = 0
    completion_logprob: float = 0.0
    greedy: int = 0  # completions all of whose tokens have rank 1

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text, special tokens excluded; None if no text is scored."""
        return -self.text_logprob / math.log(2) / self.bytes if self.bytes else None

    def summary(self) -> list[tuple[str, str]]:
        """Names and values to print at the end."""
        skipped = f", {self.skipped:,} skipped" if self.skipped else ""
        entries = [
            ("lines", f"{self.lines:,} scored{skipped}"),
            ("tokens", f"{self.scored:,} scored of {self.tokens:,}"),
        ]
        if self.scored:
            entries += [
                ("log-prob", f"{self.logprob / self.scored:.6f} per token"),
                ("perplexity", _number(perplexity(self.logprob, self.scored))),
                ("bits/byte", _number(self.bits_per_byte)),
                ("rank 1", f"{self.rank_1 / self.scored:.2%} of the tokens"),
            ]
        if self.completions:
            number = _number(perplexity(self.completion_logprob, self.completion_tokens))
            entries += [
                ("completions", f"{self.completions:,}, perplexity {number}"),
                ("greedy", f"{self.greedy / self.completions:.2%} of them"),
            ]
        return entries


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


@dataclass(frozen=True, slots=True)
class RowWriter:
    """Writes rows as JSON."""

    tokenizer: Tokenizer
    config: ScoreConfig

    def row(self, line: int, text: Text, windows: int, logprobs: TokenLogprobs) -> tuple[bytes, Sums]:
        """The row of a text, with line end, and its sums; row i of `logprobs` is token i + 1.

        `windows` is the number of windows in which the text was scored.
        """
        encoded = text.encoded
        ids = encoded.token_ids[: len(logprobs.logprob) + 1]
        lengths = [len(self.tokenizer.token_bytes(token_id)) for token_id in ids]
        clamped = clamp_logprobs(logprobs.logprob)
        is_complete = len(ids) == len(encoded.token_ids)
        sums = _sums(clamped, logprobs.rank, encoded.completion_start if is_complete else None)
        in_text = np.array([not self.tokenizer.is_special(token_id) for token_id in ids[1:]], bool)
        sums.bytes, sums.text_logprob = int(np.array(lengths[1:], int)[in_text].sum()), logprob_sum(clamped[in_text])
        row: dict[str, Any] = {"line": line}
        if text.id is not None:  # the columns of other formats than JSON have one type
            is_plain = self.config.output_format == "jsonl" or isinstance(text.id, str)
            row["id"] = text.id if is_plain else orjson.dumps(text.id).decode()
        if self.config.writes_tokens:
            row |= {
                "token_ids": ids,
                "tokens": [self.tokenizer.token_text(token_id) for token_id in ids],
                "byte_lengths": lengths,
                "logprobs": _after_null(clamped),
                "ranks": _after_null(logprobs.rank),
            }
            if self.config.top_logprobs:
                row["top_token_ids"] = _after_null(logprobs.top_ids)
                row["top_logprobs"] = _after_null(clamp_logprobs(logprobs.top_logprobs))
        row |= {
            "num_tokens": len(ids),
            "num_scored": sums.scored,
            "logprob": sums.logprob,
            "perplexity": perplexity(sums.logprob, sums.scored),
            "bits_per_byte": sums.bits_per_byte,
        }
        if self.config.long == "window":
            row["windows"] = windows
        if not is_complete:
            row["truncated"] = len(encoded.token_ids) - len(ids)
        if encoded.completion_start is not None:
            row |= _completion(encoded.completion_start, sums)
        return orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n", sums


def _after_null(rows: NDArray[Any]) -> orjson.Fragment:
    """A JSON list of null, for the first token, and the rows."""
    written = orjson.dumps(np.ascontiguousarray(rows), option=orjson.OPT_SERIALIZE_NUMPY)
    return orjson.Fragment(b"[null]" if len(rows) == 0 else b"[null," + written[1:])


def _sums(logprobs: NDArray[np.float32], ranks: NDArray[np.int32], completion_start: int | None) -> Sums:
    """Sums of one row; those of a completion only if it is scored to its end."""
    sums = Sums(
        lines=1,
        tokens=len(logprobs) + 1,
        scored=len(logprobs),
        logprob=logprob_sum(logprobs),
        rank_1=int((ranks == 1).sum()),
    )
    if completion_start is not None:
        sums.completions = 1
        sums.completion_tokens = len(logprobs) + 1 - completion_start
        sums.completion_logprob = logprob_sum(logprobs[completion_start - 1 :])
        sums.greedy = int((ranks[completion_start - 1 :] == 1).all())
    return sums


def _completion(start: int, sums: Sums) -> dict[str, Any]:
    is_complete = sums.completions == 1
    return {
        "completion_start": start,
        "completion_logprob": sums.completion_logprob if is_complete else None,
        "completion_perplexity": perplexity(sums.completion_logprob, sums.completion_tokens) if is_complete else None,
        "is_greedy": bool(sums.greedy) if is_complete else None,
    }


def write_csv(rows: Path, output: Path) -> None:
    """Write the sums of each line as CSV."""
    with rows.open("rb") as lines, output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("line", "id", *_SUMS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(orjson.loads(line) for line in lines)


def write_parquet(rows: Path, output: Path, *, config: ScoreConfig, longest_row: int, about: Any) -> None:
    """Write the rows, of at most `longest_row` bytes, as Parquet; `about` is JSON for the file's metadata."""
    import pyarrow  # takes half a second, which other formats should not wait for
    import pyarrow.parquet

    schema = _schema(config).with_metadata({"logprobd": orjson.dumps(about)})
    with pyarrow.parquet.ParquetWriter(output, schema, compression="zstd") as writer:
        group: list[Any] = []
        for batch in _batches(rows, schema, max(_BLOCK, 2 * longest_row)):
            group.append(batch)
            if sum(batch.nbytes for batch in group) >= _GROUP:
                writer.write_table(pyarrow.Table.from_batches(group, schema))
                group = []
        if group:
            writer.write_table(pyarrow.Table.from_batches(group, schema))


def _batches(rows: Path, schema: Any, block: int) -> Iterator[Any]:
    import pyarrow.json

    if not rows.stat().st_size:  # pyarrow refuses an empty file
        return
    yield from pyarrow.json.open_json(
        rows,
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=block),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error"),
    )


def _schema(config: ScoreConfig) -> Any:
    import pyarrow

    int32, float32, float64, string = pyarrow.int32(), pyarrow.float32(), pyarrow.float64(), pyarrow.string()
    columns: list[tuple[str, Any]] = [("line", pyarrow.int64()), ("id", string)]
    if config.per_token:
        kinds = {"token_ids": int32, "tokens": string, "byte_lengths": int32, "logprobs": float32, "ranks": int32}
        columns += [(name, pyarrow.list_(kind)) for name, kind in kinds.items()]
    if config.top_logprobs:
        kinds = {"top_token_ids": int32, "top_logprobs": float32}
        columns += [(name, pyarrow.list_(pyarrow.list_(kind))) for name, kind in kinds.items()]
    floats = ("logprob", "perplexity", "bits_per_byte", "completion_logprob", "completion_perplexity")
    columns += (dict.fromkeys(_SUMS, int32) | dict.fromkeys(floats, float64) | {"is_greedy": pyarrow.bool_()}).items()
    return pyarrow.schema(columns)
