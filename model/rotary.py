"""The seam for rotary position embedding and the write to the cache."""

from functools import partial

import jax.numpy as jnp
from jax import Array

from model.kernels import cpu
from model.kernels.dispatch import by_platform
from model.kv_cache import JoinedPages, LayerPages, SplitPages, addresses
from model.rope import Rope


def rotary_angles(positions: Array, head_dim: int, rope: Rope | None) -> tuple[Array, Array]:
    """cos and sin [R, T, 1, E/2] float32 of each position, angles in float32 throughout; None turns nothing."""
    if rope is None:
        shape = (*positions.shape, 1, head_dim // 2)
        return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    frequencies = 1.0 / (rope.theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))
    if rope.divisors:
        frequencies = frequencies / jnp.asarray(rope.divisors, jnp.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if rope.scale == 1 else (cos * jnp.float32(rope.scale), sin * jnp.float32(rope.scale))


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (e, e + E/2) of x [R, T, heads, E] float32 by the angles of its positions."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rotate_and_store(
    heads: Array, angles: tuple[Array, Array], pages: LayerPages, tables: Array, positions: Array
) -> tuple[Array, LayerPages]:
    """Rotates the queries and keys of new tokens and stores their keys and values.

    Args:
        heads: [R, T, H + 2 K, E] float32: queries, keys, values.
        angles: cos and sin of `rotary_angles`.
        pages: of the layer.
        tables: [R, P] int32 pages of each row in order.
        positions: [R, T] int32, -1 for padding.

    Returns:
        Queries [R, T, H, E] float32, rotated, and the pages with the new tokens in them.
    """
    if isinstance(pages, JoinedPages):
        return rotate_and_store_in_xla(heads, *angles, pages, tables, positions)
    arguments = (heads, *angles, pages, tables, positions)
    stored: tuple[Array, LayerPages] = by_platform(*arguments, on_cpu=_on_cpu, xla=rotate_and_store_in_xla)
    return stored


def _on_cpu(
    heads: Array, cos: Array, sin: Array, pages: SplitPages, tables: Array, positions: Array
) -> tuple[Array, SplitPages]:
    queries, keys, values = cpu.rotate_and_store(heads, cos, sin, pages.keys, pages.values, tables, positions)
    return queries, SplitPages(keys, values)


def rotate_and_store_in_xla(
    heads: Array, cos: Array, sin: Array, pages: LayerPages, tables: Array, positions: Array
) -> tuple[Array, LayerPages]:
    """`rotate_and_store` for any platform, as XLA compiles it."""
    K = pages.kv_heads
    H = heads.shape[2] - 2 * K
    turn = partial(rotate, cos=cos, sin=sin)
    stored = pages.store(turn(heads[:, :, H : H + K]), heads[:, :, H + K :], addresses(tables, positions))
    return turn(heads[:, :, :H]), stored
