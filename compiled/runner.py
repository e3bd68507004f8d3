"""ModelRunner: owns the weights, the DeviceState and the executables. One thread uses it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from compiled import step
from compiled.program_cache import ProgramCache
from compiled.programs import Plan, Program, Programs, Shape, compile_plans, specs_of
from compiled.shapes import (
    COPY_PAGES,
    PENALTIES,
    READ_EXPERTS,
    ZERO_STATE,
    Buckets,
    DecodeShape,
    HeadShape,
    PrefillShape,
)
from compiled.state import (
    MAX_REQUESTED_IDS,
    PAGE_COPIES,
    DecodeInput,
    DeviceState,
    PageCopies,
    SamplingArrays,
    ScoreInput,
    SlotPenalties,
    SlotState,
    StepInput,
    StepOutput,
    greedy_sampling,
)
from model.sharding import TENSOR
from model.token_logprobs import TokenLogprobs
from model.transformer import BoundModel


def state_shapes(model: BoundModel, buckets: Buckets, *, pages: int) -> DeviceState:
    """Abstract DeviceState of a server with N `pages`, including the null page."""
    layout, parallel = model.cache_layout, model.parallel
    Z, V = buckets.slots, parallel.shards * parallel.local.vocab_size
    slots = SlotState(
        tokens=_int32(Z),
        bias=jax.ShapeDtypeStruct((Z, V), jnp.float32),
        counts=_int32(Z, V),
        seen=jax.ShapeDtypeStruct((Z, V), jnp.bool_),
    )
    state = DeviceState(layout.shape(pages), slots)
    if model.mesh is None:
        return state
    columns = PartitionSpec(None, TENSOR)
    specs = DeviceState(layout.specs(), SlotState(PartitionSpec(), columns, columns, columns))
    shardings = jax.tree.map(partial(NamedSharding, model.mesh), specs)
    sharded: DeviceState = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), state, shardings)
    return sharded


def make_plans(model: BoundModel, buckets: Buckets, state: DeviceState, k: int) -> list[Plan]:
    """Every program of a model but the one of `state_plan`. All arguments may be abstract."""
    leaves, state = _abstract((model.leaves, state))
    V = model.config.vocab_size
    plans = [_step_plan(model, leaves, state, shape, k) for shape in buckets.steps()]
    plans += [_head_plan(model, leaves, state, shape, k) for shape in buckets.heads()]
    penalties = SlotPenalties(
        bias=jax.ShapeDtypeStruct((V,), jnp.float32), counts=_int32(V), seen=jax.ShapeDtypeStruct((V,), jnp.bool_)
    )
    set_penalties = partial(step.set_penalties, model.parallel.vocab_axis)
    arguments = (state, _int32(), penalties)
    plans.append(Plan(PENALTIES, set_penalties, arguments, (0,), result_specs=specs_of(state)))
    copies = PageCopies(_int32(PAGE_COPIES), _int32(PAGE_COPIES))
    plans.append(Plan(COPY_PAGES, step.copy_pages, (state, copies), (0,), result_specs=specs_of(state)))
    if state.cache.experts is not None:
        plans.append(Plan(READ_EXPERTS, step.read_experts, (state, _int32(PAGE_COPIES))))
    return [replace(plan, mesh=model.mesh) for plan in plans]


def state_plan(model: BoundModel, state: DeviceState) -> Plan:
    """The program that creates an empty state like the abstract `state`."""
    zero_state = partial(step.zero_state, jax.tree.map(_local_shape, state))
    return Plan(ZERO_STATE, zero_state, (), mesh=model.mesh, result_specs=specs_of(state))


def _local_shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape of one device's part of an array."""
    sharding = leaf.sharding
    return jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape, leaf.dtype)


def _step_plan(model: BoundModel, leaves: Any, state: DeviceState, shape: DecodeShape | PrefillShape, k: int) -> Plan:
    R, tables, result_specs = shape.rows, _int32(shape.rows, shape.pages), (specs_of(state), PartitionSpec())
    if isinstance(shape, PrefillShape):
        chunk = StepInput(_int32(R, shape.tokens), _int32(R, shape.tokens), tables)
        return Plan(shape, partial(step.prefill, model), (leaves, state, chunk), (1,), result_specs=result_specs)
    rows = DecodeInput(_int32(R), _int32(R), tables, _int32(R), _int32(R, MAX_REQUESTED_IDS))
    sampling = _abstract(greedy_sampling(R, model.config.vocab_size))
    return Plan(shape, partial(step.decode, model, k), (leaves, state, rows, sampling), (1,), result_specs=result_specs)


