"""Compiles the kernels for the installed jaxlib: `python -m model.kernels.cpu.build`."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from model.kernels.cpu.library import INSTRUCTION_SETS, library_path

UNITS = ("linear.cc", "attention.cc", "rows.cc", "head.cc")
HEADERS = (
    "tiles.h",
    "attention.h",
    "rows.h",
    "head.h",
    "weight.h",
    "parallel.h",
    "vectors.h",
    "vectors_avx512.h",
    "vectors_avx2.h",
    "vectors_neon.h",
    "vectors_parts.h",
)
FLAGS_FROM = ("build.py", "library.py")
SOURCES = tuple(Path(__file__).with_name(name) for name in (*UNITS, *HEADERS, *FLAGS_FROM))
COMPILERS = ("c++", "g++", "clang++")
# No -march=native: the right library is picked when it is loaded, so it can be built on another machine.
# No contraction: a multiply-add is fused where the source says so, and nowhere else.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off")
_X86, _ARM = ("x86_64", "amd64"), ("aarch64", "arm64")


def instruction_sets(machine: str) -> tuple[str, ...]:
    """Those of a machine, as platform.machine() calls it, for which the kernels are written."""
    if machine.lower() in _X86:
        return ("avx512", "avx2")
    return ("neon",) if machine.lower() in _ARM else ()


def build(sources: Sequence[Path], library: Path, flags: Sequence[str] = ()) -> str:
    """Makes `library` from the .cc files of `sources`, unless it is newer than all of them; the line to print.

    Raises RuntimeError (no compiler, a compile that fails) or OSError (a folder that cannot be written).
    """
    if library.exists() and library.stat().st_mtime >= max(source.stat().st_mtime for source in sources):
        return f"CPU kernels: {library.name} is up to date"
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RuntimeError(f"no C++ compiler on PATH ({', '.join(COMPILERS)})")
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    units = (str(source) for source in sources if source.suffix == ".cc")
    command = [compiler, *FLAGS, *flags, "-isystem", jax.ffi.include_dir(), *units, "-o", str(unfinished)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            errors = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()
            raise RuntimeError(f"{compiler} failed: {errors[0] if errors else f'exit code {run.returncode}'}")
        unfinished.replace(library)
    finally:
        unfinished.unlink(missing_ok=True)
    return f"CPU kernels: built {library.name} with {compiler}"


def build_all() -> list[str]:
    """Builds a library for each instruction set of this machine, side by side; the lines to print.

    Raises RuntimeError where there are no kernels for the machine, or none could be built.
    """
    names = instruction_sets(platform.machine())
    if not names:
        raise RuntimeError(f"none are written for {platform.machine()}")
    with ThreadPoolExecutor() as threads:
        builds = [threads.submit(build, SOURCES, library_path(name), INSTRUCTION_SETS[name]) for name in names]
    failures = {name: done.exception() for name, done in zip(names, builds, strict=True)}
    if all(failures.values()):
        raise RuntimeError(str(failures[names[0]]))
    return [
        f"CPU kernels: not built for {name}: {failures[name]}" if failures[name] else done.result()
        for name, done in zip(names, builds, strict=True)
    ]


def main() -> int:
    """Builds the kernels; they are optional, so a failure is one line on stderr and the exit code is 0."""
    try:
        print("\n".join(build_all()))
    except RuntimeError as error:
        print(f"CPU kernels: {error}; XLA does their work", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
