"""Samples one token per row: greedy, temperature, top-k, top-p, min-p, a seed per row. Never sorts the vocabulary.

A token is drawn from the full distribution by inverse CDF over blocks, then tested for membership: its rank against
top_k, the probability ahead of it against top_p. A rejected token and all tokens behind it leave the distribution for
the next round. The allowed tokens are a prefix of the order by probability, so none of them is removed, and accepted
tokens follow the renormalized allowed distribution exactly. With top_p = 0.9 nine rows in ten end in round one.

Order as in vLLM: bias, penalties and mask (`penalties.py`), temperature, min_p, top_k, then top_p on the rest.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from compiled.filters import max_and_argmax, token_weights
from compiled.logprobs import BLOCK, blocks_of
from compiled.penalties import adjust_logits, changes_logits
from compiled.state import SamplingArrays, SlotState
from model.sharding import UNSHARDED, VocabAxis

_MAX_ROUNDS = 256  # only a bound: each round at least halves the remaining mass on average


def choose_tokens(
    logits: Array, sampling: SamplingArrays, slots: SlotState, rows: Array, axis: VocabAxis = UNSHARDED
) -> Array:
    """Choose one id [R] int32 per row.

    A row whose mask forbids every token gets token 0; such requests are rejected earlier. If V is sharded,
    every shard makes the same choice.

    Args:
        logits: [R, V] float32.
        rows: [R] int32, the slot of each row.
    """
    with jax.named_scope("sample"):
        any_sampled = jnp.any(sampling.temperature > 0)

        def choose() -> Array:
            allowed = adjust_logits(logits, sampling, slots, rows, axis)
            best, best_ids = max_and_argmax(allowed, axis)
            token: Array = jax.lax.cond(
                any_sampled, lambda: _draw(allowed, best, best_ids, sampling, axis), lambda: best_ids
            )
            return token

        # In the most common step, every row greedy and none penalized, no array as large as the logits is written.
        tokens: Array = jax.lax.cond(
            any_sampled | changes_logits(sampling), choose, lambda: max_and_argmax(logits, axis)[1]
        )
        return tokens


class _Round(NamedTuple):
    """State of rejection sampling between rounds."""

    number: Array  # [] int32
    is_final: Array  # [R] bool, token is the row's choice
    token: Array  # [R] int32
    bound: Array  # [R] float32 logit of the last rejected token
    bound_id: Array  # [R] int32 its id: only tokens strictly ahead of it remain


def _draw(logits: Array, best: Array, best_ids: Array, sampling: SamplingArrays, axis: VocabAxis) -> Array:
    R, W = logits.shape
    greedy = sampling.temperature <= 0
    weights, floor, allowed_mass = token_weights(logits, best, sampling, axis)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(sampling.seed), sampling.step)
    ids = axis.ids(W)

    def ahead_of(value: Array, token: Array) -> Array:
        return (logits > value[:, None]) | ((logits == value[:, None]) & (ids < token[:, None]))

    def run_round(state: _Round) -> _Round:
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, state.number)))(keys)
        token, weight = _inverse_cdf(jnp.where(ahead_of(state.bound, state.bound_id), weights, 0.0), uniform, axis)
        value = axis.take(logits, token[:, None])[:, 0]
        ahead = ahead_of(value, token)
        rank = 1 + axis.psum(jnp.sum(ahead, axis=1, dtype=jnp.int32))
        mass_ahead = axis.psum(jnp.sum(jnp.where(ahead, weights, 0.0), axis=1))
        accepted = (sampling.top_k == 0) | (rank <= sampling.top_k)
        accepted &= (sampling.top_p >= 1) | (mass_ahead < sampling.top_p * allowed_mass)
        accepted |= rank == 1  # a top_p so small that the product rounds to 0 still allows the best token
        drawn = weight > 0  # rounding at the end of the CDF can hit a token that does not remain: draw again
        take = ~state.is_final & drawn & accepted
        shrink = ~state.is_final & drawn & ~accepted
        return _Round(
            state.number + 1,
            state.is_final | take,
            jnp.where(take, token, state.token),
            jnp.where(shrink, value, state.bound),
            jnp.where(shrink, token, state.bound_id),
        )

    is_final = greedy | ~jnp.isfinite(best)  # no token allowed, or NaN: no weights to draw from
    start = _Round(jnp.int32(0), is_final, best_ids, floor, jnp.full((R,), axis.shards * W, jnp.int32))
    last = jax.lax.while_loop(lambda state: ~jnp.all(state.is_final) & (state.number < _MAX_ROUNDS), run_round, start)
    return last.token


def _inverse_cdf(weights: Array, uniform: Array, axis: VocabAxis) -> tuple[Array, Array]:
    """A token [R] and its weight [R] from unnormalized weights [R, V] and uniforms [R] in [0, 1)."""
    if axis.shards == 1:
        return _token_at(weights, lambda end: uniform * end)
    # Every shard finds the shard that contains the target from the same sums; the other shards' tokens do not count.
    shard_ends = jnp.cumsum(axis.all_gather(weights.sum(axis=-1)), axis=0)  # [shards, R]
    target = uniform * shard_ends[-1]
    chosen = jnp.minimum(jnp.sum(shard_ends <= target, axis=0), axis.shards - 1)
    start = jnp.where(chosen > 0, jnp.take_along_axis(shard_ends, jnp.maximum(chosen - 1, 0)[None], axis=0)[0], 0.0)
    token, weight = _token_at(weights, lambda _: target - start)
    is_chosen = chosen * weights.shape[1] == axis.offset(weights.shape[1])
    token = jnp.where(is_chosen, token + axis.offset(weights.shape[1]), 0)
    return axis.psum(token), axis.psum(jnp.where(is_chosen, weight, 0.0))


def _token_at(weights: Array, target_of: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Token [R] and weight [R] at which the cumulative sum of weights [R, V] passes `target_of` their total [R]."""
    blocks = blocks_of(weights, padding=0)
    ends = jnp.cumsum(blocks.sum(axis=-1), axis=-1)  # [R, blocks]
    target = target_of(ends[:, -1])
    block = jnp.minimum(jnp.sum(ends <= target[:, None], axis=1), ends.shape[1] - 1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [R, 128]
    start = jnp.where(block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    column = jnp.sum(start[:, None] + jnp.cumsum(inside, axis=-1) <= target[:, None], axis=1)
    token = jnp.minimum(block * BLOCK + jnp.minimum(column, BLOCK - 1), weights.shape[1] - 1).astype(jnp.int32)
    return token, jnp.take_along_axis(weights, token[:, None], axis=1)[:, 0]
