"""Ahead-of-time compilation: every program is lowered and compiled once, kept, and called directly.

A `Compiled` raises TypeError on any other shape or dtype, so "no compile while serving" is a guarantee.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled, Lowered

from compiled.program_cache import delete_entries, seal_entries
from compiled.shapes import HeadShape, SlotShape, StateShape, StepShape

type Shape = StepShape | HeadShape | SlotShape | StateShape


class UnknownShapeError(LookupError):
    """A step was asked for in a shape that no program was compiled for."""


class RefusedError(RuntimeError):
    """The compiler of a platform does not take a program; the message names it, with the reason."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One program to be made: a function named after its shape, and the shapes of its arguments."""

    shape: Shape
    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # pytrees of jax.ShapeDtypeStruct, which say how they lie in a mesh
    donate: tuple[int, ...] = ()
    mesh: Mesh | None = None  # one program for each of its devices
    results: Any = None  # how the results lie in the mesh: PartitionSpecs, a prefix of their tree; None: whole in each

    def lower(self) -> Lowered:
        """Traces the function."""
        function = self.function
        if self.mesh is not None:
            taken, given = specs_of(self.arguments), PartitionSpec() if self.results is None else self.results
            # Not checked: the kernels' calls do not say what of their results differs between shards.
            function = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=taken,
                out_specs=given,
                check_vma=False,
            )

        def named(*arguments: Any) -> Any:
            return function(*arguments)

        named.__name__ = named.__qualname__ = self.shape.name  # the HLO module's name, and the cache entry's
        return jax.jit(named, donate_argnums=self.donate).lower(*self.arguments)


@dataclass(frozen=True, slots=True)
class Program:
    """One executable and what it took to make."""

    shape: Shape
    compiled: Compiled
    lower_seconds: float
    compile_seconds: float  # reading it from the persistent cache counts here

    @property
    def name(self) -> str:
        """The shape's name."""
        return self.shape.name

    @property
    def temp_bytes(self) -> int:
        """Scratch memory of one call, arguments and results apart."""
        analysis = self.compiled.memory_analysis()
        return int(analysis.temp_size_in_bytes) if analysis is not None else 0


class Programs:
    """The executables of one server, by shape."""

    def __init__(self, programs: Iterable[Program]) -> None:
        self._programs: Mapping[Shape, Program] = {program.shape: program for program in programs}

    def __iter__(self) -> Iterator[Program]:
        return iter(self._programs.values())

    def __getitem__(self, shape: Shape) -> Program:
        """The program of a shape.

        Raises:
            UnknownShapeError: nothing was compiled for it.
        """
        try:
            return self._programs[shape]
        except KeyError:
            raise UnknownShapeError(f"no program was compiled for {shape}") from None


def compile_plans(plans: Iterable[Plan], on_done: Callable[[Program], None] | None = None) -> Programs:
    """Compiles all plans on a few threads; every failure is raised.

    Raises:
        RefusedError: the platform's compiler does not take a program, for want of memory, say.

    Nothing else may be compiled at the same time: it would fail on a damaged entry of the persistent cache.
    """
    todo = list(plans)
    threads = min(4, os.cpu_count() or 1)
    with _cache_errors(), ThreadPoolExecutor(max_workers=threads, thread_name_prefix="compile") as pool:
        futures = [pool.submit(_compile, plan, on_done) for plan in todo]
        try:
            programs = Programs(future.result() for future in futures)
            seal_entries()  # what jax has compiled on its own, too
            return programs
        except BaseException:  # an interrupt, too, does not wait for those that have not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _cache_errors() -> Iterator[None]:
    """A torn cache entry only warns by default and is never rewritten; as an error it can be deleted and made anew.

    For programs only: where jax compiles on its own, say to pack a weight, nobody would catch the error.
    """
    jax.config.update("jax_raise_persistent_cache_errors", True)
    try:
        yield
    finally:
        jax.config.update("jax_raise_persistent_cache_errors", False)


def specs_of(tree: Any) -> Any:
    """How the abstract arrays of a tree lie in their mesh; what says nothing is in every device whole."""

    def spec(leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
        return leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else PartitionSpec()

    return jax.tree.map(spec, tree)


def _compile(plan: Plan, on_done: Callable[[Program], None] | None) -> Program:
    start = time.perf_counter()
    lowered = plan.lower()
    middle = time.perf_counter()
    try:
        compiled = lowered.compile()
    except Exception:  # noqa: BLE001 - a torn cache entry or a full disk; what is wrong with the program comes again
        compiled = _compile_past_cache(lowered, plan.shape.name)
    program = Program(plan.shape, compiled, middle - start, time.perf_counter() - middle)
    seal_entries(plan.shape.name)
    if on_done is not None:
        on_done(program)
    return program


def _compile_past_cache(lowered: Lowered, name: str) -> Compiled:
    delete_entries(name)
    try:
        return lowered.compile()
    except Exception:  # noqa: BLE001 - not this entry: from here on the cache may fail, which jax then warns about
        jax.config.update("jax_raise_persistent_cache_errors", False)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise RefusedError(f"{name}: {str(error).splitlines()[0]}") from error
