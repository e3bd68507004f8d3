"""Chooses between a kernel and XLA by the platform that a program is compiled for, not by the machine that compiles.

`jax.lax.platform_dependent` does this too, but traces all forms each time: a third of a start with warm caches.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from model.kernels import cpu

type Form = Callable[..., Any]
type _Forms = tuple[tuple[str, Callable[..., Sequence[Array]]], ...]  # platform -> form of flat arguments

_PLATFORMS = ("cpu", "cuda", "tpu")  # for which there are kernels, as JAX calls them when it lowers
_XLA = "xla"


def by_platform(
    *arguments: Any, xla: Form, on_cpu: Form | None = None, on_gpu: Form | None = None, on_tpu: Form | None = None
) -> Any:
    """Of the forms of one function, that of the platform which the program is compiled for; `xla` where it has none.

    `on_cpu` counts where its kernels have been built, `on_gpu` for NVIDIA. Arguments and results are pytrees of arrays,
    of the same shapes and dtypes in all.
    """
    forms = dict(zip(_PLATFORMS, (on_cpu if cpu.load() is not None else None, on_gpu, on_tpu), strict=True))
    kernels = {platform: form for platform, form in forms.items() if form is not None}
    if not kernels:
        return xla(*arguments)
    leaves, tree = jax.tree.flatten(arguments)
    shapes, results = jax.tree.flatten(jax.eval_shape(kernels.get("cpu", xla), *arguments))

    def flat(form: Form) -> Callable[..., Sequence[Array]]:
        return lambda *leaves: jax.tree.leaves(form(*jax.tree.unflatten(tree, leaves)))

    kinds = tuple(ShapedArray(shape.shape, shape.dtype) for shape in shapes)
    flattened = tuple((platform, flat(form)) for platform, form in {**kernels, _XLA: xla}.items())
    chosen = _BY_PLATFORM.bind(*leaves, forms=flattened, kinds=kinds)
    return jax.tree.unflatten(results, chosen)


def _form_for(platform: str) -> Callable[..., Sequence[Array]]:
    def run(*leaves: Array, forms: _Forms, **_: Any) -> Sequence[Array]:
        own = dict(forms)
        return own.get(platform, own[_XLA])(*leaves)

    return run


def _outside_jit(*leaves: Array, **forms: Any) -> Sequence[Array]:
    chosen: Sequence[Array] = jax.jit(lambda *leaves: _BY_PLATFORM.bind(*leaves, **forms))(*leaves)
    return chosen


_BY_PLATFORM = Primitive("by_platform")
_BY_PLATFORM.multiple_results = True
_BY_PLATFORM.def_abstract_eval(lambda *_, kinds, **__: kinds)
_BY_PLATFORM.def_impl(_outside_jit)
mlir.register_lowering(_BY_PLATFORM, mlir.lower_fun(_form_for(_XLA), multiple_results=True))
for _platform in _PLATFORMS:
    mlir.register_lowering(
        _BY_PLATFORM, mlir.lower_fun(_form_for(_platform), multiple_results=True), platform=_platform
    )
