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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from compiled import step
from compiled.programs import Plan, Program, Programs, Shape, compile_plans, specs_of
from compiled.shapes import Buckets, HeadShape, SlotShape, StateShape, StepShape
from compiled.state import (
    MAX_REQUESTED_IDS,
    Adjustment,
    DecodeInput,
    DeviceState,
    SamplingArrays,
    ScoreInput,
    SlotState,
    StepInput,
    StepOutput,
    greedy_sampling,
)
from model.sharding import TENSOR
from model.token_logprobs import TokenLogprobs
from model.transformer import BoundModel


def state_shapes(model: BoundModel, buckets: Buckets, *, pages: int) -> DeviceState:
    """Abstract DeviceState of a server with N `pages`, the null page included."""
    layout, cut = model.cache_layout, model.cut
    Z, V = buckets.slots, cut.shards * cut.local.vocab_size
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
    return _placed(state, specs, model.mesh)


def _placed[T](shapes: T, specs: T, mesh: Mesh) -> T:
    placed: T = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        shapes,
        specs,
    )
    return placed


def make_plans(model: BoundModel, buckets: Buckets, state: DeviceState, k: int) -> list[Plan]:
    """What has to be compiled for a model. All arguments may be abstract."""
    leaves, state = _abstract((model.leaves, state))
    V = model.config.vocab_size
    plans = [_step_plan(model, leaves, state, shape, k) for shape in buckets.steps()]
    plans += [_head_plan(model, leaves, state, shape, k) for shape in buckets.heads()]
    adjustment = Adjustment(
        bias=jax.ShapeDtypeStruct((V,), jnp.float32), counts=_int32(V), seen=jax.ShapeDtypeStruct((V,), jnp.bool_)
    )
    adjust = partial(step.adjust, model.cut.vocabulary)
    plans.append(Plan(SlotShape(buckets.slots), adjust, (state, _int32(), adjustment), (0,), results=specs_of(state)))
    return [replace(plan, mesh=model.mesh) for plan in plans]


def state_plan(state: DeviceState) -> Plan:
    """What makes a fresh state like the abstract `state`."""
    shape = StateShape(state.cache.hidden.shape[0], state.slots.tokens.shape[0])
    parts = jax.tree.map(_part, state)
    return Plan(shape, partial(step.zero_state, parts), (), mesh=_mesh_of(state), results=specs_of(state))


