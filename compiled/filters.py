"""What temperature, min_p, top_k and top_p leave of a row of adjusted logits, without sorting it.

Order as in vLLM: temperature, min_p, top_k, then top_p on what is left. What is left is a beginning of the tokens in
order of probability, equal ones by ascending id.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from compiled.logprobs import blocked_top_k
from compiled.penalties import adjust_logits
from compiled.state import SamplingArrays, SlotState
from model.sharding import WHOLE, VocabularyAxis


class Weighed(NamedTuple):
    """A row's tokens by how often they are drawn."""

    weights: Array  # [R, V] float32, the best token weighs 1
    floor: Array  # [R] float32, the least logit that min_p leaves
    mass: Array  # [R] float32, the weight of what min_p and top_k leave: what top_p is a share of


def best_of(logits: Array, axis: VocabularyAxis = WHOLE) -> tuple[Array, Array]:
    """The best logit [R] and its id [R] int32."""
    value, token = blocked_top_k(logits, 1, axis)
    return value[:, 0], token[:, 0]


def weigh(logits: Array, best: Array, sampling: SamplingArrays, axis: VocabularyAxis = WHOLE) -> Weighed:
    """Weighs adjusted logits [R, V], of which the best is `best` [R]. Greedy rows are weighed at temperature 1."""
    temperature = _temperature(sampling)
    weights = jnp.exp((logits - best[:, None]) / temperature[:, None])
    floor = jnp.where(sampling.min_p > 0, best + temperature * jnp.log(sampling.min_p), -jnp.inf)
    return Weighed(weights, floor, _allowed_mass(logits, weights, floor, sampling, axis))


def processed_logits(
    logits: Array,
    chosen: Array,
    sampling: SamplingArrays,
    slots: SlotState,
    rows: Array,
    axis: VocabularyAxis = WHOLE,
) -> Array:
    """Logits [R, V] of the distribution that each row has been drawn from; raw ones where a row does not ask.

    Bias, penalties, mask; then, unless the row is greedy, temperature and the filters. What may not be drawn is -inf.

    Args:
        logits: [R, V] float32, raw.
        chosen: [R] int32, what was drawn: it is left in where rounding puts it on the other side of a filter's edge.
        sampling: how each row chooses, and whether it asks.
        slots: bias, counts and seen tokens of all requests.
        rows: [R] int32, the slot of each row.
        axis: of the logits.
    """
    adjusted = adjust_logits(logits, sampling, slots, rows, axis)
    left = _left(adjusted, sampling, axis) | (axis.ids(logits.shape[1]) == chosen[:, None])
    drawn = jnp.where(left, adjusted / _temperature(sampling)[:, None], -jnp.inf)
    processed = jnp.where(sampling.temperature[:, None] > 0, drawn, adjusted)
    told: Array = jnp.where(sampling.processed[:, None], processed, logits)
    return told


def _left(logits: Array, sampling: SamplingArrays, axis: VocabularyAxis) -> Array:
    """Which tokens [R, V] bool of adjusted logits the filters leave."""
    best, _ = best_of(logits, axis)
    weights, floor, mass = weigh(logits, best, sampling, axis)
    V = axis.shards * logits.shape[1]
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
    kth = kth_largest(logits, k, axis)
    left = (logits >= floor[:, None]) & _first(logits, kth, k, axis)
    wanted = sampling.top_p * mass

    def mass_of(some: Array) -> Array:
        return axis.total(jnp.sum(jnp.where(some, weights, 0.0), axis=1))

    last = _largest_value(logits, lambda ahead: mass_of(ahead) >= wanted)
    ahead = logits > last[:, None]
    each = axis.largest(jnp.max(jnp.where(logits == last[:, None], weights, 0.0), axis=1))
    tied = jnp.ceil((wanted - mass_of(ahead)) / each)
    count = axis.total(jnp.sum(ahead, axis=1)) + jnp.where(jnp.isfinite(tied), tied, 0).astype(jnp.int32)
    nucleus = _first(logits, last, jnp.maximum(count, 1), axis)
    return jnp.logical_and(left, (sampling.top_p >= 1)[:, None] | nucleus)


