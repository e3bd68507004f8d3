"""The finished rows as Parquet: read as a stream, written a row group at a time."""

from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.json
import pyarrow.parquet

_BLOCK = 4 * 2**20  # bytes of JSON that are read at once
_GROUP = 32 * 2**20  # bytes of columns in a row group


def write_parquet(
    rows: Path, output: Path, *, longest_row: int, alternatives: int, per_token: bool, about: Any
) -> None:
    """Writes a Parquet file of JSON rows.

    Args:
        longest_row: bytes.
        alternatives: of each token.
        about: a JSON value, kept in the file's metadata under the key logprobd.
    """
    schema = _schema(alternatives, per_token=per_token).with_metadata({"logprobd": orjson.dumps(about)})
    with pyarrow.parquet.ParquetWriter(output, schema, compression="zstd") as writer:
        group: list[Any] = []
        for batch in _batches(rows, schema, max(_BLOCK, 2 * longest_row)):
            group.append(batch)
            if sum(each.nbytes for each in group) >= _GROUP:
                writer.write_table(pyarrow.Table.from_batches(group, schema))
                group = []
        if group:
            writer.write_table(pyarrow.Table.from_batches(group, schema))


def _batches(rows: Path, schema: Any, block: int) -> Any:
    if not rows.stat().st_size:  # which the reader does not take
        return []
    return pyarrow.json.open_json(
        rows,
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=block),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error"),
    )


def _schema(alternatives: int, *, per_token: bool) -> Any:
    whole, number, exact = pyarrow.int32(), pyarrow.float32(), pyarrow.float64()
    fields: list[tuple[str, Any]] = [("line", pyarrow.int64()), ("id", pyarrow.string())]
    if per_token:
        fields += [
            ("token_ids", pyarrow.list_(whole)),
            ("tokens", pyarrow.list_(pyarrow.string())),
            ("byte_lengths", pyarrow.list_(whole)),
            ("logprobs", pyarrow.list_(number)),
            ("ranks", pyarrow.list_(whole)),
        ]
    if alternatives:
        fields += [
            ("top_token_ids", pyarrow.list_(pyarrow.list_(whole))),
            ("top_logprobs", pyarrow.list_(pyarrow.list_(number))),
        ]
    fields += [
        *(("num_tokens", whole), ("num_scored", whole)),
        *(("logprob", exact), ("perplexity", exact), ("bits_per_byte", exact)),
        *(("windows", whole), ("truncated", whole)),
        *(("completion_start", whole), ("completion_logprob", exact), ("completion_perplexity", exact)),
        ("is_greedy", pyarrow.bool_()),
    ]
    return pyarrow.schema(fields)