def _mesh_of(state: DeviceState) -> Mesh | None:
    placed = state.cache.hidden.sharding
    mesh = placed.mesh if isinstance(placed, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def _part(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What one device holds of an array."""
    placed = leaf.sharding
    return jax.ShapeDtypeStruct(placed.shard_shape(leaf.shape) if placed is not None else leaf.shape, leaf.dtype)


def _step_plan(model: BoundModel, leaves: Any, state: DeviceState, shape: StepShape, k: int) -> Plan:
    R, T, tables = shape.rows, shape.chunk, _int32(shape.rows, shape.pages)
    results = (specs_of(state), PartitionSpec())
    if T > 1:
        chunk = StepInput(_int32(R, T), _int32(R, T), tables)
        return Plan(shape, partial(step.prefill, model), (leaves, state, chunk), (1,), results=results)
    rows = DecodeInput(_int32(R), _int32(R), tables, _int32(R), _int32(R, MAX_REQUESTED_IDS))
    sampling = _abstract(greedy_sampling(R, model.config.vocab_size))
    return Plan(shape, partial(step.decode, model, k), (leaves, state, rows, sampling), (1,), results=results)


def _head_plan(model: BoundModel, leaves: Any, state: DeviceState, shape: HeadShape, k: int) -> Plan:
    places = _int32(shape.rows)
    if shape.whole:
        columns = PartitionSpec(None, TENSOR)
        return Plan(shape, partial(step.vocabulary, model), (leaves, state, places), results=columns)
    tokens = ScoreInput(places, places, _int32(shape.rows, MAX_REQUESTED_IDS))
    return Plan(shape, partial(step.score, model, k), (leaves, state, tokens))


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _abstract(tree: Any) -> Any:
    """Shapes, dtypes and, of what lies in a mesh, where it lies."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        placed = getattr(leaf, "sharding", None)
        placed = placed if isinstance(placed, NamedSharding) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    return jax.tree.map(shape, tree)


class ModelRunner:
    """Runs steps. Inputs are numpy arrays padded to a compiled shape; nothing here knows a request.

    A call begins a step and returns; `read` waits. Steps run in the order of the calls. The device may read an input
    where it lies, at any time until the step has run: an array must not be changed once it has been handed over.
    """

    def __init__(
        self,
        model: BoundModel,
        buckets: Buckets,
        *,
        pages: int,
        max_logprobs: int,
        on_compiled: Callable[[Program], None] | None = None,
    ) -> None:
        """Compiles every program.

        Args:
            model: weights on the device.
            buckets: the shapes.
            pages: N, pages of the cache, the null page included.
            max_logprobs: K, alternatives per token.
            on_compiled: told of each program when it is ready, from a compile thread.
        """
        self.buckets = buckets
        self.pages = pages
        self.max_logprobs = max_logprobs
        self.vocab_size = model.config.vocab_size
        self._leaves = model.leaves
        shapes = state_shapes(model, buckets, pages=pages)
        first = compile_plans([state_plan(shapes)], on_compiled)
        (zero_state,) = first
        with ThreadPoolExecutor(1, thread_name_prefix="state") as pool:  # fresh memory takes seconds to come
            state = pool.submit(lambda: jax.block_until_ready(zero_state.compiled()))
            rest = compile_plans(make_plans(model, buckets, shapes, max_logprobs), on_compiled)
            self._state: DeviceState = state.result()
        self.programs = Programs([*first, *rest])

    def prefill(self, inputs: StepInput) -> Array:
        """Begins one chunk of a row; inputs [1, T]. How many tokens it has, [] on the device: there when it is done.

        Raises:
            UnknownShapeError: no program was compiled for this size; so do all methods that take arrays.
        """
        rows, chunk = inputs.tokens.shape
        compiled = self._compiled(StepShape(rows, chunk, inputs.tables.shape[1]))
        count: Array
        self._state, count = compiled(self._leaves, self._state, inputs)
        return _on_its_way(count)

    def decode(self, inputs: DecodeInput, sampling: SamplingArrays) -> StepOutput:
        """Begins one token of every row [R]; the result is on the device."""
        rows, pages = inputs.tables.shape
        compiled = self._compiled(StepShape(rows, 1, pages))
        output: StepOutput
        self._state, output = compiled(self._leaves, self._state, inputs, sampling)
        return _on_its_way(output)

    def score(self, inputs: ScoreInput) -> TokenLogprobs:
        """Begins a block of prompt tokens [M]; the result is on the device."""
        compiled = self._compiled(HeadShape(len(inputs.places), whole=False))
        logprobs: TokenLogprobs = compiled(self._leaves, self._state, inputs)
        return _on_its_way(logprobs)

    def vocabulary(self, places: NDArray[np.int32]) -> NDArray[np.float32]:
        """Log-probs [M, V] of every token after the cached tokens in places [M]. Waits for the result."""
        compiled = self._compiled(HeadShape(len(places), whole=True))
        return np.asarray(compiled(self._leaves, self._state, places))[:, : self.vocab_size]

    def adjust(self, slot: int, adjustment: Adjustment) -> None:
        """Begins to replace what a slot adds to its request's choices."""
        compiled = self._compiled(SlotShape(self.buckets.slots))
        self._state = compiled(self._state, np.asarray(slot, np.int32), adjustment)

    @staticmethod
    def read[T](tree: T) -> T:
        """The same tree with numpy arrays. Waits for them."""
        arrays: T = jax.tree.map(np.asarray, tree)
        return arrays

    def reset(self) -> None:
        """A fresh, empty state: a step that failed after donation has lost the old one, or part of it.

        What is left of it goes first: a large cache may not fit twice.
        """
        for leaf in jax.tree.leaves(self._state):
            if not leaf.is_deleted():
                leaf.delete()
        self._state = self._compiled(StateShape(self.pages, self.buckets.slots))()

    def _compiled(self, shape: Shape) -> Any:
        return self.programs[shape].compiled


def _on_its_way[T](tree: T) -> T:
    """Starts the copy to the host, so that it does not begin only when somebody reads."""
    for leaf in jax.tree.leaves(tree):
        leaf.copy_to_host_async()
    return tree