def _first(logits: Array, bound: Array, count: Array, axis: VocabularyAxis) -> Array:
    """The first `count` [R] tokens by logit and id, as [R, V] bool; the last of them has the logit `bound` [R]."""
    above = logits > bound[:, None]
    tied = logits == bound[:, None]
    spare = count - axis.total(jnp.sum(above, axis=1, dtype=jnp.int32))
    ties = jnp.sum(tied, axis=1, dtype=jnp.int32)
    before = axis.before(ties)  # in lower ids than this shard's

    def some() -> Array:
        return above | (tied & (jnp.cumsum(tied, axis=1, dtype=jnp.int32) <= (spare - before)[:, None]))

    first: Array = jax.lax.cond(jnp.any(axis.total(ties) > spare), some, lambda: above | tied)
    return first


def _temperature(sampling: SamplingArrays) -> Array:
    return jnp.where(sampling.temperature <= 0, 1.0, sampling.temperature)


def _allowed_mass(logits: Array, weights: Array, floor: Array, sampling: SamplingArrays, axis: VocabularyAxis) -> Array:
    """Total weight [R] of what min_p and top_k leave: what top_p is a share of."""

    def above_floor() -> Array:
        return axis.total(jnp.sum(jnp.where(logits >= floor[:, None], weights, 0.0), axis=1))

    def above_both() -> Array:
        k = jnp.minimum(sampling.top_k, axis.shards * logits.shape[1])
        kth = kth_largest(logits, k, axis)
        ahead = logits > kth[:, None]
        spare = k - axis.total(jnp.sum(ahead, axis=1, dtype=jnp.int32))  # how many of those equal to it are in
        tied = axis.largest(jnp.max(jnp.where(logits == kth[:, None], weights, 0.0), axis=1))
        top = axis.total(jnp.sum(jnp.where(ahead, weights, 0.0), axis=1)) + spare * tied
        return jnp.where((sampling.top_k > 0) & (kth >= floor), top, above_floor())

    needs_k = jnp.any((sampling.top_k > 0) & (sampling.top_p < 1))
    mass: Array = jax.lax.cond(needs_k, above_both, above_floor)
    return mass


def kth_largest(x: Array, k: Array, axis: VocabularyAxis = WHOLE) -> Array:
    """The k-th largest value [R] of x [R, V]; k [R] int32, 0 counts as 1."""
    wanted = jnp.clip(k, 1, axis.shards * x.shape[1])
    return _largest_value(x, lambda at_least: axis.total(jnp.sum(at_least, axis=1, dtype=jnp.int32)) >= wanted)


def _largest_value(x: Array, enough: Callable[[Array], Array]) -> Array:
    """The largest value v [R] of x [R, V] for which `enough`, told which values are >= v ([R, V] bool), says so ([R]).

    By 32 bits from the highest. Where no value of the row is enough, the result means nothing.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    # Order-preserving map from float32 to uint32: flip all bits of negatives, the sign bit of the rest.
    keys = jax.lax.bitcast_convert_type(bits ^ ((bits >> 31) | jnp.int32(-(2**31))), jnp.uint32)

    def bit(i: Array, found: Array) -> Array:
        candidate = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(keys >= candidate[:, None]), candidate, found)

    found = jax.lax.fori_loop(0, 32, bit, jnp.zeros((x.shape[0],), jnp.uint32))
    # The found key is that of a value present: read it back through the inverse map.
    high = (found >> 31) == 1
    restored = jnp.where(high, found ^ jnp.uint32(2**31), ~found)
    value: Array = jax.lax.bitcast_convert_type(restored, jnp.float32)
    return value
