"""The filters temperature, min_p, top_k and top_p on rows of adjusted logits, without sorting them.

Order as in vLLM: temperature, min_p, top_k, then top_p on the rest. The remaining tokens are a prefix of the tokens in
order of probability, ties by ascending id.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from compiled.logprobs import blocked_top_k
from compiled.penalties import adjust_logits
from compiled.state import SamplingArrays, SlotState
from model.sharding import UNSHARDED, VocabAxis


class TokenWeights(NamedTuple):
    """Unnormalized probabilities of each row."""

    weights: Array  # [R, V] float32, 1 for the best token
    floor: Array  # [R] float32, smallest logit that min_p keeps
    mass: Array  # [R] float32, total weight of the tokens that min_p and top_k keep; top_p is a fraction of it


def max_and_argmax(logits: Array, axis: VocabAxis = UNSHARDED) -> tuple[Array, Array]:
    """The best logit [R] and its id [R] int32."""
    value, token = blocked_top_k(logits, 1, axis)
    return value[:, 0], token[:, 0]


def token_weights(logits: Array, best: Array, sampling: SamplingArrays, axis: VocabAxis = UNSHARDED) -> TokenWeights:
    """Weights of adjusted logits [R, V], whose maximum is `best` [R]. Greedy rows have temperature 1."""
    temperature = _temperature(sampling)
    weights = jnp.exp((logits - best[:, None]) / temperature[:, None])
    floor = jnp.where(sampling.min_p > 0, best + temperature * jnp.log(sampling.min_p), -jnp.inf)
    return TokenWeights(weights, floor, _allowed_mass(logits, weights, floor, sampling, axis))


def processed_logits(
    logits: Array,
    chosen: Array,
    sampling: SamplingArrays,
    slots: SlotState,
    rows: Array,
    axis: VocabAxis = UNSHARDED,
) -> Array:
    """Logits [R, V] of the distribution that each row was sampled from.

    Bias, penalties, mask; then, unless the row is greedy, temperature and the filters. Excluded tokens are -inf.

    Args:
        logits: [R, V] float32, raw.
        chosen: [R] int32, the sampled tokens: kept even if rounding puts them on the other side of a filter's edge.
        sampling: parameters of each row.
        slots: bias, counts and seen tokens of all requests.
        rows: [R] int32, the slot of each row.
        axis: V of the logits.
    """
    adjusted = adjust_logits(logits, sampling, slots, rows, axis)
    remaining = _remaining(adjusted, sampling, axis) | (axis.ids(logits.shape[1]) == chosen[:, None])
    drawn = jnp.where(remaining, adjusted / _temperature(sampling)[:, None], -jnp.inf)
    return jnp.where(sampling.temperature[:, None] > 0, drawn, adjusted)


def _remaining(logits: Array, sampling: SamplingArrays, axis: VocabAxis) -> Array:
    """Whether the filters keep each token [R, V] bool of adjusted logits."""
    best, _ = max_and_argmax(logits, axis)
    weights, floor, mass = token_weights(logits, best, sampling, axis)
    V = axis.shards * logits.shape[1]
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
    kth = kth_largest(logits, k, axis)
    remaining = (logits >= floor[:, None]) & _first(logits, kth, k, axis)
    target = sampling.top_p * mass

    def mass_of(selected: Array) -> Array:
        return axis.psum(jnp.sum(jnp.where(selected, weights, 0.0), axis=1))

    last = _largest_value(logits, lambda ahead: mass_of(ahead) >= target)
    ahead = logits > last[:, None]
    weight = axis.pmax(jnp.max(jnp.where(logits == last[:, None], weights, 0.0), axis=1))  # of a token with that logit
    tied = jnp.ceil((target - mass_of(ahead)) / weight)
    count = axis.psum(jnp.sum(ahead, axis=1)) + jnp.where(jnp.isfinite(tied), tied, 0).astype(jnp.int32)
    nucleus = _first(logits, last, jnp.maximum(count, 1), axis)
    return jnp.logical_and(remaining, (sampling.top_p >= 1)[:, None] | nucleus)


def _first(logits: Array, bound: Array, count: Array, axis: VocabAxis) -> Array:
    """The first `count` [R] tokens by logit and id, as [R, V] bool; `bound` [R] is the logit of the last of them."""
    above = logits > bound[:, None]
    tied = logits == bound[:, None]
    spare = count - axis.psum(jnp.sum(above, axis=1, dtype=jnp.int32))
    ties = jnp.sum(tied, axis=1, dtype=jnp.int32)
    lower_ties = axis.exclusive_psum(ties)  # in shards of lower ids

    def with_first_ties() -> Array:
        return above | (tied & (jnp.cumsum(tied, axis=1, dtype=jnp.int32) <= (spare - lower_ties)[:, None]))

    first: Array = jax.lax.cond(jnp.any(axis.psum(ties) > spare), with_first_ties, lambda: above | tied)
    return first


def _temperature(sampling: SamplingArrays) -> Array:
    return jnp.where(sampling.temperature <= 0, 1.0, sampling.temperature)


def _allowed_mass(logits: Array, weights: Array, floor: Array, sampling: SamplingArrays, axis: VocabAxis) -> Array:
    """Total weight [R] of the tokens that min_p and top_k keep."""

    def above_floor() -> Array:
        return axis.psum(jnp.sum(jnp.where(logits >= floor[:, None], weights, 0.0), axis=1))

    def above_both() -> Array:
        k = jnp.minimum(sampling.top_k, axis.shards * logits.shape[1])
        kth = kth_largest(logits, k, axis)
        ahead = logits > kth[:, None]
        spare = k - axis.psum(jnp.sum(ahead, axis=1, dtype=jnp.int32))  # number of tokens equal to it that top_k keeps
        tied = axis.pmax(jnp.max(jnp.where(logits == kth[:, None], weights, 0.0), axis=1))
        top = axis.psum(jnp.sum(jnp.where(ahead, weights, 0.0), axis=1)) + spare * tied
        return jnp.where((sampling.top_k > 0) & (kth >= floor), top, above_floor())

    needs_k = jnp.any((sampling.top_k > 0) & (sampling.top_p < 1))
    mass: Array = jax.lax.cond(needs_k, above_both, above_floor)
    return mass


def kth_largest(x: Array, k: Array, axis: VocabAxis = UNSHARDED) -> Array:
    """The k-th largest value [R] of x [R, V]; k [R] int32, 0 counts as 1."""
    count = jnp.clip(k, 1, axis.shards * x.shape[1])
    return _largest_value(x, lambda at_least: axis.psum(jnp.sum(at_least, axis=1, dtype=jnp.int32)) >= count)


def _largest_value(x: Array, enough: Callable[[Array], Array]) -> Array:
    """The largest value v [R] of x [R, V] for which `enough(x >= v)` ([R, V] bool -> [R] bool) is true.

    A binary search over 32 bits. Undefined for a row in which no value is enough.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    # Order-preserving map from float32 to uint32: flip all bits of negatives, the sign bit of the rest.
    keys = jax.lax.bitcast_convert_type(bits ^ ((bits >> 31) | jnp.int32(-(2**31))), jnp.uint32)

    def add_bit(i: Array, key: Array) -> Array:
        candidate = key | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(keys >= candidate[:, None]), candidate, key)

    key = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros((x.shape[0],), jnp.uint32))
    # The key is that of a value in x: the inverse map gives the value.
    high = (key >> 31) == 1
    restored = jnp.where(high, key ^ jnp.uint32(2**31), ~key)
    value: Array = jax.lax.bitcast_convert_type(restored, jnp.float32)
    return value
