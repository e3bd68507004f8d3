"""ModelRunner: owns the weights, the DeviceState and the executables. One thread uses it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compiled import step
from compiled.programs import Plan, Program, Programs, compile_plans
from compiled.shapes import Buckets, HeadShape, StepShape
from compiled.state import DeviceState, SamplingArrays, StepInput, StepOutput, TokenLogprobs, greedy_sampling
from model.kv_cache import cache_shape
from model.transformer import BoundModel


def step_shapes(shape: StepShape) -> StepInput:
    """Abstract StepInput of a step."""
    tokens = jax.ShapeDtypeStruct((shape.rows, shape.chunk), jnp.int32)
    return StepInput(tokens, tokens, jax.ShapeDtypeStruct((shape.rows, shape.pages), jnp.int32))


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def make_plans(model: BoundModel, buckets: Buckets, state: DeviceState, k: int) -> list[Plan]:
    """What has to be compiled for a model: every step and head shape. All arguments may be abstract."""
    leaves = _abstract(model.leaves)
    plans = []
    for shape in buckets.steps():
        if shape.chunk == 1:
            sampling = _abstract(greedy_sampling(shape.rows))
            arguments: tuple[Any, ...] = (leaves, state, step_shapes(shape), sampling)
            plans.append(Plan(shape, partial(step.decode, model, k), arguments, donate=(1,)))
        else:
            arguments = (leaves, state, step_shapes(shape))
            plans.append(Plan(shape, partial(step.prefill, model), arguments, donate=(1,)))
    for head in buckets.heads():
        places = jax.ShapeDtypeStruct((head.rows,), jnp.int32)
        if head.samples:
            arguments = (leaves, state, places, _abstract(greedy_sampling(head.rows)))
            plans.append(Plan(head, partial(step.sample, model, k), arguments))
        else:
            plans.append(Plan(head, partial(step.score, model, k), (leaves, state, places, places)))
    return plans


class ModelRunner:
    """Runs steps. Inputs and outputs are numpy arrays padded to a compiled shape; nothing here knows a request."""

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
        self._leaves = model.leaves
        self._state_shapes = DeviceState(cache_shape(model.config, pages, model.dtype))
        self.programs: Programs = compile_plans(
            make_plans(model, buckets, self._state_shapes, max_logprobs), on_compiled
        )
        self._state = step.zero_state(self._state_shapes)

    def prefill(self, inputs: StepInput) -> None:
        """Runs one chunk of a row; inputs [1, T]."""
        self._state = self._step(inputs)(self._leaves, self._state, inputs)

    def decode(self, inputs: StepInput, sampling: SamplingArrays) -> StepOutput:
        """Runs one token of every row; inputs [R, 1]. Waits for the result."""
        self._state, output = self._step(inputs)(self._leaves, self._state, inputs, sampling)
        result: StepOutput = jax.tree.map(np.asarray, output)
        return result

    def sample(self, places: np.ndarray, sampling: SamplingArrays) -> StepOutput:
        """Chooses the token after each cached token in places [R]. Waits for the result."""
        program = self.programs[HeadShape(len(places), samples=True)]
        result: StepOutput = jax.tree.map(np.asarray, program.compiled(self._leaves, self._state, places, sampling))
        return result

    def score(self, places: np.ndarray, targets: np.ndarray) -> TokenLogprobs:
        """The numbers of targets [M] after the cached tokens in places [M]. Waits for the result."""
        program = self.programs[HeadShape(len(places), samples=False)]
        result: TokenLogprobs = jax.tree.map(np.asarray, program.compiled(self._leaves, self._state, places, targets))
        return result

    def reset(self) -> None:
        """A fresh, empty state: a step that failed after donation has lost the old one."""
        self._state = step.zero_state(self._state_shapes)

    def _step(self, inputs: StepInput) -> Any:
        rows, chunk = inputs.tokens.shape
        return self.programs[StepShape(rows, chunk, inputs.tables.shape[1])].compiled
