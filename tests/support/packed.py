"""Weights in the layout of the CPU kernels, from arrays."""

import numpy as np
from jax.typing import ArrayLike

from model.kernels import cpu
from model.weights.rows import Int8Array


def pack(w: ArrayLike) -> cpu.PackedWeight:
    """w [N, K] packed as bfloat16."""
    rows = np.asarray(w)
    return cpu.pack(rows.shape, [rows])


def pack_int8(array: Int8Array) -> cpu.PackedInt8:
    return cpu.pack_int8(array.values.shape, [array])
