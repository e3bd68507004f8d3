"""Rotary position embedding, writes to the cache, and attention over its pages, by a kernel or by XLA."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from model.kernels import ScoreOptions, cpu, gpu, tpu
from model.kernels.dispatch import Implementation, Kernels
from model.kv_cache import PAGE_SIZE, Addresses, JoinedPages, LatentPages, LayerPages, SplitPages, addresses_of
from model.rope import Rope

# XLA:CPU multiplies small and large matrices by different code, with different last bits: with this many query rows a
# decode step takes the same route as a prefill chunk (measured: 18 rows differ, 24 do not; docs/design.md).
_MIN_QUERIES = 32
_EXACT = jax.lax.Precision.HIGHEST  # otherwise a GPU or TPU rounds the operands
_MASKED = -1e30  # finite, so that a row of padding gives no NaN


def rotary_angles(positions: Array, head_dim: int, rope: Rope | None) -> tuple[Array, Array]:
    """cos and sin [R, T, 1, e] float32 of each position, computed in float32; without a rope, of angle 0.

    e is half the number of rotated dimensions: E/2, if the rope does not say otherwise.
    """
    if rope is None:
        shape = (*positions.shape, 1, head_dim // 2)
        return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    head_dim = rope.dims or head_dim
    frequencies = 1.0 / (rope.theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))
    if rope.divisors:
        frequencies = frequencies / jnp.asarray(rope.divisors, jnp.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if rope.scale == 1 else (cos * jnp.float32(rope.scale), sin * jnp.float32(rope.scale))


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs (i, i + e) of x [R, T, heads, E] float32 by the angles of its positions; i < e."""
    half = cos.shape[-1]
    a, b, rest = jnp.split(x, (half, 2 * half), axis=-1)
    rotated = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate([*rotated, rest] if rest.shape[-1] else rotated, axis=-1)


def rotate_and_store(
    heads: Array, angles: tuple[Array, Array], pages: LayerPages, addresses: Addresses, kernels: Kernels
) -> tuple[Array, LayerPages]:
    """Rotate the queries and keys of new tokens and store their keys and values.

    Args:
        heads: [R, T, H + 2 K, E] float32: queries, keys, values.
        angles: cos and sin of `rotary_angles`.
        pages: the layer's.
        addresses: of the tokens.
        kernels: the model's.

    Returns:
        Queries [R, T, H, E] float32, rotated, and the updated pages.
    """
    arguments = (heads, *angles, pages, addresses.tables, addresses.positions)
    if isinstance(pages, JoinedPages):
        return rotate_and_store_in_xla(*arguments)
    stored: tuple[Array, LayerPages] = kernels.dispatch(
        *arguments, on_cpu=_rotate_and_store_on_cpu, xla=rotate_and_store_in_xla
    )
    return stored


def _rotate_and_store_on_cpu(
    heads: Array, cos: Array, sin: Array, pages: SplitPages, tables: Array, positions: Array
) -> tuple[Array, SplitPages]:
    queries, keys, values = cpu.rotate_and_store(heads, cos, sin, pages.keys, pages.values, tables, positions)
    return queries, SplitPages(keys, values)


def rotate_and_store_in_xla(
    heads: Array, cos: Array, sin: Array, pages: LayerPages, tables: Array, positions: Array
) -> tuple[Array, LayerPages]:
    """`rotate_and_store` on any platform, as XLA compiles it."""
    K = pages.kv_heads
    H = heads.shape[2] - 2 * K
    keys = rotate(heads[:, :, H : H + K], cos, sin)
    stored = pages.store(keys, heads[:, :, H + K :], addresses_of(tables, positions))
    return rotate(heads[:, :, :H], cos, sin), stored


def attend(
    queries: Array,
    pages: LayerPages,
    addresses: Addresses,
    kernels: Kernels,
    options: ScoreOptions,
    sinks: Array | None = None,
) -> Array:
    """Causal attention of each query over its row's cached tokens, itself included.

    In every implementation the cost follows the true length, and pages add to a query's result in the same order in a
    prefill chunk as in a decode step.

    Args:
        queries: [R, T, H, E] float32, rotated.
        pages: the layer's.
        addresses: of the queries' tokens.
        kernels: the model's.
        options: the layer's.
        sinks: [H] float32, a further score of each head, whose value is zero (Xiao et al. 2023, "attention sinks").

    Returns:
        [R, T, H * E] float32, undefined for padding.
    """
    tables = addresses.tables
    implementations: dict[str, Implementation] = {"xla": attend_in_xla}
    if isinstance(pages, SplitPages | LatentPages):
        implementations["on_cpu"] = _attend_on_cpu
        if isinstance(pages, SplitPages) and gpu.supports_pages(queries.shape[3], pages.keys.dtype):
            implementations["on_gpu"] = _attend_on_gpu
    elif tpu.supports_tables(tables.shape) and sinks is None:
        implementations["on_tpu"] = _attend_on_tpu
    bound = {platform: partial(function, options=options) for platform, function in implementations.items()}
    arguments = (queries, pages, tables, addresses.positions, *(() if sinks is None else (sinks,)))
    result: Array = kernels.dispatch(*arguments, **bound)
    return result


