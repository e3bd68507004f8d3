"""The steps that are compiled: prefill, decode, sample, score. Pure functions of arrays; `programs.py` compiles them.

Logits never leave: a step returns chosen tokens and their numbers.
"""

import jax
import jax.numpy as jnp
from jax import Array

from compiled.logprobs import token_logprobs
from compiled.sampling import choose_tokens
from compiled.state import DeviceState, SamplingArrays, StepInput, StepOutput, TokenLogprobs
from model.kv_cache import PAGE_SIZE
from model.transformer import BoundModel, Transformer

type Leaves = tuple[Array, ...]


def prefill(model: BoundModel, leaves: Leaves, state: DeviceState, step: StepInput) -> DeviceState:
    """Stores keys, values and final hidden states of a chunk of one row's tokens ([1, T])."""
    _, cache = model.merge(leaves)(step.tokens, step.positions, step.tables, state.cache)
    return DeviceState(cache)


def decode(
    model: BoundModel, k: int, leaves: Leaves, state: DeviceState, step: StepInput, sampling: SamplingArrays
) -> tuple[DeviceState, StepOutput]:
    """Runs one token of each row ([R, 1]) and chooses the next."""
    module = model.merge(leaves)
    hidden, cache = module(step.tokens, step.positions, step.tables, state.cache)
    # The barrier keeps the head apart from the layers, so that it is compiled alike in decode, sample and score.
    return DeviceState(cache), _choose(module, k, jax.lax.optimization_barrier(hidden[:, 0]), sampling)


def sample(
    model: BoundModel, k: int, leaves: Leaves, state: DeviceState, places: Array, sampling: SamplingArrays
) -> StepOutput:
    """Chooses the token after each cached token in `places` [R] (page * S + offset): the first one of a request."""
    return _choose(model.merge(leaves), k, _cached_hidden(state, places), sampling)


def score(
    model: BoundModel, k: int, leaves: Leaves, state: DeviceState, places: Array, targets: Array
) -> TokenLogprobs:
    """The numbers of token `targets` [M] after each cached token in `places` [M]: a block of prompt rows.

    The head runs over this block alone, so no [prompt, V] array exists, however long the prompt.
    """
    logits = model.merge(leaves).logits(_cached_hidden(state, places))
    return token_logprobs(logits, targets, k)


def _choose(module: Transformer, k: int, hidden: Array, sampling: SamplingArrays) -> StepOutput:
    logits = module.logits(hidden)
    tokens = choose_tokens(logits, sampling)
    return StepOutput(tokens, token_logprobs(logits, tokens, k))


def _cached_hidden(state: DeviceState, places: Array) -> Array:
    pages = state.cache.hidden
    return pages.reshape(-1, pages.shape[-1])[places]


def place_of(page: int, position: int) -> int:
    """Index of a token in the flattened hidden pages."""
    return page * PAGE_SIZE + position % PAGE_SIZE


def zero_state(shapes: DeviceState) -> DeviceState:
    """A fresh, empty state of the given shapes."""
    state: DeviceState = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return state
