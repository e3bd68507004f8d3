"""Log-prob, unique rank and exact top-k of rows of logits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from model.activations import soft_cap_in_xla
from model.kernels import cpu
from model.kernels.dispatch import Kernels
from model.linear import all_live, matmul, operands
from model.packed import PackedWeight
from model.reduce import log_sum_exp, parts_of
from model.sharding import UNSHARDED, VocabAxis
from model.token_logprobs import NO_ID, TokenLogprobs
from model.transformer import Transformer

BLOCK = 128


def token_logprobs(
    logits: Array,
    ids: Array,
    k: int,
    requested_ids: Array,
    kernels: Kernels,
    live: Array | None = None,
    axis: VocabAxis = UNSHARDED,
) -> TokenLogprobs:
    """Log-probs and ranks of one token per row, of the k best tokens and of requested ids.

    Args:
        logits: [R, V] float32.
        ids: [R] int32, the token of each row.
        k: number of best tokens.
        requested_ids: [R, B] int32, padded with NO_ID; results of an id outside the vocabulary are undefined.
        kernels: the model's.
        live: [] int32, None = R: later rows are padding, and their results are undefined.
        axis: V of the logits; sharded logits stay in their shards.
    """
    live = all_live(ids) if live is None else live
    with jax.named_scope("logprobs"):
        if axis.shards > 1:
            return token_logprobs_in_xla(logits, ids, requested_ids, live, k=k, axis=axis)
        on_cpu, xla = partial(cpu.token_logprobs, k=k), partial(token_logprobs_in_xla, k=k)
        logprobs: TokenLogprobs = kernels.dispatch(logits, ids, requested_ids, live, on_cpu=on_cpu, xla=xla)
        return logprobs


def head_logprobs(
    module: Transformer, hidden: Array, ids: Array, k: int, requested_ids: Array, live: Array
) -> TokenLogprobs:
    """`token_logprobs` of hidden states [M, D], without computing full logits if the head's weight is packed."""
    weight, axis, kernels = module.head_weight(), module.spec.parallel.vocab_axis, module.spec.kernels
    if not isinstance(weight, PackedWeight) or axis.shards > 1:
        return token_logprobs(module.logits(hidden, live), ids, k, requested_ids, kernels, live, axis)
    options: dict[str, Any] = {"k": k, "cap": module.config.logit_cap}
    xla = partial(_score_in_xla, kernels=kernels, **options)
    with jax.named_scope("head"):
        arguments = (*operands(hidden, weight), ids, requested_ids, live)
        logprobs: TokenLogprobs = kernels.dispatch(*arguments, on_cpu=partial(cpu.score, **options), xla=xla)
        return logprobs


def all_logprobs(logits: Array, kernels: Kernels, live: Array | None = None, axis: VocabAxis = UNSHARDED) -> Array:
    """Log-probs [R, V] float32 of logits [R, V] float32, equal to those of `token_logprobs` to the last bit."""
    with jax.named_scope("logprobs"):
        return logits - _normalizer(logits, kernels, all_live(logits) if live is None else live, axis)[:, None]


def allowed_logmass(logits: Array, masked: Array, kernels: Kernels, live: Array, axis: VocabAxis = UNSHARDED) -> Array:
    """Log of the probability [R] float32 of the tokens that a mask allows, in the distribution of the logits [R, V].

    `masked` are the logits with -inf for the others. The result is 0 if there are none, and equal to the log-prob of
    `token_logprobs`, to the last bit, if one token is allowed.
    """
    with jax.named_scope("allowed_mass"):
        allowed = _normalizer(masked, kernels, live, axis)
        return jnp.minimum(allowed - _normalizer(logits, kernels, live, axis), 0.0)


def _normalizer(logits: Array, kernels: Kernels, live: Array, axis: VocabAxis) -> Array:
    """log(sum(exp(logits))) [R] of logits [R, V], that of `token_logprobs`."""
    if axis.shards > 1:
        return _normalizer_in_xla(logits, live, axis)
    normalizer: Array = kernels.dispatch(logits, live, on_cpu=cpu.normalizer, xla=_normalizer_in_xla)
    return normalizer


def token_logprobs_in_xla(
    logits: Array, ids: Array, requested_ids: Array, live: Array, *, k: int, axis: VocabAxis = UNSHARDED
) -> TokenLogprobs:
    """`token_logprobs` on any platform, as XLA compiles it."""
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


