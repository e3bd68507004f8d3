"""A weight as runs of its rows, so that a large one is never held twice."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from model.weights.int8 import Int8Array, empty_int8

_ALIGNMENT = 64  # bytes; XLA:CPU takes over arrays that start at a multiple of it without a copy (`jax.device_put`)


@dataclass(frozen=True, slots=True)
class Rows:
    """A weight's rows in order. They can be read once."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    runs: Callable[[], Iterator[NDArray[Any]]]  # consecutive rows per run; the producer does not reuse the array

    def read(self) -> NDArray[Any]:
        """All rows in one array, which a device takes over without a copy."""
        array, start = aligned_empty(self.shape, self.dtype), 0
        for run in self.runs():
            array[start : start + len(run)] = run
            start += len(run)
        return array


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """A matrix's rows in order, as int8 with scales. They can be read once."""

    shape: tuple[int, ...]
    runs: Callable[[], Iterator[Int8Array]]

    def read(self) -> Int8Array:
        """All rows."""
        array, start = empty_int8(*self.shape), 0
        for run in self.runs():
            stop = start + len(run.values)
            array.values[start:stop], array.scales[start:stop] = run.values, run.scales
            start = stop
        return array


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An uninitialized array that a device takes over without a copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