def _head_plan(model: BoundModel, leaves: Any, state: DeviceState, shape: HeadShape, k: int) -> Plan:
    rows = _int32(shape.rows)
    if shape.full_vocab:
        columns = PartitionSpec(None, TENSOR)
        return Plan(shape, partial(step.full_vocab_logprobs, model), (leaves, state, rows), result_specs=columns)
    tokens = ScoreInput(rows, rows, _int32(shape.rows, MAX_REQUESTED_IDS))
    return Plan(shape, partial(step.score, model, k), (leaves, state, tokens))


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _abstract(tree: Any) -> Any:
    """Shapes and dtypes of a tree, and the shardings of arrays in a mesh."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        sharding = sharding if isinstance(sharding, NamedSharding) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


class ModelRunner:
    """Runs steps on numpy arrays padded to a compiled shape; knows no requests.

    A call dispatches a step and returns; `read` waits. Steps run in the order of the calls. The device may read an
    input without a copy until the step has run: the caller must not modify an array after passing it.
    """

    def __init__(
        self,
        model: BoundModel,
        buckets: Buckets,
        *,
        pages: int,
        max_logprobs: int,
        on_compiled: Callable[[Program], None] | None = None,
        cache: ProgramCache | None = None,
    ) -> None:
        """Compile every program.

        Args:
            model: weights on the device.
            buckets: the shapes.
            pages: N, pages of the cache, including the null page.
            max_logprobs: K, alternatives per token.
            on_compiled: called with each program when it is ready, from a compile thread.
            cache: programs of earlier starts. Code that was changed in this process would not be noticed.
        """
        self.buckets = buckets
        self.pages = pages
        self.max_logprobs = max_logprobs
        self.vocab_size = model.config.vocab_size
        self._leaves = model.leaves
        shapes = state_shapes(model, buckets, pages=pages)
        stored = cache.programs_of(model, buckets, pages, max_logprobs) if cache else None
        first = compile_plans([state_plan(model, shapes)], on_compiled, stored)
        with ThreadPoolExecutor(1, thread_name_prefix="state") as pool:  # allocating it takes seconds
            state = pool.submit(lambda: jax.block_until_ready(first[ZERO_STATE].compiled()))
            rest = compile_plans(make_plans(model, buckets, shapes, max_logprobs), on_compiled, stored)
            self._state: DeviceState = state.result()
        self.programs = Programs(first | rest)

    def prefill(self, inputs: StepInput) -> Array:
        """Dispatch prompt tokens [R, T]; return their number, [] on the device, to wait for.

        Raises:
            UnknownShapeError: no program was compiled for this size; also raised by the other methods.
        """
        rows, tokens = inputs.tokens.shape
        compiled = self._compiled(PrefillShape(rows, tokens, inputs.tables.shape[1]))
        count: Array
        self._state, count = compiled(self._leaves, self._state, inputs)
        return _start_copy(count)

    def decode(self, inputs: DecodeInput, sampling: SamplingArrays) -> StepOutput:
        """Dispatch one token of every row [R]; the result is on the device."""
        compiled = self._compiled(DecodeShape(*inputs.tables.shape))
        output: StepOutput
        self._state, output = compiled(self._leaves, self._state, inputs, sampling)
        return _start_copy(output)

    def score(self, inputs: ScoreInput) -> TokenLogprobs:
        """Dispatch a block of prompt tokens [M]; the result is on the device."""
        compiled = self._compiled(HeadShape(len(inputs.cache_indices), full_vocab=False))
        logprobs: TokenLogprobs = compiled(self._leaves, self._state, inputs)
        return _start_copy(logprobs)

    def full_vocab_logprobs(self, cache_indices: NDArray[np.int32]) -> NDArray[np.float32]:
        """Log-probs [M, V] of every token after the cached tokens at cache_indices [M]. Waits for the result."""
        compiled = self._compiled(HeadShape(len(cache_indices), full_vocab=True))
        return np.asarray(compiled(self._leaves, self._state, cache_indices))[:, : self.vocab_size]

    def copy_pages(self, copies: PageCopies) -> None:
        """Dispatch copies of pages [C]."""
        self._state = self._compiled(COPY_PAGES)(self._state, copies)

    def read_experts(self, pages: NDArray[np.int32]) -> Array:
        """Dispatch reading the experts [C, S, L, k] of the tokens in pages [C]; the result is on the device."""
        experts: Array = self._compiled(READ_EXPERTS)(self._state, pages)
        return _start_copy(experts)

    def set_penalties(self, slot: int, penalties: SlotPenalties) -> None:
        """Dispatch the replacement of a slot's bias, counts and seen tokens."""
        compiled = self._compiled(PENALTIES)
        self._state = compiled(self._state, np.asarray(slot, np.int32), penalties)

    @staticmethod
    def read[T](tree: T) -> T:
        """The tree with numpy arrays. Waits for them."""
        arrays: T = jax.tree.map(np.asarray, tree)
        return arrays

    def reset(self) -> None:
        """Replace the state by an empty one: a step that fails after donation loses the old one, or part of it.

        The remaining arrays are deleted first: a large cache may not fit twice.
        """
        for leaf in jax.tree.leaves(self._state):
            if not leaf.is_deleted():
                leaf.delete()
        self._state = self._compiled(ZERO_STATE)()

    def _compiled(self, shape: Shape) -> Any:
        return self.programs[shape].compiled


def _start_copy[T](tree: T) -> T:
    """Start the copy to the host now instead of at the first read."""
    for leaf in jax.tree.leaves(tree):
        leaf.copy_to_host_async()
    return tree
