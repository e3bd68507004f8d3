"""A weight as runs of its rows, so that a large one is never held twice: floats, or blocks of a format."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from model.formats import FLOATS, FORMATS, BlockFormat
from model.weights.quantize import quantize

_ALIGNMENT = 64  # bytes; XLA:CPU takes over arrays that start at a multiple of it without a copy (`jax.device_put`)
_ARENA_BYTES = 1 << 26
_CHECK_VALUES = 1 << 20  # values checked at once, so that a check needs little memory
_BF16_EXPONENT = np.uint16(0x7F80)  # all ones: infinite or NaN
_LARGEST = 127
_BATCH_VALUES = 1 << 16  # values rounded at once: they stay in a core's cache


@dataclass(frozen=True, slots=True)
class Rows:
    """A weight's rows in order. They can be read once."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    runs: Iterator[NDArray[Any]]  # consecutive rows per run; the producer does not reuse the array

    def read(self) -> NDArray[Any]:
        """All rows in one array, which a device takes over without a copy."""
        array, start = Arena(0).empty(self.shape, self.dtype), 0
        for run in self.runs:
            array[start : start + len(run)] = run
            start += len(run)
        return array


@dataclass(frozen=True, slots=True)
class BlockRows:
    """A matrix's rows in order, each as the bytes of its blocks: runs [R, D * block bytes]. They can be read once."""

    shape: tuple[int, ...]
    format: BlockFormat
    runs: Iterator[NDArray[np.uint8]]
    order: NDArray[np.int32] | None = None  # the columns in the blocks; None: in their own order


def quantized(matrix: NDArray[Any], block_format: BlockFormat) -> NDArray[np.uint8]:
    """A matrix [N, K] of any float type, rounded to a format, with zeros after K: [N, D * block bytes].

    Raises:
        ValueError: a value is not finite, or too large for the format; Q8_0 gives infinite scales instead.
    """
    if block_format.name == "Q8_0":
        return _round_to_q8_0(matrix)
    n, k = matrix.shape
    if block_format.name in FLOATS:
        dtype = FLOATS[block_format.name]
        if matrix.dtype == dtype and k % block_format.block == 0 and matrix.flags.c_contiguous:
            return matrix.view(np.uint8)
        padded = np.zeros((n, block_format.depth(k) * block_format.block), dtype)
        padded[:, :k] = matrix
        return padded.view(np.uint8)
    values = matrix.astype(np.float32, copy=False)
    if padding := -k % block_format.block:
        values = np.pad(values, ((0, 0), (0, padding)))
    return quantize(values, block_format.name)


def _round_to_q8_0(matrix: NDArray[Any]) -> NDArray[np.uint8]:
    """A matrix [N, K] as blocks of Q8_0.

    32 elements of a row share a float16 scale (`block_q8_0` of the ggml project), and become the nearest of 255 steps.
    The largest magnitude becomes 127, or less where float16 has no scale that small. Values too large for float16
    scales give infinite scales.
    """
    n, k = matrix.shape
    block_format = FORMATS["Q8_0"]
    blocks = np.empty((n, block_format.depth(k)), np.dtype([("scale", "<f2"), ("values", "i1", block_format.block)]))
    count = max(1, _BATCH_VALUES // k)
    for start in range(0, n, count):
        rows = slice(start, start + count)
        _round_rows(np.asarray(matrix[rows], np.float32), blocks["values"][rows], blocks["scale"][rows])
    return blocks.view(np.uint8)


def _round_rows(matrix: NDArray[np.float32], values: NDArray[np.int8], scales: NDArray[np.float16]) -> None:
    n, k = matrix.shape
    block = values.shape[2]
    groups = np.pad(matrix, ((0, 0), (0, -k % block))).reshape(n, -1, block)
    with np.errstate(all="ignore"):
        largest = np.abs(groups).max(axis=2)
        scales[:] = largest / _LARGEST
        # The nearest subnormal float16 may be so much smaller that 127 steps would not reach the largest value.
        too_small = largest > (_LARGEST + 0.5) * scales.astype(np.float32)
        scales[too_small] = np.nextafter(scales[too_small], np.float16(np.inf))
        steps = scales.astype(np.float32)[:, :, None]
        # Divide by the stored scale: its rounding to float16 then adds no second error.
        rounded = np.where(steps > 0, np.rint(groups / steps), 0)
        values[:] = np.clip(np.nan_to_num(rounded), -_LARGEST, _LARGEST)


def half_split(values: NDArray[Any], heads: int, rotated: int, start: int = 0) -> NDArray[Any]:
    """Reorder the `rotated` rows of each head from `start` on from [e, 2], as in GGUF files of the Llama family, to
    [2, e]."""
    if not heads:
        return values
    rows = values.reshape(heads, -1, *values.shape[1:])
    before, pairs, after = np.split(rows, (start, start + rotated), axis=1)
    halves = pairs.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(pairs.shape)
    return np.concatenate([before, halves, after], 1).reshape(values.shape)


def all_finite(values: NDArray[Any]) -> bool:
    flat = values.reshape(-1)
    is_bf16 = values.dtype == ml_dtypes.bfloat16
    for start in range(0, flat.size, _CHECK_VALUES):
        run = flat[start : start + _CHECK_VALUES]
        # ml_dtypes' isfinite is many times slower than a test of the bits.
        finite = (run.view(np.uint16) & _BF16_EXPONENT) != _BF16_EXPONENT if is_bf16 else np.isfinite(run)
        if not finite.all():
            return False
    return True


class Arena:
    """Memory for many weights together: numpy asks for huge pages for large arrays only.

    Reading a large weight from pages of 4 KiB takes about 1.25 times as long (docs/design.md).
    """

    def __init__(self, size: int = _ARENA_BYTES) -> None:
        self._size = size
        self._rest: NDArray[np.uint8] = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An uninitialized array that a device takes over without a copy."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        padding = -self._rest.ctypes.data % _ALIGNMENT
        if self._rest.size < padding + nbytes:
            self._rest = np.empty(max(self._size, nbytes + _ALIGNMENT), np.uint8)
            padding = -self._rest.ctypes.data % _ALIGNMENT
        memory, self._rest = self._rest[padding : padding + nbytes], self._rest[padding + nbytes :]
        return memory.view(dtype).reshape(shape)
