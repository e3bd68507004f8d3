"""Log-prob, unique rank and exact top-k of rows of logits."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from compiled.state import NO_ID, TokenLogprobs
from model.kernels import cpu
from model.kernels.dispatch import by_platform
from model.layers import soft_cap_in_xla
from model.linear import matmul
from model.reduce import log_sum_exp, parts_of
from model.sharding import WHOLE, VocabularyAxis
from model.transformer import Transformer

BLOCK = 128


def token_logprobs(
    logits: Array,
    ids: Array,
    k: int,
    scored_ids: Array,
    live: Array | None = None,
    axis: VocabularyAxis = WHOLE,
) -> TokenLogprobs:
    """The numbers of one token per row, of its k best alternatives and of the ids that it names.

    Args:
        logits: [R, V] float32.
        ids: [R] int32, the token of each row.
        k: number of alternatives.
        scored_ids: [R, B] int32, ids of each row, then NO_ID. What an id outside the vocabulary gives means nothing.
        live: [] int32, None = R: rows after them are padding, and what they give means nothing.
        axis: of the logits; where each shard has a part of them, no logit leaves its shard.
    """
    live = _all_of(ids) if live is None else live
    with jax.named_scope("logprobs"):
        if axis.shards > 1:
            return token_logprobs_in_xla(logits, ids, scored_ids, live, k=k, axis=axis)
        numbers: TokenLogprobs = by_platform(logits, ids, scored_ids, live, on_cpu=_on_cpu(k), xla=_in_xla(k))
        return numbers


def head_logprobs(
    module: Transformer, hidden: Array, ids: Array, k: int, scored_ids: Array, live: Array
) -> TokenLogprobs:
    """`token_logprobs` of hidden states [M, D], with no logits at all where the head's weight is packed."""
    weight, axis = module.head_weight(), module.cut.vocabulary
    if isinstance(weight, Array) or axis.shards > 1:
        return token_logprobs(module.logits(hidden, live), ids, k, scored_ids, live, axis)
    cap = module.config.logit_cap
    with jax.named_scope("head"):
        numbers: TokenLogprobs = by_platform(
            hidden, weight, ids, scored_ids, live, on_cpu=_score_on_cpu(k, cap), xla=_score_in_xla(k, cap)
        )
        return numbers


def all_logprobs(logits: Array, live: Array | None = None, axis: VocabularyAxis = WHOLE) -> Array:
    """Log-probs [R, V] float32 of logits [R, V] float32: for each token the bits that token_logprobs gives it."""
    with jax.named_scope("logprobs"):
        if axis.shards > 1:
            return logits - log_sum_exp(logits, axis)[:, None]
        live = _all_of(logits) if live is None else live
        normalizer: Array = by_platform(logits, live, on_cpu=_normalizer_on_cpu, xla=_normalizer_in_xla)
        return logits - normalizer[:, None]


def token_logprobs_in_xla(
    logits: Array, ids: Array, scored_ids: Array, live: Array, *, k: int, axis: VocabularyAxis = WHOLE
) -> TokenLogprobs:
    """`token_logprobs` for any platform, as XLA compiles it."""
    normalizer = _normalizer_in_xla(logits, live, axis)
    own, rank = _value_and_rank(logits, ids, axis)
    values, top_ids = blocked_top_k(logits, k, axis)
    scored, scored_ranks = _scored(logits, scored_ids, axis)
    return TokenLogprobs(
        own - normalizer, rank, top_ids, values - normalizer[:, None], scored - normalizer[:, None], scored_ranks
    )


def _in_xla(k: int) -> Callable[..., TokenLogprobs]:
    return partial(token_logprobs_in_xla, k=k)


def _on_cpu(k: int) -> Callable[..., TokenLogprobs]:
    return lambda *arguments: _of_kernel(cpu.token_numbers(*arguments, k=k))


def _score_on_cpu(k: int, cap: float) -> Callable[..., TokenLogprobs]:
    return lambda hidden, *arguments: _of_kernel(cpu.score(hidden.astype(jnp.bfloat16), *arguments, k=k, cap=cap))


def _score_in_xla(k: int, cap: float) -> Callable[..., TokenLogprobs]:
    def score(hidden: Array, weight: cpu.Packed, *arguments: Array) -> TokenLogprobs:
        logits = matmul(hidden, weight, arguments[-1])
        logits = soft_cap_in_xla(logits, arguments[-1], cap=cap) if cap else logits
        return token_logprobs_in_xla(logits, *arguments, k=k)

    return score


def _of_kernel(numbers: cpu.Numbers) -> TokenLogprobs:
    return TokenLogprobs(*numbers[:-1])


