"""Splits a weight into shards while its rows are read."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.config import ConfigError
from model.layout import GROUP_SIZE
from model.sharding import ShardIndices
from model.weights.int8 import Int8Array
from model.weights.rows import Int8Rows, Rows


def shard_rows(rows: Rows, indices: tuple[ShardIndices, ...]) -> list[NDArray[Any]]:
    """Each shard's part of a weight, whose axes are sharded by `indices`."""
    return _split(rows.runs(), indices, rows.dtype)


def shard_int8_rows(rows: Int8Rows, indices: tuple[ShardIndices, ...]) -> list[Int8Array]:
    """Each shard's part of an int8 matrix; a group that shares a scale is never split.

    Raises:
        ConfigError: a shard would start inside a group.
    """
    width = rows.shape[1]
    scales = _scale_indices(indices[1], width)
    scale_bytes = np.stack([2 * scales, 2 * scales + 1], axis=2).reshape(len(scales), -1)
    columns = np.concatenate([indices[1], np.where(scale_bytes < 0, -1, scale_bytes + width)], axis=1)
    runs = (run.joined() for run in rows.runs())
    parts = _split(runs, (indices[0], columns), np.dtype(np.int8))
    return [Int8Array.split(part, indices[1].shape[1]) for part in parts]


def _scale_indices(columns: ShardIndices, width: int) -> ShardIndices:
    """Indices of the scales that each shard holds of every row."""
    if columns.shape[1] == width and (columns == np.arange(width)).all():
        return np.broadcast_to(np.arange(-(-width // GROUP_SIZE)), (len(columns), -(-width // GROUP_SIZE)))
    firsts = columns[:, ::GROUP_SIZE]
    if columns.shape[1] % GROUP_SIZE or (firsts[firsts >= 0] % GROUP_SIZE).any():
        raise ConfigError(f"int8 with tensor parallelism needs a head size that is a multiple of {GROUP_SIZE}")
    return np.where(firsts < 0, -1, firsts // GROUP_SIZE)


def _split(runs: Iterator[NDArray[Any]], indices: tuple[ShardIndices, ...], dtype: np.dtype[Any]) -> list[NDArray[Any]]:
    parts = [np.zeros(tuple(axis.shape[1] for axis in indices), dtype) for _ in indices[0]]
    start = 0
    for run in runs:
        stop = start + len(run)
        for shard, part in enumerate(parts):
            rows = indices[0][shard]
            in_run = np.flatnonzero((rows >= start) & (rows < stop))
            values = run[rows[in_run] - start]
            if len(indices) > 1:
                columns = indices[1][shard]
                exists = columns >= 0
                part[np.ix_(in_run, exists)] = values[:, columns[exists]]
            else:
                part[in_run] = values
        start = stop
    return parts
