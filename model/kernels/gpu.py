"""Attention over cache pages on an NVIDIA GPU, without gathering a copy of them; long rows are split among programs.

One program of the grid has a tile of queries of one row and key/value head and loops over one part of the row's pages.
The parts are the same for every query (Dao et al. 2023, "Flash-Decoding"). Each part is an online softmax (Milakov and
Gimelshein 2018); parts are then added in order. Decode and prefill run the same tile, so a query's sums have one order
in both.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from model.kernels import ScoreOptions

_QUERIES = 64  # queries per program: a full tile of the tensor cores, even if a decode step fills only a few rows
_LARGE = 128  # head size above which a program has half as many queries, to fit into shared memory
_MIN_COMPUTE_CAPABILITY = 80  # times ten, for Triton
_PART_PAGES = 8  # minimum pages of a part
_MAX_PARTS = 16  # maximum parts of a row: their results are stored until they are added
_MIN_PIECE = 16  # elements of the smallest piece of a head that tensor cores multiply
_MASKED = -1e30  # finite, so that a row of padding gives no NaN


def supports_pages(head_dim: int, dtype: Any) -> bool:
    """Whether `attend` can read such pages: bfloat16, and a head size that is a multiple of 16.

    float32 would be multiplied without tensor cores, or rounded; XLA computes at full precision.
    """
    return jnp.dtype(dtype) == jnp.bfloat16 and head_dim % _MIN_PIECE == 0


def is_supported_here() -> bool:
    """Whether Triton supports the GPU that is being compiled for. For use while a program is lowered."""
    return bool(triton.get_gpu_info().compute_capability >= _MIN_COMPUTE_CAPABILITY)


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    tables: Array,
    positions: Array,
    sinks: Array | None = None,
    *,
    options: ScoreOptions,
    interpret: bool = False,
) -> Array:
    """`model.attention.attend` with pages keys, values [N, K, S, E] bfloat16, S a power of two.

    Queries and weights are float32 and enter a product as the sum of two bfloat16, which keeps 16 of their digits.
    `interpret` runs the kernel's operations one by one on any platform, for tests.
    """
    R, T, H, E = queries.shape
    N, K, S, _ = keys.shape
    G, P = H // K, tables.shape[1]
    parts = min(_MAX_PARTS, -(-P // _PART_PAGES))
    tile = _QUERIES if E <= _LARGE else _QUERIES // 2
    blocks = -(-T * G // tile)
    Q = blocks * tile
    stored = min(tile, 1 << (T * G - 1).bit_length())  # queries of a tile to store, fewer if one tile has them all
    padding = ((0, 0), (0, 0), (0, Q - T * G), (0, 0))
    # [R, K, Q, E]: a token's queries of one key/value head side by side.
    q = queries.reshape(R, T, K, G, E).transpose(0, 2, 1, 3, 4).reshape(R, K, T * G, E)
    q = jnp.pad(q * jnp.float32(options.scale), padding)
    query_positions = jnp.pad(jnp.repeat(positions, G, axis=1), ((0, 0), (0, Q - T * G)), constant_values=-1)
    kernel = partial(_part, page_size=S, part_pages=-(-P // parts), options=options, pieces=_pieces(E))
    pages = pl.BlockSpec((N, None, S, E), lambda _, k, __: (0, k, 0, 0))

    def of_part(*shape: int) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        spec = pl.BlockSpec(
            (None, None, None, stored, *shape),
            lambda r, k, i: (i // blocks, r, k, i % blocks, *(0,) * len(shape)),
        )
        return spec, jax.ShapeDtypeStruct((parts, R, K, blocks * stored, *shape), jnp.float32)

    specs, shapes = zip(of_part(E), of_part(), of_part(), strict=True)
    out, best, total = pl.pallas_call(
        lambda *refs: kernel(pl.program_id(2) // blocks, *refs),
        grid=(R, K, parts * blocks),
        in_specs=[
            pl.BlockSpec((None, None, tile, E), lambda r, k, i: (r, k, i % blocks, 0)),
            pl.BlockSpec((None, tile), lambda r, _, i: (r, i % blocks)),
            pl.BlockSpec((None, P), lambda r, _, __: (r, 0)),
            pages,
            pages,
        ],
        out_specs=list(specs),
        out_shape=list(shapes),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2 if E <= _LARGE else 1),
        interpret=interpret,
        name="logprobd_attention",
    )(q, query_positions, tables, keys, values)
    if sinks is not None:  # one more part, whose values are zero
        scores = jnp.tile(sinks.reshape(K, G), (1, -(-best.shape[3] // G)))[:, : best.shape[3]]
        out = jnp.concatenate([jnp.zeros_like(out[:1]), out])
        best = jnp.concatenate([jnp.broadcast_to(scores, best[:1].shape), best])
        total = jnp.concatenate([jnp.ones_like(total[:1]), total])
    result = _sum_parts(out, best, total)[:, :, : T * G].reshape(R, K, T, G, E)
    return result.transpose(0, 2, 1, 3, 4).reshape(R, T, H * E)


def _part(
    part: Array,
    q_ref: Any,  # [B, E] float32, scaled: B queries of a tile
    positions_ref: Any,  # [B] positions
    table_ref: Any,  # [P]
    keys_ref: Any,  # [N, S, E] of the head
    values_ref: Any,
    out_ref: Any,  # [A, E] sums of weighted values of the first A queries
    best_ref: Any,  # [A] greatest scores
    total_ref: Any,  # [A] sums of weights
    *,
    page_size: int,
    part_pages: int,
    options: ScoreOptions,
    pieces: list[tuple[int, int]],
) -> None:
    """Attention of a tile of queries over one part of a row."""
    window, cap = options.window, options.cap
    query_positions, count, stored = positions_ref[...], positions_ref.shape[0], best_ref.shape[0]
    last = jnp.max(query_positions)
    lowest = jnp.min(jnp.where(query_positions < 0, last, query_positions))
    first = jnp.maximum(lowest - window + 1, 0) // page_size if window else 0
    start = jnp.maximum(part * part_pages, first)
    stop = jnp.minimum((part + 1) * part_pages, last // page_size + 1)
    q = [_halves(q_ref[:, pl.ds(low, size)]) for low, size in pieces]

    def page(i: Array, carry: Any) -> Any:
        best, total, outs = carry
        number = table_ref[i]
        key_positions = i * page_size + jnp.arange(page_size, dtype=jnp.int32)
        scores = jnp.zeros((count, page_size), jnp.float32)
        for (low, size), halves in zip(pieces, q, strict=True):
            keys = keys_ref[number, :, pl.ds(low, size)]
            scores = _product(halves, keys, scores, by=1)
        if cap:
            scores = jnp.float32(cap) * jnp.tanh(scores / jnp.float32(cap))
        visible = key_positions[None, :] <= query_positions[:, None]
        if window:
            visible &= key_positions[None, :] > query_positions[:, None] - window
        scores = jnp.where(visible, scores, _MASKED)
        new_best = jnp.maximum(best, jnp.max(scores, axis=1))
        rescale = jnp.exp(best - new_best)
        weights = jnp.where(visible, jnp.exp(scores - new_best[:, None]), 0.0)
        halves = _halves(weights)
        # Past its end a page may hold values of an earlier owner: 0 x NaN would be NaN.
        exists = (key_positions <= last)[:, None]
        outs = tuple(
            _product(
                halves,
                jnp.where(exists, values_ref[number, :, pl.ds(low, size)], 0),
                out * rescale[:, None],
                by=0,
            )
            for (low, size), out in zip(pieces, outs, strict=True)
        )
        return new_best, total * rescale + jnp.sum(weights, axis=1), outs

    zeros = tuple(jnp.zeros((count, size), jnp.float32) for _, size in pieces)
    begin = (jnp.full((count,), _MASKED, jnp.float32), jnp.zeros((count,), jnp.float32), zeros)
    best, total, outs = jax.lax.fori_loop(start, stop, page, begin)
    for (low, size), out in zip(pieces, outs, strict=True):
        out_ref[:, pl.ds(low, size)] = _first(out, stored)
    best_ref[...] = _first(best, stored)
    total_ref[...] = _first(total, stored)


def _first(x: Array, count: int) -> Array:
    """The first rows of x [B, ...]; Triton has no slices, so the others are added to them as zeros."""
    if count == x.shape[0]:
        return x
    groups = x.reshape(x.shape[0] // count, count, *x.shape[1:])
    own = jnp.arange(groups.shape[0], dtype=jnp.int32).reshape(-1, *(1,) * x.ndim) == 0
    return jnp.sum(jnp.where(own, groups, 0.0), axis=0)


def _pieces(size: int) -> list[tuple[int, int]]:
    """Start and size of the pieces of a head: powers of two, as Triton requires."""
    pieces, start = [], 0
    while start < size:
        piece = 1 << ((size - start).bit_length() - 1)
        pieces.append((start, piece))
        start += piece
    return pieces


def _halves(x: Array) -> tuple[Array, Array]:
    """x float32 as the sum of two bfloat16."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _product(halves: tuple[Array, Array], y: Array, total: Array, *, by: int) -> Array:
    """total + x y in float32, where axis `by` of y is multiplied by the last of x."""
    high, low = (
        jax.lax.dot_general(x, y, (((1,), (by,)), ((), ())), preferred_element_type=jnp.float32) for x in halves
    )
    return total + (high + low)


def _sum_parts(out: Array, best: Array, total: Array) -> Array:
    """The results [R, K, Q, E] of all parts together, in order: out [parts, R, K, Q, E], best and total [..., Q]."""
    maximum = jnp.max(best, axis=0)
    sums, weights = jnp.zeros_like(out[0]), jnp.zeros_like(total[0])
    for i in range(out.shape[0]):
        share = jnp.exp(best[i] - maximum)
        sums, weights = sums + share[..., None] * out[i], weights + share * total[i]
    return sums / jnp.where(weights > 0, weights, 1.0)[..., None]  # 0 for padding