def _normalizer_on_cpu(logits: Array, live: Array) -> Array:
    rows = logits.shape[0]
    nothing = jnp.zeros((rows,), jnp.int32), jnp.zeros((rows, 0), jnp.int32)
    return cpu.token_numbers(logits, *nothing, live, k=0).normalizer


def _all_of(x: Array) -> Array:
    return jnp.asarray(x.shape[0], jnp.int32)


def one_zero(logits: Array) -> Array:
    """The logits with +0 for -0: the two are one value for the rank and two for a sort."""
    return jnp.where(logits == 0, 0.0, logits)


def _normalizer_in_xla(logits: Array, live: Array, axis: VocabularyAxis = WHOLE) -> Array:
    """What turns logits [R, V] to log-probs [R].

    The barrier keeps it from being computed once more, and by other code, inside each of its users.
    """
    del live
    normalizer: Array = jax.lax.optimization_barrier(log_sum_exp(logits, axis))
    return normalizer


def _value_and_rank(logits: Array, ids: Array, axis: VocabularyAxis) -> tuple[Array, Array]:
    """Logit [R] and rank [R] int32 of one id per row.

    The rank is 1 + #(logit > own) + #(logit == own with a lower id), by comparison over the whole vocabulary: it is
    the token's position in a stable descending sort, for every k.
    """
    own = axis.take(logits, ids[:, None])
    first = axis.first(logits.shape[1])
    with jax.named_scope("rank"):
        ahead = jnp.zeros((logits.shape[0], 1), jnp.int32)
        for i, part in enumerate(parts_of(logits)):
            lower = first + i * part.shape[1] + jnp.arange(part.shape[1], dtype=jnp.int32) < ids[:, None]
            ahead = ahead + ((part > own) | ((part == own) & lower)).astype(jnp.int32)
        return own[:, 0], 1 + axis.total(jnp.sum(ahead, axis=-1))


def _scored(logits: Array, ids: Array, axis: VocabularyAxis) -> tuple[Array, Array]:
    """Logits and ranks [R, B] of ids [R, B]: one pass over the vocabulary for each id of the row that names most."""
    rounds = jnp.max(jnp.sum(ids != NO_ID, axis=1))

    def one(column: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        of_column = _value_and_rank(logits, ids[:, column], axis)
        values, ranks = (all_.at[:, column].set(new) for all_, new in zip(found, of_column, strict=True))
        return values, ranks

    start = jnp.zeros(ids.shape, jnp.float32), jnp.zeros(ids.shape, jnp.int32)
    found: tuple[Array, Array] = jax.lax.fori_loop(0, rounds, one, start)
    return found


def blocks_of(x: Array) -> Array:
    """x [R, V] as [R, ceil(V / 128), 128], padded with -inf."""
    R, V = x.shape
    padded = jnp.pad(x, ((0, 0), (0, -V % BLOCK)), constant_values=-jnp.inf)
    return padded.reshape(R, -1, BLOCK)


def blocked_top_k(x: Array, k: int, axis: VocabularyAxis = WHOLE) -> tuple[Array, Array]:
    """Exact stable top-k of x [R, V]: values and ids [R, k], best first, equal values by ascending id.

    The k best values lie in the k blocks with the best maxima (equal maxima: the blocks first in order), and among
    equal values those blocks hold the lowest ids. A plain `lax.top_k` beside other uses of the same logits becomes a
    full sort on CPU. x must hold no NaN. -0 and +0 are one value, but two for a sort: they are made one where it looks.
    Where V is cut, the best of all are among the best of each shard, which stay in the order of their ids.
    """
    if axis.shards > 1:
        best, best_ids = blocked_top_k(x, min(k, x.shape[1]))
        best, best_ids = (_side_by_side(axis.each(of_each)) for of_each in (best, best_ids + axis.first(x.shape[1])))
        best, at = jax.lax.top_k(best, k)
        return best, jnp.take_along_axis(best_ids, at, axis=1)
    blocks = blocks_of(x)
    count = min(k, blocks.shape[1])
    _, chosen = jax.lax.top_k(one_zero(blocks.max(axis=-1)), count)
    chosen = jnp.sort(chosen, axis=-1)  # ascending, so that candidates stay in the order of their ids
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(x.shape[0], count * BLOCK)
    values, at = jax.lax.top_k(one_zero(candidates), k)
    ids = jnp.take_along_axis(chosen, at // BLOCK, axis=1) * BLOCK + at % BLOCK
    return values, ids.astype(jnp.int32)


def _side_by_side(x: Array) -> Array:
    """x [shards, R, k] as [R, shards * k]."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)
