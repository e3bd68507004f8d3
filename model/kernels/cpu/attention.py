"""Attention over cache pages, without gathering a copy of them or computing padding."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model.kernels.cpu.library import ATTENTION_TARGET


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    tables: Array,
    positions: Array,
    *,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> Array:
    """Causal attention of each query over its row's cached tokens, itself included, in the order of attention.h.

    A query has the same bits in every batch and chunk. Padding costs nothing and gives zeros.

    Args:
        queries: [R, T, H, E] float32.
        keys, values: [N, K, 64, E] bfloat16 or float32 pages.
        tables: [R, P] int32 pages of each row in order.
        positions: [R, T] int32, -1 for padding.
        scale: factor of the scores.
        window: tokens that a query attends to, itself included; 0 = all before it.
        cap: replaces a score by cap * tanh(score / cap); 0 = off.

    Returns:
        [R, T, H * E] float32.
    """
    R, T, H, E = queries.shape
    call = jax.ffi.ffi_call(ATTENTION_TARGET, jax.ShapeDtypeStruct((R, T, H * E), jnp.float32))
    return call(
        queries, keys, values, tables, positions, window=np.int64(window), scale=np.float32(scale), cap=np.float32(cap)
    )
