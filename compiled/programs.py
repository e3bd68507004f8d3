"""Ahead-of-time compilation: every program is lowered and compiled once, at start-up, and then called directly.

A `Compiled` raises TypeError on any other shape or dtype, so "no compile while serving" is a guarantee.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled, Lowered

from compiled.program_cache import ModelPrograms
from compiled.shapes import DecodeShape, HeadShape, PrefillShape, SingleShape

type Shape = DecodeShape | PrefillShape | HeadShape | SingleShape


class UnknownShapeError(LookupError):
    """No program was compiled for the shape of a step."""


class RefusedError(RuntimeError):
    """The platform's compiler rejects a program; the message has its name and the reason."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A program to compile: its shape, which names it, a function, and the shapes of the arguments."""

    shape: Shape
    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # pytrees of jax.ShapeDtypeStruct with their shardings
    donate: tuple[int, ...] = ()
    mesh: Mesh | None = None  # the function runs once per device
    result_specs: Any = None  # PartitionSpecs of the results, a prefix of their tree; None: replicated

    def lower(self) -> Lowered:
        function = self.function
        if self.mesh is not None:
            out_specs = PartitionSpec() if self.result_specs is None else self.result_specs
            # check_vma: the kernels' calls do not declare which of their results differ between shards.
            function = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=specs_of(self.arguments),
                out_specs=out_specs,
                check_vma=False,
            )

        def named(*arguments: Any) -> Any:
            return function(*arguments)

        named.__name__ = named.__qualname__ = self.shape.name  # the HLO module's name, and the cache entry's
        return jax.jit(named, donate_argnums=self.donate).lower(*self.arguments)


@dataclass(frozen=True, slots=True)
class Program:
    """An executable and the time it took to make."""

    shape: Shape
    compiled: Compiled
    lower_seconds: float  # 0 if it was found without
    compile_seconds: float  # or the time to read it from the cache
    is_cached: bool

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def temp_bytes(self) -> int:
        """Scratch memory of one call, without arguments and results."""
        analysis = self.compiled.memory_analysis()
        return int(analysis.temp_size_in_bytes) if analysis is not None else 0


class Programs(dict[Shape, Program]):
    """The executables of one server, by shape."""

    def __missing__(self, shape: Shape) -> Program:
        raise UnknownShapeError(f"no program was compiled for {shape}")


def compile_plans(
    plans: Sequence[Plan], on_compiled: Callable[[Program], None] | None = None, cache: ModelPrograms | None = None
) -> Programs:
    """Compile all plans that are not cached, on a few threads; call `on_compiled` from them with each program.

    Raises:
        RefusedError: the platform's compiler rejects a program, for example for lack of memory.
    """
    threads = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="compile") as pool:
        futures = [pool.submit(_compile, plan, on_compiled, cache) for plan in plans]
        try:
            return Programs((plan.shape, future.result()) for plan, future in zip(plans, futures, strict=True))
        except BaseException:  # do not wait for plans that have not started, not even after an interrupt
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def specs_of(tree: Any) -> Any:
    """PartitionSpecs of a tree of abstract arrays; an array without a sharding is replicated."""

    def spec(leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
        return leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else PartitionSpec()

    return jax.tree.map(spec, tree)


def _compile(plan: Plan, on_compiled: Callable[[Program], None] | None, cache: ModelPrograms | None) -> Program:
    start, name = time.perf_counter(), plan.shape.name
    lower_seconds, is_cached = 0.0, True
    compiled = cache.find(name) if cache else None
    if compiled is None:
        lowered = plan.lower()
        lower_seconds = time.perf_counter() - start
        compiled = cache.find_lowered(name, lowered) if cache else None
        if compiled is None:
            is_cached = False
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                raise RefusedError(f"{name}: {str(error).splitlines()[0]}") from error
            if cache:
                cache.save(name, lowered, compiled)
    program = Program(plan.shape, compiled, lower_seconds, time.perf_counter() - start - lower_seconds, is_cached)
    if on_compiled is not None:
        on_compiled(program)
    return program
