"""Compile the CPU kernels: at the first start, or ahead of it with `python -m model.kernels.cpu.build`."""

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from model.kernels.cpu.library import BUNDLED, FLAGS, INSTRUCTION_SETS, UNITS, is_trusted, library_name, library_path
from model.private_files import is_private

COMPILERS = ("c++", "g++", "clang++")
_X86, _ARM = ("x86_64", "amd64"), ("aarch64", "arm64")


def instruction_sets(machine: str) -> tuple[str, ...]:
    """Instruction sets of `machine` (as in platform.machine()) that have kernels, the best first."""
    if machine.lower() in _X86:
        return ("avx512", "avx2")
    return ("neon",) if machine.lower() in _ARM else ()


def build_library(units: Sequence[Path], library: Path, flags: Sequence[str] = ()) -> str:
    """Compile `units` (.cc) into `library` unless a trusted one exists; return one line for the log.

    The compilers are tried in order until one succeeds. The file appears under its name only when it is complete,
    so processes may build the same library at the same time.

    Raises:
        RuntimeError: other users can write to the folder, there is no compiler, or all fail.
        OSError: the folder cannot be written.
    """
    if is_trusted(library):
        return f"CPU kernels: {library.name} is up to date"
    compilers = [path for path in map(shutil.which, COMPILERS) if path is not None]
    if not compilers:
        raise RuntimeError(f"no C++ compiler on PATH ({', '.join(COMPILERS)})")
    library.parent.mkdir(mode=0o755, parents=True, exist_ok=True)  # an image is built as root, served as another user
    if not is_private(library.parent.resolve()):
        raise RuntimeError(f"other users can write to {library.parent}")
    errors = []
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".") as folder:
        unfinished = Path(folder) / library.name
        arguments = (*FLAGS, *flags, "-isystem", jax.ffi.include_dir(), *map(str, units), "-o", str(unfinished))
        for compiler in compilers:
            error = _compile((compiler, *arguments))
            if error is None:
                unfinished.chmod(0o755)  # whatever the umask: `load_library` refuses a library that others can write
                unfinished.replace(library)
                return f"CPU kernels: built {library.name} with {compiler}"
            errors.append(f"{compiler} failed: {error}")
    raise RuntimeError(errors[0])


def _compile(command: Sequence[str]) -> str | None:
    """Run a compiler; return its first error, None on success."""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return None
    lines = run.stderr.splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else f"exit code {run.returncode}")


def build_all(folder: Path | None = None) -> list[str]:
    """Build the libraries of this machine's instruction sets in parallel; return lines for the log.

    Args:
        folder: destination; None: the user's cache, unless they are bundled with the package.

    Raises:
        RuntimeError: no kernels are written for this machine, or none can be built.
    """
    names = instruction_sets(platform.machine())
    if not names:
        raise RuntimeError(f"none are written for {platform.machine()}")
    paths = [folder / library_name(name) if folder else library_path(name) for name in names]
    with ThreadPoolExecutor() as threads:
        builds = [
            threads.submit(build_library, UNITS, path, INSTRUCTION_SETS[name])
            for name, path in zip(names, paths, strict=True)
        ]
    failures = {name: future.exception() for name, future in zip(names, builds, strict=True)}
    if all(failures.values()):
        raise RuntimeError(str(failures[names[0]]))
    return [
        f"CPU kernels: not built for {name}: {failures[name]}" if failures[name] else future.result()
        for name, future in zip(names, builds, strict=True)
    ]


def ensure_built(report: Callable[[str], None]) -> None:
    """Build missing libraries at start-up; call `report` with lines for the log, with none if all are there.

    The kernels are optional: a failure is one line.
    """
    names = instruction_sets(platform.machine())
    if names and all(is_trusted(library_path(name)) for name in names):
        return
    try:
        if names and any(map(shutil.which, COMPILERS)):
            report(f"CPU kernels: building for {', '.join(names)}; this happens once")
        for line in build_all():
            report(line)
    except RuntimeError as error:
        report(_fallback(error))


def _fallback(error: RuntimeError) -> str:
    return f"CPU kernels: {error}; using XLA instead"


def main(arguments: Sequence[str] = ()) -> int:
    """Build the kernels; a failure is one line on stderr and the exit code is 0, as they are optional."""
    parser = argparse.ArgumentParser(prog="python -m model.kernels.cpu.build", description="Build the CPU kernels.")
    parser.add_argument(
        "--in-place", action="store_true", help="build into the package, e.g. for a container image, not ~/.cache"
    )
    folder = BUNDLED if parser.parse_args(arguments).in_place else None
    try:
        print("\n".join(build_all(folder)))
    except RuntimeError as error:
        print(_fallback(error), file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
