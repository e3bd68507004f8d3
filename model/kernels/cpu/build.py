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

from model.kernels.cpu.library import FLAGS, INSTRUCTION_SETS, UNITS, library_path

COMPILERS = ("c++", "g++", "clang++")
_X86, _ARM = ("x86_64", "amd64"), ("aarch64", "arm64")


def instruction_sets(machine: str) -> tuple[str, ...]:
    """Those of a machine, as platform.machine() calls it, for which the kernels are written."""
    if machine.lower() in _X86:
        return ("avx512", "avx2")
    return ("neon",) if machine.lower() in _ARM else ()


def build(units: Sequence[Path], library: Path, flags: Sequence[str] = ()) -> str:
    """Makes `library`, named NAME-DIGEST.so, from .cc files unless it is there; the line to print.

    The first compiler that can is taken. Older libraries of the same NAME are deleted.
    Raises RuntimeError (no compiler, none that can) or OSError (a folder that cannot be written).
    """
    if library.exists():
        return f"CPU kernels: {library.name} is up to date"
    compilers = [path for path in map(shutil.which, COMPILERS) if path is not None]
    if not compilers:
        raise RuntimeError(f"no C++ compiler on PATH ({', '.join(COMPILERS)})")
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    arguments = (*FLAGS, *flags, "-isystem", jax.ffi.include_dir(), *map(str, units), "-o", str(unfinished))
    errors = []
    for compiler in compilers:
        error = _compile((compiler, *arguments))
        if error is None:
            unfinished.replace(library)
            for old in set(library.parent.glob(f"{library.stem.rpartition('-')[0]}-*.so")) - {library}:
                old.unlink(missing_ok=True)
            return f"CPU kernels: built {library.name} with {compiler}"
        unfinished.unlink(missing_ok=True)
        errors.append(f"{compiler} failed: {error}")
    raise RuntimeError(errors[0])


def _compile(command: Sequence[str]) -> str | None:
    """Runs a compiler; what it says is wrong."""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return None
    lines = run.stderr.splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else f"exit code {run.returncode}")


def build_all() -> list[str]:
    """Builds a library for each instruction set of this machine, side by side; the lines to print.

    Raises RuntimeError where there are no kernels for the machine, or none could be built.
    """
    names = instruction_sets(platform.machine())
    if not names:
        raise RuntimeError(f"none are written for {platform.machine()}")
    with ThreadPoolExecutor() as threads:
        builds = [threads.submit(build, UNITS, library_path(name), INSTRUCTION_SETS[name]) for name in names]
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
