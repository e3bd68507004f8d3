"""Choosing one token per row: greedy, temperature, top-k, top-p, min-p, a seed for each row. No sort of the vocabulary.

A token is drawn from the whole distribution by inverse CDF over blocks, then tested for membership: its rank against
top_k, the probability ahead of it against top_p. A rejected token, with everything behind it, leaves the distribution
for the next round. The allowed tokens are a prefix of the order by probability, so they are never cut, and what is
accepted follows the renormalised allowed distribution exactly. With top_p = 0.9 nine rows in ten end in round one.

Order as in vLLM: bias, penalties and mask (`adjust.py`), temperature, min_p, top_k, then top_p on what is left.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from compiled.filters import best_of, weigh
from compiled.logprobs import BLOCK
from compiled.penalties import adjust_logits, changes_logits
from compiled.state import SamplingArrays, SlotState
from model.sharding import WHOLE, VocabularyAxis

_MAX_ROUNDS = 256  # each round at least halves what is left on average; a bound all the same


def choose_tokens(
    logits: Array, sampling: SamplingArrays, slots: SlotState, rows: Array, axis: VocabularyAxis = WHOLE
) -> Array:
    """Chooses one id [R] int32 per row.

    A row whose mask forbids every token gets token 0: such a request is refused before it comes here.

    Args:
        logits: [R, V] float32.
        sampling: how each row chooses.
        slots: bias, counts and seen tokens of all requests.
        rows: [R] int32, the slot of each row.
        axis: of the logits; where it is cut, every shard comes to the same choice.
    """
    with jax.named_scope("sample"):
        samples = jnp.any(sampling.temperature > 0)

        def choose() -> Array:
            allowed = adjust_logits(logits, sampling, slots, rows, axis)
            best, best_ids = best_of(allowed, axis)
            token: Array = jax.lax.cond(
                samples, lambda: _draw(allowed, best, best_ids, sampling, axis), lambda: best_ids
            )
            return token

        # The commonest step writes nothing as large as the logits: every row greedy, none of them adjusted.
        tokens: Array = jax.lax.cond(samples | changes_logits(sampling), choose, lambda: best_of(logits, axis)[1])
        return tokens


class _Round(NamedTuple):
    number: Array  # [] int32
    done: Array  # [R] bool
    token: Array  # [R] int32
    bound: Array  # [R] float32 logit of the last rejected token
    bound_id: Array  # [R] int32 and its id: only tokens strictly ahead of it are left


def _draw(logits: Array, best: Array, best_ids: Array, sampling: SamplingArrays, axis: VocabularyAxis) -> Array:
    R, W = logits.shape
    greedy = sampling.temperature <= 0
    weights, floor, allowed_mass = weigh(logits, best, sampling, axis)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(sampling.seed), sampling.step)
    ids = axis.ids(W)

    def ahead_of(value: Array, token: Array) -> Array:
        return (logits > value[:, None]) | ((logits == value[:, None]) & (ids < token[:, None]))

    def one_round(at: _Round) -> _Round:
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, at.number)))(keys)
        token, weight = _inverse_cdf(jnp.where(ahead_of(at.bound, at.bound_id), weights, 0.0), uniform, axis)
        value = axis.take(logits, token[:, None])[:, 0]
        ahead = ahead_of(value, token)
        rank = 1 + axis.total(jnp.sum(ahead, axis=1, dtype=jnp.int32))
        mass_ahead = axis.total(jnp.sum(jnp.where(ahead, weights, 0.0), axis=1))
        accepted = (sampling.top_k == 0) | (rank <= sampling.top_k)
        accepted &= (sampling.top_p >= 1) | (mass_ahead < sampling.top_p * allowed_mass)
        accepted |= rank == 1  # a top_p so small that the product rounds to 0 leaves the best token
        drawn = weight > 0  # rounding at the very end of the CDF can land on a token that is not left: draw again
        take = ~at.done & drawn & accepted
        shrink = ~at.done & drawn & ~accepted
        return _Round(
            at.number + 1,
            at.done | take,
            jnp.where(take, token, at.token),
            jnp.where(shrink, value, at.bound),
            jnp.where(shrink, token, at.bound_id),
        )

    done = greedy | ~jnp.isfinite(best)  # nothing is allowed, or nothing is a number: no weights to draw from
    start = _Round(jnp.int32(0), done, best_ids, floor, jnp.full((R,), axis.shards * W, jnp.int32))
    last = jax.lax.while_loop(lambda at: ~jnp.all(at.done) & (at.number < _MAX_ROUNDS), one_round, start)
    return last.token


def _inverse_cdf(weights: Array, uniform: Array, axis: VocabularyAxis) -> tuple[Array, Array]:
    """A token [R] and its weight [R] from unnormalised weights [R, V] and uniforms [R] in [0, 1)."""
    if axis.shards == 1:
        return _token_at(weights, lambda end: uniform * end)
    # The shard in which the target lies, by sums that are the same in all of them; the others' tokens do not count.
    shard_ends = jnp.cumsum(axis.each(weights.sum(axis=-1)), axis=0)  # [shards, R]
    target = uniform * shard_ends[-1]
    chosen = jnp.minimum(jnp.sum(shard_ends <= target, axis=0), axis.shards - 1)
    before = jnp.where(chosen > 0, jnp.take_along_axis(shard_ends, jnp.maximum(chosen - 1, 0)[None], axis=0)[0], 0.0)
    token, weight = _token_at(weights, lambda _: target - before)
    mine = chosen * weights.shape[1] == axis.first(weights.shape[1])
    token = jnp.where(mine, token + axis.first(weights.shape[1]), 0)
    return axis.total(token), axis.total(jnp.where(mine, weight, 0.0))


def _token_at(weights: Array, target_of: Callable[[Array], Array]) -> tuple[Array, Array]:
    """The token [R], and its weight [R], in which the sum of weights [R, V] passes a target [R], told their sum [R]."""
    blocks = _zero_padded_blocks(weights)
    ends = jnp.cumsum(blocks.sum(axis=-1), axis=-1)  # [R, blocks]
    target = target_of(ends[:, -1])
    block = jnp.minimum(jnp.sum(ends <= target[:, None], axis=1), ends.shape[1] - 1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [R, 128]
    before = jnp.where(block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    within = jnp.sum(before[:, None] + jnp.cumsum(inside, axis=-1) <= target[:, None], axis=1)
    within = jnp.minimum(within, BLOCK - 1)
    token = jnp.minimum(block * BLOCK + within, weights.shape[1] - 1).astype(jnp.int32)
    return token, jnp.take_along_axis(weights, token[:, None], axis=1)[:, 0]


def _zero_padded_blocks(weights: Array) -> Array:
    R, V = weights.shape
    return jnp.pad(weights, ((0, 0), (0, -V % BLOCK))).reshape(R, -1, BLOCK)
