"""Modules of equal structure share one trace; other modules and shapes are traced separately."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.transformer import traced_once


class Scale(nnx.Module):
    def __init__(self, factor: float, *, twice: bool = False) -> None:
        self.factor = nnx.Param(jnp.float32(factor))
        self.twice = twice

    def __call__(self, x: jax.Array) -> jax.Array:
        scaled = x * self.factor.get_value()
        return scaled * 2 if self.twice else scaled


def test_traced_once_for_modules_of_equal_structure() -> None:
    traces = []

    def method(module: Scale, x: jax.Array) -> jax.Array:
        traces.append(module.twice)
        return module(x)

    run = traced_once(method)
    x = jnp.ones(3)
    results = [run(Scale(2.0), x), run(Scale(3.0), x), run(Scale(3.0, twice=True), x), run(Scale(4.0), x)]
    np.testing.assert_array_equal([result[0] for result in results], [2, 3, 6, 4])
    assert traces == [False, True]
    run(Scale(2.0), jnp.ones(4))
    assert traces == [False, True, False]
