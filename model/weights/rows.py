"""A weight as runs of its rows, so that a large one is never held twice."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.host_memory import aligned_empty
from model.weights.int8 import GROUP, Int8Array


@dataclass(frozen=True, slots=True)
class Rows:
    """A weight's rows in order. They can be read once."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    runs: Callable[[], Iterator[NDArray[Any]]]  # each of some rows, not used again by whoever makes it

    def whole(self) -> NDArray[Any]:
        """All rows in one array, which a device takes over as it is."""
        array, at = aligned_empty(self.shape, self.dtype), 0
        for run in self.runs():
            array[at : at + len(run)] = run
            at += len(run)
        return array


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """A matrix's rows in order, as int8 with scales. They can be read once."""

    shape: tuple[int, ...]
    runs: Callable[[], Iterator[Int8Array]]

    def whole(self) -> Int8Array:
        """All rows."""
        n, k = self.shape
        made, at = Int8Array(np.empty((n, k), np.int8), np.empty((n, -(-k // GROUP)), np.float16)), 0
        for run in self.runs():
            end = at + len(run.values)
            made.values[at:end], made.scales[at:end] = run.values, run.scales
            at = end
        return made
