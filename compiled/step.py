"""The steps that are compiled. Pure functions of arrays; `programs.py` compiles them.

Logits never leave, but for `vocabulary`: a step returns chosen tokens and their numbers.
"""

import jax
import jax.numpy as jnp
from jax import Array

from compiled.filters import processed_logits
from compiled.logprobs import all_logprobs, head_logprobs, token_logprobs
from compiled.penalties import fill_slot, record_choice
from compiled.sampling import choose_tokens
from compiled.state import (
    Adjustment,
    DecodeInput,
    DeviceState,
    SamplingArrays,
    ScoreInput,
    StepInput,
    StepOutput,
)
from model.kv_cache import NULL_PAGE, PAGE_SIZE, live_rows
from model.sharding import VocabularyAxis
from model.token_logprobs import TokenLogprobs
from model.transformer import BoundModel

type Leaves = tuple[Array, ...]


def prefill(model: BoundModel, leaves: Leaves, state: DeviceState, step: StepInput) -> tuple[DeviceState, Array]:
    """Stores keys, values and final hidden states of a chunk of one row's tokens ([1, T]); how many there were, [].

    The count is there to be waited for: the state goes on into the next step.
    """
    _, cache = model.merge(leaves)(step.tokens, step.positions, step.tables, state.cache)
    return DeviceState(cache, state.slots), jnp.sum(step.positions >= 0, dtype=jnp.int32)


def decode(
    model: BoundModel, k: int, leaves: Leaves, state: DeviceState, step: DecodeInput, sampling: SamplingArrays
) -> tuple[DeviceState, StepOutput]:
    """Runs one token of each row ([R]), chooses the next and leaves it in the row's slot."""
    module, axis = model.merge(leaves), model.cut.vocabulary
    slots = state.slots
    tokens = jnp.where(step.tokens >= 0, step.tokens, slots.tokens[step.slots])
    hidden, cache = module(tokens[:, None], step.positions[:, None], step.tables, state.cache)
    # The barrier keeps the head apart from the layers, so that it is compiled alike in decode and score.
    live = live_rows(step.positions >= 0)
    logits = module.logits(jax.lax.optimization_barrier(hidden[:, 0]), live)
    chosen = choose_tokens(logits, sampling, slots, step.slots, axis)

    def numbers(of: Array) -> TokenLogprobs:
        return token_logprobs(of, chosen, k, step.requested_ids, live, axis)

    def processed() -> TokenLogprobs:
        return numbers(processed_logits(logits, chosen, sampling, slots, step.slots, axis))

    told = jax.lax.cond(jnp.any(sampling.processed), processed, lambda: numbers(logits))
    # The barrier has the choice counted after the counts were read for the last time: in place, without a copy.
    output: StepOutput = jax.lax.optimization_barrier(StepOutput(chosen, told))
    return DeviceState(cache, record_choice(slots, step.slots, output.tokens, axis)), output


def score(model: BoundModel, k: int, leaves: Leaves, state: DeviceState, step: ScoreInput) -> TokenLogprobs:
    """The numbers of a block of prompt tokens ([M]), each after the cached token before it.

    The head runs over this block alone, so no [prompt, V] array exists, however long the prompt.
    """
    hidden = _cached_hidden(model, state, step.places)
    return head_logprobs(model.merge(leaves), hidden, step.targets, k, step.requested_ids, _live(step.places))


def vocabulary(model: BoundModel, leaves: Leaves, state: DeviceState, places: Array) -> Array:
    """Log-probs [M, V] float32 of every token after the cached tokens in `places` [M] int32."""
    live = _live(places)
    logits = model.merge(leaves).logits(_cached_hidden(model, state, places), live)
    return all_logprobs(logits, live, model.cut.vocabulary)


def adjust(axis: VocabularyAxis, state: DeviceState, slot: Array, adjustment: Adjustment) -> DeviceState:
    """Replaces bias, counts and seen tokens of a slot ([] int32)."""
    return DeviceState(state.cache, fill_slot(state.slots, slot, adjustment, axis))


def _cached_hidden(model: BoundModel, state: DeviceState, places: Array) -> Array:
    pages = state.cache.hidden
    return model.cut.whole_hidden(pages.reshape(-1, pages.shape[-1])[places])


def _live(places: Array) -> Array:
    """Rows [] int32 up to the last whose place is not in the null page, where padding's is."""
    return live_rows(places >= place_of(NULL_PAGE + 1, 0))


def place_of(page: int, position: int) -> int:
    """Index of a token in the flattened hidden pages."""
    return page * PAGE_SIZE + position % PAGE_SIZE


def zero_state(shapes: DeviceState) -> DeviceState:
    """A fresh, empty state of the given shapes."""
    state: DeviceState = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return state
