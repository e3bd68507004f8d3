"""Operations on one token at a time, each in one pass: norm, gated activation, soft cap, rotary and cache write.

A token has the same bits in every batch and chunk. Rows from `live` ([] int32) on are padding and give zeros.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from model.kernels.cpu.library import Target


def rms_norm(x: Array, weight: Array, live: Array, *, epsilon: float, dtype: DTypeLike) -> Array:
    """x / sqrt(mean(x^2) + epsilon) * weight: x [M, D] and weight [D] float32 -> [M, D], rounded to dtype."""
    call = jax.ffi.ffi_call(Target.NORM, jax.ShapeDtypeStruct(x.shape, dtype))
    return call(x, weight, live, epsilon=np.float32(epsilon))


def swiglu(gate_up: Array, live: Array, *, dtype: DTypeLike) -> Array:
    """silu(gate) * up: gate_up [M, 2 F] float32, gate first -> [M, F], rounded to dtype."""
    return _gated(Target.SWIGLU, gate_up, live, dtype)


def geglu(gate_up: Array, live: Array, *, dtype: DTypeLike) -> Array:
    """gelu(gate) * up, gelu by its tanh approximation; as `swiglu`."""
    return _gated(Target.GEGLU, gate_up, live, dtype)


def soft_cap(x: Array, live: Array, *, cap: float) -> Array:
    """cap * tanh(x / cap): x [M, N] float32 -> [M, N]."""
    return jax.ffi.ffi_call(Target.SOFT_CAP, jax.ShapeDtypeStruct(x.shape, x.dtype))(x, live, cap=np.float32(cap))


def _gated(target: str, gate_up: Array, live: Array, dtype: DTypeLike) -> Array:
    M, width = gate_up.shape
    return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((M, width // 2), dtype))(gate_up, live)


def rotate_and_store(
    heads: Array, cos: Array, sin: Array, keys: Array, values: Array, tables: Array, positions: Array
) -> tuple[Array, Array, Array]:
    """Rotate queries and keys and store keys and values in their pages, in place if the pages are donated.

    Args:
        heads: [R, T, H + 2 K, E] float32: queries, keys, values.
        cos, sin: [R, T, 1, E / 2] float32 of each token's angles.
        keys, values: [N, K, 64, E] bfloat16 or float32 pages.
        tables: [R, P] int32 pages of each row in order.
        positions: [R, T] int32, -1 for padding, which is not stored and whose queries are zeros.

    Returns:
        Queries [R, T, H, E] float32, and the pages.
    """
    R, T, all_heads, E = heads.shape
    results = (jax.ShapeDtypeStruct((R, T, all_heads - 2 * keys.shape[1], E), jnp.float32), keys, values)
    shapes = tuple(jax.ShapeDtypeStruct(result.shape, result.dtype) for result in results)
    call = jax.ffi.ffi_call(Target.ROTATE, shapes, input_output_aliases={3: 1, 4: 2})
    queries, keys, values = call(heads, cos, sin, keys, values, tables, positions)
    return queries, keys, values