def _score_in_xla(
    hidden: Array, weight: PackedWeight, *arguments: Array, kernels: Kernels, k: int, cap: float
) -> TokenLogprobs:
    live = arguments[-1]
    logits = matmul(hidden, weight, kernels, live)
    return token_logprobs_in_xla(soft_cap_in_xla(logits, live, cap=cap) if cap else logits, *arguments, k=k)


def canonicalize_zero(logits: Array) -> Array:
    """The logits with -0 replaced by +0: they are equal in a comparison, but not in a sort."""
    return jnp.where(logits == 0, 0.0, logits)


def _normalizer_in_xla(logits: Array, _live: Array, axis: VocabAxis = UNSHARDED) -> Array:
    """log(sum(exp(logits))) [R] of logits [R, V].

    The barrier prevents XLA from computing it again, by other code, inside each of its users.
    """
    normalizer: Array = jax.lax.optimization_barrier(log_sum_exp(logits, axis))
    return normalizer


def _logit_and_rank(logits: Array, ids: Array, axis: VocabAxis) -> tuple[Array, Array]:
    """Logit [R] and rank [R] int32 of one id per row.

    The rank is 1 + #(logit > x) + #(logit == x and lower id), counted over the full vocabulary: the position in a
    stable descending sort.
    """
    logit = axis.take(logits, ids[:, None])
    first = axis.offset(logits.shape[1])
    with jax.named_scope("rank"):
        ahead = jnp.zeros((logits.shape[0], 1), jnp.int32)
        for i, part in enumerate(parts_of(logits)):
            lower = first + i * part.shape[1] + jnp.arange(part.shape[1], dtype=jnp.int32) < ids[:, None]
            ahead = ahead + ((part > logit) | ((part == logit) & lower)).astype(jnp.int32)
        return logit[:, 0], 1 + axis.psum(jnp.sum(ahead, axis=-1))


def _requested_logits_and_ranks(logits: Array, ids: Array, axis: VocabAxis) -> tuple[Array, Array]:
    """Logits and ranks [R, B] of ids [R, B]: one pass over the vocabulary per id of the row that has most."""
    rounds = jnp.max(jnp.sum(ids != NO_ID, axis=1))

    def fill_column(column: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        logit, rank = _logit_and_rank(logits, ids[:, column], axis)
        return results[0].at[:, column].set(logit), results[1].at[:, column].set(rank)

    zeros = jnp.zeros(ids.shape, jnp.float32), jnp.zeros(ids.shape, jnp.int32)
    results: tuple[Array, Array] = jax.lax.fori_loop(0, rounds, fill_column, zeros)
    return results


def blocks_of(x: Array, padding: float = -jnp.inf) -> Array:
    """x [R, V] as [R, ceil(V / 128), 128], padded at the end."""
    R, V = x.shape
    padded = jnp.pad(x, ((0, 0), (0, -V % BLOCK)), constant_values=padding)
    return padded.reshape(R, -1, BLOCK)


def blocked_top_k(x: Array, k: int, axis: VocabAxis = UNSHARDED) -> tuple[Array, Array]:
    """Exact stable top-k of x [R, V]: values and ids [R, k], best first, equal values by ascending id.

    The k best values are in the k blocks with the best maxima (equal maxima: the blocks first in order), and among
    equal values those blocks hold the lowest ids. A plain `lax.top_k` next to other uses of the same logits becomes a
    full sort on CPU. x must hold no NaN. Zeros are canonicalized before each sort.
    If V is sharded, the best are among the best of each shard, which stay in the order of their ids.
    """
    if axis.shards > 1:
        best, best_ids = blocked_top_k(x, min(k, x.shape[1]))
        best, best_ids = (_join_shards(axis.all_gather(part)) for part in (best, best_ids + axis.offset(x.shape[1])))
        best, index = jax.lax.top_k(best, k)
        return best, jnp.take_along_axis(best_ids, index, axis=1)
    blocks = blocks_of(x)
    count = min(k, blocks.shape[1])
    _, chosen = jax.lax.top_k(canonicalize_zero(blocks.max(axis=-1)), count)
    chosen = jnp.sort(chosen, axis=-1)  # ascending, so that candidates are in the order of their ids
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(x.shape[0], count * BLOCK)
    values, index = jax.lax.top_k(canonicalize_zero(candidates), k)
    ids = jnp.take_along_axis(chosen, index // BLOCK, axis=1) * BLOCK + index % BLOCK
    return values, ids.astype(jnp.int32)


def _join_shards(x: Array) -> Array:
    """x [shards, R, k] as [R, shards * k]."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)
