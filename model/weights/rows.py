"""A weight as runs of its rows, so that a large one is never held twice; its values are floats or int8 with scales.

int8: 32 elements of a row share a float16 scale, as in GGUF's Q8_0 (`block_q8_0` of the ggml project).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from model.layout import GROUP_SIZE

_ALIGNMENT = 64  # bytes; XLA:CPU takes over arrays that start at a multiple of it without a copy (`jax.device_put`)
_LARGEST = 127
_BATCH_VALUES = 1 << 16  # values rounded at once: they stay in a core's cache


@dataclass(frozen=True, slots=True)
class Int8Array:
    """A matrix [N, K]: element [i, j] is values[i, j] * scales[i, j // 32]."""

    values: NDArray[np.int8]  # [N, K]
    scales: NDArray[np.float16]  # [N, ceil(K / 32)]

    def joined(self) -> NDArray[np.int8]:
        """Values and the bytes of their scales as one array [N, K + 2 ceil(K / 32)], to move rows of both at once."""
        return np.concatenate([self.values, self.scales.view(np.int8)], axis=1)

    @classmethod
    def split(cls, joined: NDArray[np.int8], columns: int) -> Self:
        """The inverse of `joined`; `columns` is K."""
        values, scales = np.ascontiguousarray(joined[:, :columns]), np.ascontiguousarray(joined[:, columns:])
        return cls(values, scales.view(np.float16))


def quantize(matrix: NDArray[Any]) -> Int8Array:
    """Round a matrix [N, K] of any float type to the nearest of 255 steps in each group.

    A group's largest magnitude becomes 127, or less where float16 has no scale that small. Values too large for float16
    scales give infinite scales.
    """
    n, k = matrix.shape
    array = Int8Array(np.empty((n, k), np.int8), np.empty((n, -(-k // GROUP_SIZE)), np.float16))
    count = max(1, _BATCH_VALUES // k)
    for start in range(0, n, count):
        rows = slice(start, start + count)
        _round_rows(np.asarray(matrix[rows], np.float32), array.values[rows], array.scales[rows])
    return array


def _round_rows(matrix: NDArray[np.float32], values: NDArray[np.int8], scales: NDArray[np.float16]) -> None:
    n, k = matrix.shape
    groups = np.pad(matrix, ((0, 0), (0, -k % GROUP_SIZE))).reshape(n, -1, GROUP_SIZE)
    with np.errstate(all="ignore"):
        largest = np.abs(groups).max(axis=2)
        scales[:] = largest / _LARGEST
        # The nearest subnormal float16 may be so much smaller that 127 steps would not reach the largest value.
        too_small = largest > (_LARGEST + 0.5) * scales.astype(np.float32)
        scales[too_small] = np.nextafter(scales[too_small], np.float16(np.inf))
        steps = scales.astype(np.float32)[:, :, None]
        # Divide by the stored scale: its rounding to float16 then adds no second error.
        rounded = np.where(steps > 0, np.rint(groups / steps), 0)
        limited = np.clip(np.nan_to_num(rounded), -_LARGEST, _LARGEST).astype(np.int8)
    values[:] = limited.reshape(n, -1)[:, :k]


@dataclass(frozen=True, slots=True)
class Rows:
    """A weight's rows in order. They can be read once."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    runs: Iterator[NDArray[Any]]  # consecutive rows per run; the producer does not reuse the array

    def read(self) -> NDArray[Any]:
        """All rows in one array, which a device takes over without a copy."""
        array, start = aligned_empty(self.shape, self.dtype), 0
        for run in self.runs:
            array[start : start + len(run)] = run
            start += len(run)
        return array


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """A matrix's rows in order, as int8 with scales. They can be read once."""

    shape: tuple[int, ...]
    runs: Iterator[Int8Array]


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An uninitialized array that a device takes over without a copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
