"""Ragged paged attention on a TPU: the Pallas kernel that JAX ships (`jax.experimental.pallas.ops.tpu`).

It reads keys and values of a token interleaved, in full tiles: 128 elements of a head, and as many heads as fill
registers of bfloat16 pairs. Other sizes are padded with zeros, in the cache too; a TPU would pad the elements in any
case. It does not compile for heads of more than 128 elements.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from model.kernels import ScoreOptions

_LANES = 128
_BLOCK_PAGES = 8  # pages of keys per step of the kernel
_MAX_TABLE_ENTRIES = 200 << 10  # of tables, which share 1 MiB of scalar memory with other data
_BLOCK_QUERIES = 32  # tokens per block, equal in decode and prefill: a query's sums have one order in both


def supports_pages(head_dim: int, dtype: Any) -> bool:
    """Whether `attend` can read such pages: bfloat16, heads of up to 128 elements.

    It would round float32; XLA computes at full precision.
    """
    return bool(jnp.dtype(dtype) == jnp.bfloat16 and head_dim <= _LANES)


def supports_tables(tables: tuple[int, ...]) -> bool:
    """Whether `attend` takes tables [R, P] of this shape."""
    return math.prod(tables) <= _MAX_TABLE_ENTRIES


def padded_head_dim(head_dim: int) -> int:
    """E', elements of a head in whole tiles."""
    return -(-head_dim // _LANES) * _LANES


def padded_kv_heads(kv_heads: int) -> int:
    """K', key/value heads in whole tiles: 1, 2, 4 or a multiple of 8."""
    return -(-kv_heads // 8) * 8 if kv_heads > 4 else 1 << (kv_heads - 1).bit_length()


def attend(
    queries: Array,
    pages: Array,
    tables: Array,
    positions: Array,
    *,
    options: ScoreOptions,
    kv_heads: int,
) -> Array:
    """`model.attention.attend` with pages [N, S, 2 K', E'] bfloat16, each head's keys before its values.

    Padding rows, and padding tokens of a row, are last and give zeros; positions in a row are consecutive. K is
    `kv_heads`.
    """
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention  # 0.1 s, only on a TPU

    R, T, H, E = queries.shape
    stored_heads, lanes = pages.shape[2] // 2, pages.shape[3]
    G = H // kv_heads
    q = jnp.pad(
        queries.reshape(R * T, kv_heads, G, E), ((0, 0), (0, stored_heads - kv_heads), (0, 0), (0, lanes - E))
    ).reshape(R * T, stored_heads * G, lanes)
    is_token = positions >= 0
    counts = jnp.sum(is_token, axis=1, dtype=jnp.int32)
    ends = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    lengths = jnp.maximum(jnp.max(positions, axis=1) + 1, 1)
    is_packed = R > 1 and T > 1
    if is_packed:  # the kernel takes rows without padding between them
        order = jnp.argsort(~is_token.reshape(R * T), stable=True)
        q = q[order]
    out = ragged_paged_attention(
        q,
        pages,
        lengths,
        tables,
        ends,
        jnp.sum(counts > 0, dtype=jnp.int32)[None],
        sm_scale=options.scale,
        sliding_window=options.window or None,
        soft_cap=options.cap or None,
        num_kv_pages_per_block=min(_BLOCK_PAGES, tables.shape[1]),
        num_queries_per_block=_BLOCK_QUERIES,
    )
    if is_packed:
        out = out[jnp.argsort(order)]
    out = out.reshape(R, T, stored_heads, G, lanes)[:, :, :kv_heads, :, :E].reshape(R, T, H * E)
    result: Array = jnp.where(is_token[:, :, None], out, 0.0)  # the kernel does not write padding
    return jax.lax.convert_element_type(result, jnp.float32)
