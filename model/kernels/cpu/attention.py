"""Attention over cache pages, without gathering a copy of them or computing padding."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model.kernels import ScoreOptions
from model.kernels.cpu.library import Target


def attend(
    queries: Array, keys: Array, values: Array, tables: Array, positions: Array, *, options: ScoreOptions
) -> Array:
    """`model.attention.attend` with pages keys, values [N, K, 64, E] bfloat16 or float32, in the order of attention.h.

    A query has the same bits in every batch and chunk. Padding costs nothing and gives zeros.
    """
    R, T, H, E = queries.shape
    call = jax.ffi.ffi_call(Target.ATTENTION, jax.ShapeDtypeStruct((R, T, H * E), jnp.float32))
    attributes = {"window": np.int64(options.window), "scale": np.float32(options.scale)}
    return call(queries, keys, values, tables, positions, cap=np.float32(options.cap), **attributes)
