"""Changes of logits before sampling: bias, penalties, mask. Raw log-probs are not affected.

Order as in vLLM: logit_bias, repetition, frequency and presence penalty, mask.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from compiled.logprobs import canonicalize_zero
from compiled.state import SamplingArrays, SlotPenalties, SlotState
from model.sharding import UNSHARDED, VocabAxis

_ALL_ALLOWED = 0xFFFFFFFF


def set_slot_penalties(
    slots: SlotState, slot: Array, penalties: SlotPenalties, axis: VocabAxis = UNSHARDED
) -> SlotState:
    """The slots with bias, counts and seen tokens of `slot` ([] int32) replaced; its last token stays."""
    width = slots.bias.shape[1]
    return replace(
        slots,
        bias=slots.bias.at[slot].set(axis.shard(penalties.bias, width)),
        counts=slots.counts.at[slot].set(axis.shard(penalties.counts, width)),
        seen=slots.seen.at[slot].set(axis.shard(penalties.seen, width)),
    )


def record_choice(slots: SlotState, rows: Array, tokens: Array, axis: VocabAxis = UNSHARDED) -> SlotState:
    """The slots after the rows in slots `rows` [R] int32 have chosen `tokens` [R] int32."""
    return replace(
        slots,
        tokens=slots.tokens.at[rows].set(tokens),
        counts=slots.counts.at[rows, axis.local_index(tokens, slots.counts.shape[1])].add(1),
    )


def has_mask(sampling: SamplingArrays) -> Array:
    """Whether each row's mask [R] bool forbids a token."""
    return jnp.any(sampling.mask != jnp.uint32(_ALL_ALLOWED), axis=1)


def changes_logits(sampling: SamplingArrays) -> Array:
    """Whether ([] bool) adjust_logits would change any row."""
    return jnp.any(sampling.penalized) | jnp.any(has_mask(sampling))


def mask_logits(logits: Array, sampling: SamplingArrays, axis: VocabAxis = UNSHARDED) -> Array:
    """Logits [R, V] with -inf where each row's mask forbids a token."""
    words = axis.shard(sampling.mask, -(-logits.shape[1] // 32))
    return jnp.where(_unpack(words, logits.shape[1]), logits, -jnp.inf)


def adjust_logits(
    logits: Array, sampling: SamplingArrays, slots: SlotState, rows: Array, axis: VocabAxis = UNSHARDED
) -> Array:
    """Logits [R, V] float32 to sample from, of rows in slots `rows` [R] int32: masked ones are -inf.

    Rows without penalties keep their bits. Each case is one pass over the logits: a branch that returned them unchanged
    would copy them.
    """

    def penalized() -> Array:
        return _penalize(logits, sampling, slots, rows)

    def masked(x: Array) -> Array:
        return mask_logits(x, sampling, axis)

    cases = (
        lambda: canonicalize_zero(logits),
        lambda: canonicalize_zero(penalized()),
        lambda: canonicalize_zero(masked(logits)),
        lambda: canonicalize_zero(masked(penalized())),
    )
    case = jnp.any(sampling.penalized) + 2 * jnp.any(has_mask(sampling))
    adjusted: Array = jax.lax.switch(case, cases)
    return adjusted


def _penalize(logits: Array, sampling: SamplingArrays, slots: SlotState, rows: Array) -> Array:
    counts = slots.counts[rows]
    chosen = counts > 0
    x = logits + slots.bias[rows]
    repetition = jnp.where(chosen | slots.seen[rows], sampling.repetition_penalty[:, None], 1.0)
    x = jnp.where(x > 0, x / repetition, x * repetition)
    x = x - sampling.frequency_penalty[:, None] * counts
    x = x - sampling.presence_penalty[:, None] * chosen
    return jnp.where(sampling.penalized[:, None], x, logits)


def _unpack(words: Array, V: int) -> Array:
    """Packed words [R, W] uint32 as [R, V] bool, without the bits past V."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :V] == 1