def _attend_on_cpu(queries: Array, pages: SplitPages | LatentPages, *arguments: Array, options: ScoreOptions) -> Array:
    return cpu.attend(queries, pages.keys, pages.values, *arguments, options=options)


def _attend_on_gpu(queries: Array, pages: SplitPages, *arguments: Array, options: ScoreOptions) -> Array:
    if gpu.is_supported_here():
        return gpu.attend(queries, pages.keys, pages.values, *arguments, options=options)
    return attend_in_xla(queries, pages, *arguments, options=options)


def _attend_on_tpu(queries: Array, pages: JoinedPages, *arguments: Array, options: ScoreOptions) -> Array:
    return tpu.attend(queries, pages.heads, *arguments, options=options, kv_heads=pages.kv_heads)


def attend_in_xla(
    queries: Array,
    pages: LayerPages,
    tables: Array,
    positions: Array,
    sinks: Array | None = None,
    *,
    options: ScoreOptions,
) -> Array:
    """`attend` on any platform, as XLA compiles it.

    Online softmax over pages in order (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"): a
    loop over pages from the first to the last that any query attends to.
    """
    scale, window, cap = options
    R, T, H, E = queries.shape
    K, lanes = pages.kv_heads, pages.lanes
    G = H // K
    Q = max(G * T, _MIN_QUERIES)
    padding = Q - G * T
    # [R, K, Q, E]: one matrix product per row and key/value head.
    q = queries.reshape(R, T, K, G, E).transpose(0, 2, 3, 1, 4).reshape(R, K, G * T, E)
    q = jnp.pad(q * jnp.float32(scale), ((0, 0), (0, 0), (0, padding), (0, lanes - E)))
    query_positions = jnp.pad(jnp.tile(positions, (1, G)), ((0, 0), (0, padding)), constant_values=-1)[:, None, :, None]
    last_positions = jnp.max(positions, axis=1, keepdims=True)  # [R, 1]

    def page(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, total, out = carry
        k, v = pages.take(tables[:, i])  # [R, K, S, E]
        scores = jnp.einsum("rkqe,rkse->rkqs", q, k, precision=_EXACT)
        if cap:
            scores = jnp.float32(cap) * jnp.tanh(scores / jnp.float32(cap))
        key_positions = i * PAGE_SIZE + jnp.arange(PAGE_SIZE, dtype=jnp.int32)
        visible = key_positions <= query_positions
        if window:
            visible &= key_positions > query_positions - window
        scores = jnp.where(visible, scores, _MASKED)
        # Past its end a page may hold values of an earlier owner: 0 x NaN would be NaN.
        v = jnp.where((key_positions <= last_positions)[:, None, :, None], v, 0.0)
        new_best = jnp.maximum(best, scores.max(-1))
        scale = jnp.exp(best - new_best)
        p = jnp.where(visible, jnp.exp(scores - new_best[..., None]), 0.0)
        out = out * scale[..., None] + jnp.einsum("rkqs,rkse->rkqe", p, v, precision=_EXACT)
        return new_best, total * scale + p.sum(-1), out

    shape = (R, K, Q)
    best, total = jnp.full(shape, _MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    if sinks is not None:  # as if they were scores of a page before the first
        of_queries = jnp.repeat(sinks.reshape(K, G), T, axis=1)
        best, total = jnp.broadcast_to(jnp.pad(of_queries, ((0, 0), (0, padding))), shape), jnp.ones_like(total)
    start = (best, total, jnp.zeros((*shape, lanes), jnp.float32))
    end = jnp.max(positions) // PAGE_SIZE + 1
    lowest = jnp.min(jnp.where(positions < 0, jnp.max(positions), positions))
    first = jnp.maximum(lowest - window + 1, 0) // PAGE_SIZE if window else 0
    _, total, out = jax.lax.fori_loop(first, end, page, start)
    total = jnp.where(total > 0, total, 1.0)  # 0 for padding
    result: Array = (out / total[..., None])[:, :, : G * T, :E].reshape(R, K, G, T, E)
    return result.transpose(0, 3, 1, 2, 4).reshape(R, T, H * E)
