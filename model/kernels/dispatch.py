"""Chooses between a kernel and XLA by the platform that a program is compiled for, not by the machine that compiles.

`jax.lax.platform_dependent` does this too, but traces all implementations each time: a third of a start with warm
caches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from model.kernels.cpu import CpuKernels, load_library

type Implementation = Callable[..., Any]
type _Flat = Callable[..., Sequence[Array]]  # takes and returns the leaves of its arguments and results

_PLATFORMS = ("cpu", "cuda", "tpu")  # platforms that have kernels, as JAX names them when it lowers
_XLA = "xla"


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels that a model's programs may call. Those for GPU and TPU need nothing that is built or loaded."""

    cpu: CpuKernels | None = None  # None: XLA's own code on a CPU

    def segment(self, platform: str) -> int:
        """Tokens of a row of a packed prefill on a platform, as JAX names it.

        The CPU's attention joins neighbouring tokens of one block table; other implementations run rows separately.
        """
        return 1 if platform == "cpu" and self.cpu is not None else 16

    def dispatch(
        self,
        *arguments: Any,
        xla: Implementation,
        on_cpu: Implementation | None = None,
        on_gpu: Implementation | None = None,
        on_tpu: Implementation | None = None,
    ) -> Any:
        """Call the implementation for the platform that the program is compiled for; `xla` if it has none.

        Arguments and results are pytrees of arrays, of the same shapes and dtypes in all. `on_gpu` is for NVIDIA.
        """
        kernels = zip(_PLATFORMS, (on_cpu if self.cpu is not None else None, on_gpu, on_tpu), strict=True)
        implementations = {platform: kernel for platform, kernel in kernels if kernel is not None}
        if not implementations:
            return xla(*arguments)
        leaves, tree = jax.tree.flatten(arguments)
        shapes, result_tree = jax.tree.flatten(jax.eval_shape(implementations.get("cpu", xla), *arguments))

        def flatten(implementation: Implementation) -> _Flat:
            return lambda *leaves: jax.tree.leaves(implementation(*jax.tree.unflatten(tree, leaves)))

        results = _DISPATCH.bind(
            *leaves,
            implementations=tuple(
                (name, flatten(function)) for name, function in {**implementations, _XLA: xla}.items()
            ),
            shapes=tuple(ShapedArray(shape.shape, shape.dtype) for shape in shapes),
        )
        return jax.tree.unflatten(result_tree, results)


def load_kernels() -> Kernels:
    """The kernels of this machine; registers those of the CPU with XLA."""
    return Kernels(load_library())


def _implementation_for(platform: str) -> _Flat:
    def run(*leaves: Array, implementations: tuple[tuple[str, _Flat], ...], **_: Any) -> Sequence[Array]:
        by_platform = dict(implementations)
        return by_platform.get(platform, by_platform[_XLA])(*leaves)

    return run


def _outside_jit(*leaves: Array, **parameters: Any) -> Sequence[Array]:
    results: Sequence[Array] = jax.jit(lambda *leaves: _DISPATCH.bind(*leaves, **parameters))(*leaves)
    return results


_DISPATCH = Primitive("dispatch")
_DISPATCH.multiple_results = True
_DISPATCH.def_abstract_eval(lambda *_, shapes, **__: shapes)
_DISPATCH.def_impl(_outside_jit)
mlir.register_lowering(_DISPATCH, mlir.lower_fun(_implementation_for(_XLA), multiple_results=True))
for _platform in _PLATFORMS:
    mlir.register_lowering(
        _DISPATCH, mlir.lower_fun(_implementation_for(_platform), multiple_results=True), platform=_platform
    )
