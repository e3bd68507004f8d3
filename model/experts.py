"""Mixtures of experts: the choice of a token's experts, and products of tokens that are sorted by expert.

Shapes do not depend on the choice: M tokens with k experts each are M k rows, in the order of their experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import Array

from model.config import Experts
from model.kernels import cpu
from model.kernels.dispatch import Kernels
from model.layout import COLUMN_BLOCK
from model.linear import matmul, operands
from model.packed import Packed, PackedWeight

_LANES = 16  # float32 in the longest vector
_BLOCK_ROWS = 16  # rows of a product in XLA: the same for any number of tokens, as its last bits depend on it


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Routes:
    """M k rows, row m k + j being the j-th expert of token m, sorted by expert; those of padding are last."""

    weights: Array  # [M, k] float32 of each token's experts, the best first
    ids: Array  # [M, k] int32 of the experts
    order: Array  # [M k] int32: the row at each place
    places: Array  # [M k] int32: the place of each row
    starts: Array  # [X + 1] int32: places where the rows of each expert start, and their end

    @property
    def live(self) -> Array:
        """Number of places that are not padding, [] int32."""
        return self.starts[-1]


def router_logits(x: Array, weight: Array | Packed, kernels: Kernels, live: Array) -> Array:
    """x [M, D] times the router's weight [X, D], in float32: [M, X]. Rows from `live` on are padding.

    XLA:CPU computes few columns by code that depends on the number of rows.
    """
    if not isinstance(weight, Array):
        return matmul(x, weight, kernels, live)
    logits: Array = kernels.dispatch(
        x.astype(weight.dtype), weight, live, on_gpu=_plain, on_tpu=_plain, xla=_with_equal_bits
    )
    return logits


def _plain(x: Array, weight: Array, _live: Array) -> Array:
    return matmul(x, weight, Kernels())


def _with_equal_bits(x: Array, weight: Array, live: Array) -> Array:
    return _by_blocks(x, weight, jnp.stack([jnp.int32(0), live]))


def route(logits: Array, live: Array, experts: Experts, kernels: Kernels, choice_bias: Array | None = None) -> Routes:
    """The routes of tokens with logits [M, X] float32; tokens from `live` on are padding.

    A softmax's weights are those of all experts, or of the chosen ones. Sigmoids are the weights themselves, and
    `choice_bias` [X] float32 is added to them for the choice only (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report").
    Of equal experts the lower id is chosen.
    """
    bias = jnp.zeros(logits.shape[1], jnp.float32) if choice_bias is None else choice_bias
    choose = partial(_choose, experts=experts)
    fields = kernels.dispatch(
        logits,
        bias,
        live,
        on_cpu=partial(cpu.route, experts=experts),
        on_gpu=partial(_route_in_xla, choose),
        on_tpu=partial(_route_in_xla, choose),
        xla=partial(_route_in_xla, partial(_choose_by_blocks, choose)),
    )
    return Routes(*fields)


def _route_in_xla(
    choose: Callable[[Array, Array], tuple[Array, Array]], logits: Array, bias: Array, live: Array
) -> tuple[Array, ...]:
    """The fields of Routes in order."""
    weights, ids = choose(logits, bias)
    (M, k), count = ids.shape, logits.shape[1]
    keys = jnp.where(jnp.arange(M)[:, None] < live, ids, count).reshape(M * k)
    starts = jnp.sum(keys[:, None] < jnp.arange(count + 1), axis=0, dtype=jnp.int32)
    order = jnp.argsort(keys, stable=True).astype(jnp.int32)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(M * k, dtype=jnp.int32))
    return weights, ids, order, places, starts


def _choose(logits: Array, bias: Array, *, experts: Experts) -> tuple[Array, Array]:
    """Weights and ids [M, k] of the experts of tokens with logits [M, X]."""
    k = experts.per_token
    if experts.scoring == "sigmoid":
        scores = _sigmoids(logits)
        _, ids = jax.lax.top_k(_in_open_groups(scores + bias, experts), k)
        chosen = jnp.take_along_axis(scores, ids, axis=1)
        total = _sum(chosen) + jnp.float32(1e-20) if experts.normalized else jnp.ones((len(ids), 1), jnp.float32)
        total = jnp.where(jnp.isnan(logits).any(axis=1, keepdims=True), jnp.nan, total)
    else:
        best, ids = jax.lax.top_k(_in_open_groups(logits, experts), k)
        chosen = _exponentials(best, best[:, :1])
        total = _sum(chosen if experts.normalized else _exponentials(logits, best[:, :1]))
    return (chosen / total)[:, :k] * jnp.float32(experts.scale), ids


def _in_open_groups(keys: Array, experts: Experts) -> Array:
    """Keys [M, X], -inf in all but the best groups: those of the best logit, or of the two best sigmoids together."""
    keys = jnp.where(keys == 0, 0.0, keys)  # XLA sorts -0 before 0
    if experts.open_groups == experts.groups:
        return keys
    groups = keys.reshape(len(keys), experts.groups, -1)
    best = jax.lax.top_k(groups, 2 if experts.scoring == "sigmoid" else 1)[0]
    values = best[:, :, 0] + best[:, :, 1] if experts.scoring == "sigmoid" else best[:, :, 0]
    _, ids = jax.lax.top_k(values, experts.open_groups)
    is_open = (ids[:, :, None] == jnp.arange(experts.groups)).any(axis=1)
    return jnp.where(is_open[:, :, None], groups, -jnp.inf).reshape(keys.shape)


def _sigmoids(x: Array) -> Array:
    """Sigmoids [M, N], computed in full vectors as in `_exponentials`."""
    sigmoids: Array = jax.lax.optimization_barrier(jax.nn.sigmoid(jnp.pad(x, ((0, 0), (0, -x.shape[1] % _LANES)))))
    return sigmoids[:, : x.shape[1]]


def _exponentials(x: Array, largest: Array) -> Array:
    """exp(x - largest) [M, W] of x [M, N], with zeros up to full vectors: XLA has other code for the rest of a loop."""
    missing = -x.shape[1] % _LANES
    exponentials = jnp.exp(jnp.pad(x, ((0, 0), (0, missing)), constant_values=-jnp.inf) - largest)
    # Otherwise XLA computes them again for the levels of a sum.
    kept: Array = jax.lax.optimization_barrier(exponentials)
    return kept


def _sum(x: Array) -> Array:
    """Sum over the last axis of x [M, W], as a tree: XLA's order would depend on the place of a row."""
    width = 1 << (x.shape[1] - 1).bit_length()
    x = jnp.pad(x, ((0, 0), (0, width - x.shape[1])))
    while width > 1:
        width //= 2
        x = x[:, :width] + x[:, width:]
    return x


def _choose_by_blocks(
    choose: Callable[[Array, Array], tuple[Array, Array]], logits: Array, bias: Array
) -> tuple[Array, Array]:
    """XLA:CPU adds few numbers in another order than many, and takes exponentials by other code: so by equal blocks."""
    M, X = logits.shape
    count = max(2, -(-M // _BLOCK_ROWS))  # of one block XLA would make no loop
    blocks = jnp.pad(logits, ((0, count * _BLOCK_ROWS - M), (0, 0))).reshape(count, _BLOCK_ROWS, X)
    weights, ids = jax.lax.map(lambda block: choose(block, bias), blocks)
    return weights.reshape(-1, weights.shape[2])[:M], ids.reshape(-1, ids.shape[2])[:M]


def combine(y: Array, routes: Routes, live: Array, kernels: Kernels) -> Array:
    """The weighted sum [M, D] of each token's experts, the best first, of rows y [M k, D] float32 in sorted order."""
    combined: Array = kernels.dispatch(y, routes.places, routes.weights, live, on_cpu=cpu.combine, xla=_combine_in_xla)
    return combined


def _combine_in_xla(y: Array, places: Array, weights: Array, _live: Array) -> Array:
    M, k = weights.shape
    of_tokens = y[places].reshape(M, k, -1)
    return reduce(jnp.add, (of_tokens[:, j] * weights[:, j, None] for j in range(k)))


def expert_matmul(x: Array, weight: Array | Packed, routes: Routes, kernels: Kernels) -> Array:
    """Rows x [M k, K], sorted by expert, times their experts' matrices of a weight [X N, K]: [M k, N] float32.

    The arithmetic is that of `matmul`. Rows of padding are undefined.
    """
    return grouped_matmul(x, weight, routes.starts, kernels)


def grouped_matmul(x: Array, weight: Array | Packed, starts: Array, kernels: Kernels) -> Array:
    """`expert_matmul` of rows x [M, K], with the rows of expert e from starts[e] on; starts [X + 1] int32."""
    if not isinstance(weight, PackedWeight):
        assert isinstance(weight, Array)
        return _by_blocks(x.astype(weight.dtype), weight, starts)
    y: Array = kernels.dispatch(*operands(x, weight), starts, on_cpu=cpu.expert_linear, xla=_by_blocks)
    return y


def add_biases(y: Array, biases: Array | None, routes: Routes) -> Array:
    """Rows y [M k, N], sorted by expert, plus their experts' rows of biases [X N]."""
    if biases is None:
        return y
    return y + biases.reshape(-1, y.shape[1])[routes.ids.reshape(-1)[routes.order]]


def _by_blocks(x: Array, weight: Array | PackedWeight, starts: Array) -> Array:
    """The products on any platform: blocks of rows of one expert, one after another.

    A block may reach into the rows of the next expert; what it leaves there is overwritten by later blocks.
    """
    rows, count = x.shape[0], starts.shape[0] - 1
    sizes = -(-(starts[1:] - starts[:-1]) // _BLOCK_ROWS)  # of each expert in blocks
    ends = jnp.cumsum(sizes)
    padded = jnp.pad(x, ((0, _BLOCK_ROWS), (0, 0)))

    def add_block(i: Array, y: Array) -> Array:
        expert = jnp.sum(ends <= i)
        start = starts[expert] + (i - ends[expert] + sizes[expert]) * _BLOCK_ROWS
        block = jax.lax.dynamic_slice_in_dim(padded, start, _BLOCK_ROWS)
        product = matmul(block, _matrix(weight, expert, count), Kernels())
        return jax.lax.dynamic_update_slice_in_dim(y, product, start, 0)

    N = (weight.n if isinstance(weight, PackedWeight) else weight.shape[0]) // count
    empty = jnp.zeros((rows + _BLOCK_ROWS, N), jnp.float32)
    y: Array = jax.lax.fori_loop(0, ends[-1], add_block, empty)
    return y[:rows]


def _matrix(weight: Array | PackedWeight, expert: Array, count: int) -> Array | PackedWeight:
    """The matrix [N, K] of one of `count` experts."""
    if isinstance(weight, Array):
        N = weight.shape[0] // count
        return jax.lax.dynamic_slice_in_dim(weight, expert * N, N)
    N = weight.n // count
    blocks = N // COLUMN_BLOCK
    arrays: PackedWeight = jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, expert * blocks, blocks), weight
    )
    return replace(arrays, n=N)
