"""Log-prob, unique rank and exact top-k of rows of logits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from model.kernels import cpu
from model.kernels.dispatch import by_platform
from model.layers import soft_cap_in_xla
from model.linear import matmul
from model.reduce import log_sum_exp, parts_of
from model.sharding import WHOLE, VocabularyAxis
from model.token_logprobs import NO_ID, TokenLogprobs
from model.transformer import Transformer

BLOCK = 128


def token_logprobs(
    logits: Array,
    ids: Array,
    k: int,
    requested_ids: Array,
    live: Array | None = None,
    axis: VocabularyAxis = WHOLE,
) -> TokenLogprobs:
    """The numbers of one token per row, of its k best alternatives and of the ids that it names.

    Args:
        logits: [R, V] float32.
        ids: [R] int32, the token of each row.
        k: number of alternatives.
        requested_ids: [R, B] int32, ids of each row, then NO_ID. What an id outside the vocabulary gives means nothing.
        live: [] int32, None = R: rows after them are padding, and what they give means nothing.
        axis: of the logits; where each shard has a part of them, no logit leaves its shard.
    """
    live = _all_of(ids) if live is None else live
    with jax.named_scope("logprobs"):
        if axis.shards > 1:
            return token_logprobs_in_xla(logits, ids, requested_ids, live, k=k, axis=axis)
        on_cpu, xla = partial(cpu.token_logprobs, k=k), partial(token_logprobs_in_xla, k=k)
        logprobs: TokenLogprobs = by_platform(logits, ids, requested_ids, live, on_cpu=on_cpu, xla=xla)
        return logprobs


def head_logprobs(
    module: Transformer, hidden: Array, ids: Array, k: int, requested_ids: Array, live: Array
) -> TokenLogprobs:
    """`token_logprobs` of hidden states [M, D], with no logits at all where the head's weight is packed."""
    weight, axis = module.head_weight(), module.cut.vocabulary
    if isinstance(weight, Array) or axis.shards > 1:
        return token_logprobs(module.logits(hidden, live), ids, k, requested_ids, live, axis)
    cap = module.config.logit_cap
    with jax.named_scope("head"):
        on_cpu, xla = partial(_score_on_cpu, k=k, cap=cap), partial(_score_in_xla, k=k, cap=cap)
        logprobs: TokenLogprobs = by_platform(hidden, weight, ids, requested_ids, live, on_cpu=on_cpu, xla=xla)
        return logprobs


def all_logprobs(logits: Array, live: Array | None = None, axis: VocabularyAxis = WHOLE) -> Array:
    """Log-probs [R, V] float32 of logits [R, V] float32: for each token the bits that token_logprobs gives it."""
    with jax.named_scope("logprobs"):
        if axis.shards > 1:
            return logits - log_sum_exp(logits, axis)[:, None]
        live = _all_of(logits) if live is None else live
        normalizer: Array = by_platform(logits, live, on_cpu=cpu.normalizer, xla=_normalizer_in_xla)
        return logits - normalizer[:, None]


def token_logprobs_in_xla(
    logits: Array, ids: Array, requested_ids: Array, live: Array, *, k: int, axis: VocabularyAxis = WHOLE
) -> TokenLogprobs:
    """`token_logprobs` for any platform, as XLA compiles it."""
    normalizer = _normalizer_in_xla(logits, live, axis)
    logit, rank = _logit_and_rank(logits, ids, axis)
    top_logits, top_ids = blocked_top_k(logits, k, axis)
    requested_logits, requested_ranks = _requested_logits_and_ranks(logits, requested_ids, axis)
    return TokenLogprobs(
        logprob=logit - normalizer,
        rank=rank,
        top_ids=top_ids,
        top_logprobs=top_logits - normalizer[:, None],
        requested_logprobs=requested_logits - normalizer[:, None],
        requested_ranks=requested_ranks,
    )


def _score_on_cpu(hidden: Array, *arguments: Any, k: int, cap: float) -> TokenLogprobs:
    return cpu.score(hidden.astype(jnp.bfloat16), *arguments, k=k, cap=cap)


def _score_in_xla(hidden: Array, weight: cpu.Packed, *arguments: Array, k: int, cap: float) -> TokenLogprobs:
    live = arguments[-1]
    logits = matmul(hidden, weight, live)
    return token_logprobs_in_xla(soft_cap_in_xla(logits, live, cap=cap) if cap else logits, *arguments, k=k)


def _all_of(x: Array) -> Array:
    return jnp.asarray(x.shape[0], jnp.int32)


def canonicalize_zero(logits: Array) -> Array:
    """The logits with +0 for -0: the two are one value for the rank and two for a sort."""
    return jnp.where(logits == 0, 0.0, logits)


def _normalizer_in_xla(logits: Array, live: Array, axis: VocabularyAxis = WHOLE) -> Array:
    """What turns logits [R, V] to log-probs [R].

    The barrier keeps it from being computed once more, and by other code, inside each of its users.
    """
    del live
    normalizer: Array = jax.lax.optimization_barrier(log_sum_exp(logits, axis))
    return normalizer


def _logit_and_rank(logits: Array, ids: Array, axis: VocabularyAxis) -> tuple[Array, Array]:
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


def _requested_logits_and_ranks(logits: Array, ids: Array, axis: VocabularyAxis) -> tuple[Array, Array]:
    """Logits and ranks [R, B] of ids [R, B]: one pass over the vocabulary for each id of the row that names most."""
    rounds = jnp.max(jnp.sum(ids != NO_ID, axis=1))

    def fill_column(column: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        logit, rank = _logit_and_rank(logits, ids[:, column], axis)
        return results[0].at[:, column].set(logit), results[1].at[:, column].set(rank)

    zeros = jnp.zeros(ids.shape, jnp.float32), jnp.zeros(ids.shape, jnp.int32)
    results: tuple[Array, Array] = jax.lax.fori_loop(0, rounds, fill_column, zeros)
    return results


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
    _, chosen = jax.lax.top_k(canonicalize_zero(blocks.max(axis=-1)), count)
    chosen = jnp.sort(chosen, axis=-1)  # ascending, so that candidates stay in the order of their ids
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(x.shape[0], count * BLOCK)
    values, at = jax.lax.top_k(canonicalize_zero(candidates), k)
    ids = jnp.take_along_axis(chosen, at // BLOCK, axis=1) * BLOCK + at % BLOCK
    return values, ids.astype(jnp.int32)


def _side_by_side(x: Array) -> Array:
    """x [shards, R, k] as [R, shards * k]."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)
