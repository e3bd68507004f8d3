"""Chooses between a kernel and XLA by the platform that a program is compiled for, not by the machine that compiles.

`jax.lax.platform_dependent` does this too, but traces both forms each time: a third of a start with warm caches.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from model.kernels import cpu

type Form = Callable[..., Sequence[Array]]


def by_platform(*arguments: Any, on_cpu: Callable[..., Any], xla: Callable[..., Any]) -> Any:
    """Of two forms of one function, `on_cpu` where the kernels are there and the program is for the CPU, else `xla`.

    Arguments and results are pytrees of arrays, of the same shapes and dtypes in both.
    """
    if cpu.load() is None:
        return xla(*arguments)
    leaves, tree = jax.tree.flatten(arguments)
    shapes, results = jax.tree.flatten(jax.eval_shape(on_cpu, *arguments))

    def flat(form: Callable[..., Any]) -> Form:
        return lambda *leaves: jax.tree.leaves(form(*jax.tree.unflatten(tree, leaves)))

    kinds = tuple(ShapedArray(shape.shape, shape.dtype) for shape in shapes)
    chosen = _BY_PLATFORM.bind(*leaves, on_cpu=flat(on_cpu), xla=flat(xla), kinds=kinds)
    return jax.tree.unflatten(results, chosen)


def _on_cpu(*leaves: Array, on_cpu: Form, **_: Any) -> Sequence[Array]:
    return on_cpu(*leaves)


def _in_xla(*leaves: Array, xla: Form, **_: Any) -> Sequence[Array]:
    return xla(*leaves)


def _outside_jit(*leaves: Array, **forms: Any) -> Sequence[Array]:
    chosen: Sequence[Array] = jax.jit(lambda *leaves: _BY_PLATFORM.bind(*leaves, **forms))(*leaves)
    return chosen


_BY_PLATFORM = Primitive("by_platform")
_BY_PLATFORM.multiple_results = True
_BY_PLATFORM.def_abstract_eval(lambda *_, kinds, **__: kinds)
_BY_PLATFORM.def_impl(_outside_jit)
mlir.register_lowering(_BY_PLATFORM, mlir.lower_fun(_in_xla, multiple_results=True))
mlir.register_lowering(_BY_PLATFORM, mlir.lower_fun(_on_cpu, multiple_results=True), platform="cpu")
