"""The one seam for attention over pages."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from model.kernels import cpu, gpu, tpu
from model.kernels.dispatch import Form, by_platform
from model.kv_cache import PAGE_SIZE, JoinedPages, LayerPages, SplitPages

# XLA:CPU multiplies small matrices by other code, with other last bits, than large ones: with this many query rows a
# decode step takes the same route as a prefill chunk (measured: 18 rows differ, 24 do not; docs/design.md).
_MIN_QUERIES = 32
_EXACT = jax.lax.Precision.HIGHEST  # a GPU or TPU would round the operands
_MASKED = -1e30  # finite, so that a row of padding gives no NaN


def attend(
    queries: Array,
    pages: LayerPages,
    tables: Array,
    positions: Array,
    *,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> Array:
    """Causal attention of each query over its row's cached tokens, itself included.

    In all forms the cost follows the true length, and a page adds to a query's result in the same order whether the
    query comes from a prefill chunk or from a decode step. What the program is compiled for decides between them, not
    the machine that compiles it.

    Args:
        queries: [R, T, H, E] float32, rotated.
        pages: of the layer.
        tables: [R, P] int32 pages of each row in order.
        positions: [R, T] int32, -1 for padding.
        scale: of the scores.
        window: how many tokens a query sees, itself included; 0 = all before it.
        cap: cap * tanh(score / cap) stands for a score; 0 = as it is.

    Returns:
        [R, T, H * E] float32; what padding gives means nothing.
    """
    options: dict[str, Any] = {"scale": scale, "window": window, "cap": cap}
    kernels = _kernels_of(pages, queries.shape, tables.shape)
    forms = {platform: partial(form, **options) for platform, form in kernels.items()}
    result: Array = by_platform(queries, pages, tables, positions, xla=partial(attend_in_xla, **options), **forms)
    return result


def _kernels_of(pages: LayerPages, queries: tuple[int, ...], tables: tuple[int, ...]) -> dict[str, Form]:
    """The kernels that read such pages, as `by_platform` names their platforms."""
    if isinstance(pages, SplitPages):
        on_gpu = {"on_gpu": _on_gpu} if gpu.takes(queries[3], pages.keys.dtype) else {}
        return {"on_cpu": _on_cpu, **on_gpu}
    return {"on_tpu": _on_tpu} if tpu.takes(queries, tables) else {}


def _on_cpu(queries: Array, pages: SplitPages, *arguments: Array, **options: Any) -> Array:
    return cpu.attend(queries, pages.keys, pages.values, *arguments, **options)


def _on_gpu(queries: Array, pages: SplitPages, *arguments: Array, **options: Any) -> Array:
    if gpu.runs_here():
        return gpu.attend(queries, pages.keys, pages.values, *arguments, **options)
    return attend_in_xla(queries, pages, *arguments, **options)


def _on_tpu(queries: Array, pages: JoinedPages, *arguments: Array, **options: Any) -> Array:
    return tpu.attend(queries, pages.heads, *arguments, kv_heads=pages.kv_heads, **options)


def attend_in_xla(
    queries: Array,
    pages: LayerPages,
    tables: Array,
    positions: Array,
    *,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> Array:
    """`attend` for any platform, as XLA compiles it.

    Online softmax over pages in order (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"): a
    loop over pages from the first to the last that any query sees.
    """
    R, T, H, E = queries.shape
    K, lanes = pages.kv_heads, pages.lanes
    G = H // K
    Q = max(G * T, _MIN_QUERIES)
    padding = Q - G * T
    # [R, K, Q, E]: one matrix product per row and key/value head.
    q = queries.reshape(R, T, K, G, E).transpose(0, 2, 3, 1, 4).reshape(R, K, G * T, E)
    q = jnp.pad(q * jnp.float32(scale), ((0, 0), (0, 0), (0, padding), (0, lanes - E)))
    query_at = jnp.pad(jnp.tile(positions, (1, G)), ((0, 0), (0, padding)), constant_values=-1)[:, None, :, None]
    last_at = jnp.max(positions, axis=1, keepdims=True)  # [R, 1]

    def page(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, total, out = carry
        k, v = pages.take(tables[:, i])  # [R, K, S, E]
        scores = jnp.einsum("rkqe,rkse->rkqs", q, k, precision=_EXACT)
        if cap:
            scores = jnp.float32(cap) * jnp.tanh(scores / jnp.float32(cap))
        key_at = i * PAGE_SIZE + jnp.arange(PAGE_SIZE, dtype=jnp.int32)
        seen = key_at <= query_at
        if window:
            seen &= key_at > query_at - window
        scores = jnp.where(seen, scores, _MASKED)
        # A page may hold what an earlier owner left behind its end: 0 x NaN would be NaN.
        v = jnp.where((key_at <= last_at)[:, None, :, None], v, 0.0)
        new_best = jnp.maximum(best, scores.max(-1))
        scale = jnp.exp(best - new_best)
        p = jnp.where(seen, jnp.exp(scores - new_best[..., None]), 0.0)
        out = out * scale[..., None] + jnp.einsum("rkqs,rkse->rkqe", p, v, precision=_EXACT)
        return new_best, total * scale + p.sum(-1), out

    shape = (R, K, Q)
    start = (
        jnp.full(shape, _MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, lanes), jnp.float32),
    )
    end = jnp.max(positions) // PAGE_SIZE + 1
    lowest = jnp.min(jnp.where(positions < 0, jnp.max(positions), positions))
    first = jnp.maximum(lowest - window + 1, 0) // PAGE_SIZE if window else 0
    _, total, out = jax.lax.fori_loop(first, end, page, start)
    total = jnp.where(total > 0, total, 1.0)  # padding saw nothing
    result: Array = (out / total[..., None])[:, :, : G * T, :E].reshape(R, K, G, T, E)
    return result.transpose(0, 3, 1, 2, 4).reshape(R, T, H * E)
