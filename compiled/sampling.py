"""Choosing one token per row: greedy, temperature, top-k, top-p, min-p, a seed for each row. No sort of the vocabulary.

A token is drawn from the whole distribution by inverse CDF over blocks, then tested for membership: its rank against
top_k, the probability ahead of it against top_p. A rejected token, with everything behind it, leaves the distribution
for the next round. The allowed tokens are a prefix of the order by probability, so they are never cut, and what is
accepted follows the renormalised allowed distribution exactly. With top_p = 0.9 nine rows in ten end in round one.

Order as in vLLM: bias, penalties and mask (`adjust.py`), temperature, min_p, top_k, then top_p on what is left.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from compiled.adjust import adjust_logits, changes_logits
from compiled.filters import best_of, weigh
from compiled.logprobs import BLOCK
from compiled.state import SamplingArrays, SlotState

_MAX_ROUNDS = 256  # each round at least halves what is left on average; a bound all the same


def choose_tokens(logits: Array, sampling: SamplingArrays, slots: SlotState, rows: Array) -> Array:
    """Chooses one id [R] int32 per row.

    A row whose mask forbids every token gets token 0: such a request is refused before it comes here.

    Args:
        logits: [R, V] float32.
        sampling: how each row chooses.
        slots: bias, counts and seen tokens of all requests.
        rows: [R] int32, the slot of each row.
    """
    with jax.named_scope("sample"):
        samples = jnp.any(sampling.temperature > 0)

        def choose() -> Array:
            allowed = adjust_logits(logits, sampling, slots, rows)
            best, best_ids = best_of(allowed)
            token: Array = jax.lax.cond(samples, lambda: _draw(allowed, best, best_ids, sampling), lambda: best_ids)
            return token

        # The commonest step writes nothing as large as the logits: every row greedy, none of them adjusted.
        tokens: Array = jax.lax.cond(samples | changes_logits(sampling), choose, lambda: best_of(logits)[1])
        return tokens


class _Round(NamedTuple):
    number: Array  # [] int32
    done: Array  # [R] bool
    token: Array  # [R] int32
    bound: Array  # [R] float32 logit of the last rejected token
    bound_id: Array  # [R] int32 and its id: only tokens strictly ahead of it are left


def _draw(logits: Array, best: Array, best_ids: Array, sampling: SamplingArrays) -> Array:
    R, V = logits.shape
    greedy = sampling.temperature <= 0
    weights, floor, allowed_mass = weigh(logits, best, sampling)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(sampling.seed), sampling.step)
    ids = jnp.arange(V, dtype=jnp.int32)

    def ahead_of(value: Array, token: Array) -> Array:
        return (logits > value[:, None]) | ((logits == value[:, None]) & (ids < token[:, None]))

    def one_round(at: _Round) -> _Round:
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, at.number)))(keys)
        token, weight = _inverse_cdf(jnp.where(ahead_of(at.bound, at.bound_id), weights, 0.0), uniform)
        value = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        ahead = ahead_of(value, token)
        rank = 1 + jnp.sum(ahead, axis=1, dtype=jnp.int32)
        mass_ahead = jnp.sum(jnp.where(ahead, weights, 0.0), axis=1)
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
    start = _Round(jnp.int32(0), done, best_ids, floor, jnp.full((R,), V, jnp.int32))
    last = jax.lax.while_loop(lambda at: ~jnp.all(at.done) & (at.number < _MAX_ROUNDS), one_round, start)
    return last.token


def _inverse_cdf(weights: Array, uniform: Array) -> tuple[Array, Array]:
    """A token [R] and its weight [R] from unnormalised weights [R, V] and uniforms [R] in [0, 1)."""
    blocks = _zero_padded_blocks(weights)
    ends = jnp.cumsum(blocks.sum(axis=-1), axis=-1)  # [R, blocks]
    target = uniform * ends[:, -1]
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
