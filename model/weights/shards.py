"""Cuts a weight into what each shard holds of it, as its rows are read."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.config import ConfigError
from model.sharding import Kept
from model.weights.int8 import GROUP, Int8Array
from model.weights.rows import Int8Rows, Rows


def cut_rows(rows: Rows, kept: tuple[Kept, ...]) -> list[NDArray[Any]]:
    """What each shard holds of a weight whose axes are cut as `kept` says."""
    return _cut(rows.runs(), kept, rows.dtype)


def cut_int8_rows(rows: Int8Rows, kept: tuple[Kept, Kept]) -> list[Int8Array]:
    """The same of an int8 matrix; a group that shares a scale is never cut.

    Raises:
        ConfigError: a shard would begin inside of a group.
    """
    width = rows.shape[1]
    of_scales = _groups(kept[1], width)
    # Values and the bytes of their scales side by side, so that runs are cut once.
    joined = (np.concatenate([run.values, run.scales.view(np.int8)], axis=1) for run in rows.runs())
    pairs = np.stack([2 * of_scales, 2 * of_scales + 1], axis=2).reshape(len(of_scales), -1)
    columns = np.concatenate([kept[1], np.where(pairs < 0, -1, pairs + width)], axis=1)
    own = kept[1].shape[1]
    return [
        Int8Array(np.ascontiguousarray(part[:, :own]), np.ascontiguousarray(part[:, own:]).view(np.float16))
        for part in _cut(joined, (kept[0], columns), np.dtype(np.int8))
    ]


def _groups(columns: Kept, width: int) -> Kept:
    """The scales that each shard holds of every row, by index."""
    if columns.shape[1] == width and (columns == np.arange(width)).all():
        return np.broadcast_to(np.arange(-(-width // GROUP)), (len(columns), -(-width // GROUP)))
    firsts = columns[:, ::GROUP]
    if columns.shape[1] % GROUP or (firsts[firsts >= 0] % GROUP).any():
        raise ConfigError(f"int8 with tensor parallelism needs heads of a multiple of {GROUP} elements")
    return np.where(firsts < 0, -1, firsts // GROUP)


def _cut(runs: Iterator[NDArray[Any]], kept: tuple[Kept, ...], dtype: np.dtype[Any]) -> list[NDArray[Any]]:
    shards = len(kept[0])
    made = [np.zeros(tuple(axis.shape[1] for axis in kept), dtype) for _ in range(shards)]
    start = 0
    for run in runs:
        stop = start + len(run)
        for shard, part in enumerate(made):
            rows = kept[0][shard]
            there = np.flatnonzero((rows >= start) & (rows < stop))
            taken = run[rows[there] - start]
            if len(kept) > 1:
                columns = kept[1][shard]
                has = columns >= 0
                part[np.ix_(there, has)] = taken[:, columns[has]]
            else:
                part[there] = taken
        start = stop
    return made
