"""Finished rows as CSV or Parquet, converted as a stream."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

_BLOCK = 4 * 2**20  # bytes of JSON, read at once
_GROUP = 32 * 2**20  # bytes of columns in a row group
_SUMS = (
    *("num_tokens", "num_scored", "logprob", "perplexity", "bits_per_byte", "windows", "truncated"),
    *("completion_start", "completion_logprob", "completion_perplexity", "is_greedy"),
)


def write_csv(rows: Path, output: Path) -> None:
    """Write the sums of each line as CSV."""
    with rows.open("rb") as lines, output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("line", "id", *_SUMS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(orjson.loads(line) for line in lines)


def write_parquet(
    rows: Path, output: Path, *, longest_row: int, alternatives: int, per_token: bool, about: Any
) -> None:
    """Write a Parquet file of JSON rows.

    Args:
        rows: file of JSON lines.
        output: file to write.
        longest_row: bytes.
        alternatives: of each token.
        per_token: the rows have columns of tokens.
        about: JSON value for the file's metadata, key "logprobd".
    """
    import pyarrow  # takes half a second, which other formats should not wait for
    import pyarrow.parquet

    schema = _schema(alternatives, per_token=per_token).with_metadata({"logprobd": orjson.dumps(about)})
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


def _schema(alternatives: int, *, per_token: bool) -> Any:
    import pyarrow

    int32, float32, float64 = pyarrow.int32(), pyarrow.float32(), pyarrow.float64()
    fields: list[tuple[str, Any]] = [("line", pyarrow.int64()), ("id", pyarrow.string())]
    if per_token:
        fields += [
            ("token_ids", pyarrow.list_(int32)),
            ("tokens", pyarrow.list_(pyarrow.string())),
            ("byte_lengths", pyarrow.list_(int32)),
            ("logprobs", pyarrow.list_(float32)),
            ("ranks", pyarrow.list_(int32)),
        ]
    if alternatives:
        fields += [
            ("top_token_ids", pyarrow.list_(pyarrow.list_(int32))),
            ("top_logprobs", pyarrow.list_(pyarrow.list_(float32))),
        ]
    fields += [
        *(("num_tokens", int32), ("num_scored", int32)),
        *(("logprob", float64), ("perplexity", float64), ("bits_per_byte", float64)),
        *(("windows", int32), ("truncated", int32)),
        *(("completion_start", int32), ("completion_logprob", float64), ("completion_perplexity", float64)),
        ("is_greedy", pyarrow.bool_()),
    ]
    return pyarrow.schema(fields)
