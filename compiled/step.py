"""The steps that are compiled: pure functions of arrays.

Logits never leave the device, except from `full_vocab_logprobs`: a step returns chosen tokens and their log-probs.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from compiled.filters import processed_logits
from compiled.logprobs import all_logprobs, allowed_logmass, head_logprobs, token_logprobs
from compiled.penalties import has_mask, mask_logits, record_choice, set_slot_penalties
from compiled.sampling import choose_tokens
from compiled.state import (
    DecodeInput,
    DeviceState,
    PageCopies,
    SamplingArrays,
    ScoreInput,
    SlotPenalties,
    StepInput,
    StepOutput,
)
from model.kv_cache import NULL_PAGE, PAGE_SIZE, PagedCache, addresses_of, live_rows
from model.sharding import VocabAxis
from model.token_logprobs import TokenLogprobs
from model.transformer import BoundModel

type Leaves = tuple[Array, ...]


def prefill(model: BoundModel, leaves: Leaves, state: DeviceState, step: StepInput) -> tuple[DeviceState, Array]:
    """Store keys, values and final hidden states of prompt tokens ([R, T]); return their number, [].

    The caller can wait for the number; the state is donated to the next step.
    """
    _, cache = model.merge(leaves)(step.tokens, step.positions, step.tables, state.cache)
    return DeviceState(cache, state.slots), jnp.sum(step.positions >= 0, dtype=jnp.int32)


def decode(
    model: BoundModel, k: int, leaves: Leaves, state: DeviceState, step: DecodeInput, sampling: SamplingArrays
) -> tuple[DeviceState, StepOutput]:
    """Run one token of each row ([R]), choose the next one and record it in the row's slot."""
    module, axis = model.merge(leaves), model.parallel.vocab_axis
    slots = state.slots
    tokens = jnp.where(step.tokens >= 0, step.tokens, slots.tokens[step.slots])
    hidden, cache = module(tokens[:, None], step.positions[:, None], step.tables, state.cache)
    # The barrier separates the head from the layers, so that it is compiled alike in decode and score.
    live = live_rows(step.positions >= 0)
    logits = module.logits(jax.lax.optimization_barrier(hidden[:, 0]), live)
    chosen = choose_tokens(logits, sampling, slots, step.slots, axis)

    def logprobs_of(logits: Array) -> TokenLogprobs:
        return token_logprobs(logits, chosen, k, step.requested_ids, model.kernels, live, axis)

    def processed() -> TokenLogprobs:
        return logprobs_of(processed_logits(logits, chosen, sampling, slots, step.slots, axis))

    def allowed() -> Array:
        return allowed_logmass(logits, mask_logits(logits, sampling, axis), model.kernels, live, axis)

    raw = _if_any(~sampling.processed & (step.positions >= 0), lambda: logprobs_of(logits))
    sampled_from = _if_any(sampling.processed | sampling.return_processed, processed)
    allowed_mass = _if_any(has_mask(sampling), allowed)
    logprobs = jax.tree.map(partial(_choose_rows, sampling.processed), sampled_from, raw)
    # The barrier orders the update of the counts after their last read: it is done in place, without a copy.
    output: StepOutput = jax.lax.optimization_barrier(StepOutput(chosen, logprobs, sampled_from, allowed_mass))
    if cache.experts is not None:
        addresses = addresses_of(step.tables, step.positions[:, None])
        output = replace(output, experts=cache.experts[addresses.pages[:, 0], addresses.offsets[:, 0]])
    return DeviceState(cache, record_choice(slots, step.slots, output.tokens, axis)), output


def _if_any[T](rows: Array, compute: Callable[[], T]) -> T:
    """The arrays of `compute` if any of `rows` [R] bool is true, else zeros."""

    def zeros() -> T:
        result: T = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(compute))
        return result

    arrays: T = jax.lax.cond(jnp.any(rows), compute, zeros)
    return arrays


def _choose_rows(rows: Array, x: Array, y: Array) -> Array:
    """x where `rows` [R] bool is true, else y; both [R, ...]."""
    return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, y)


def score(model: BoundModel, k: int, leaves: Leaves, state: DeviceState, step: ScoreInput) -> TokenLogprobs:
    """Log-probs of a block of prompt tokens ([M]), each after the cached token before it.

    The head runs over this block alone, so no [prompt, V] array exists, however long the prompt.
    """
    hidden = _cached_hidden(model, state, step.cache_indices)
    return head_logprobs(model.merge(leaves), hidden, step.targets, k, step.requested_ids, _live(step.cache_indices))


def full_vocab_logprobs(model: BoundModel, leaves: Leaves, state: DeviceState, cache_indices: Array) -> Array:
    """Log-probs [M, V] float32 of every token after the cached tokens at `cache_indices` [M] int32."""
    live = _live(cache_indices)
    logits = model.merge(leaves).logits(_cached_hidden(model, state, cache_indices), live)
    return all_logprobs(logits, model.kernels, live, model.parallel.vocab_axis)


def read_experts(state: DeviceState, pages: Array) -> Array:
    """The experts [C, S, L, k] of the tokens in pages [C] int32."""
    experts: Array = state.cache.experts[pages]
    return experts


def set_penalties(axis: VocabAxis, state: DeviceState, slot: Array, penalties: SlotPenalties) -> DeviceState:
    """Replace bias, counts and seen tokens of a slot ([] int32)."""
    return DeviceState(state.cache, set_slot_penalties(state.slots, slot, penalties, axis))


def copy_pages(state: DeviceState, copies: PageCopies) -> DeviceState:
    """Copy keys, values, experts and hidden states of pages, one after another: a call with few copies is short."""

    def copy_page(i: Array, cache: PagedCache) -> PagedCache:
        def copy(pages: Array) -> Array:
            page = jax.lax.dynamic_slice_in_dim(pages, copies.sources[i], 1)
            return jax.lax.dynamic_update_slice_in_dim(pages, page, copies.targets[i], 0)

        copied: PagedCache = jax.tree.map(copy, cache)
        return copied

    count = live_rows(copies.targets != NULL_PAGE)
    return DeviceState(jax.lax.fori_loop(0, count, copy_page, state.cache), state.slots)


def _cached_hidden(model: BoundModel, state: DeviceState, cache_indices: Array) -> Array:
    pages = state.cache.hidden
    return model.parallel.gather_hidden(pages.reshape(-1, pages.shape[-1])[cache_indices])


def _live(cache_indices: Array) -> Array:
    """Number of rows [] int32 up to the last that is not padding, whose index is in the null page."""
    return live_rows(cache_indices >= cache_index(NULL_PAGE + 1, 0))


def cache_index(page: int, position: int) -> int:
    """Index of a token in the flattened hidden pages."""
    return page * PAGE_SIZE + position % PAGE_SIZE


def zero_state(shapes: DeviceState) -> DeviceState:
    """An empty state of the given shapes."""
    state: DeviceState = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return state
