"""`make sanitize`: the kernels' unit tests on a library built with AddressSanitizer and UBSan.

Not a part of every test run, since it takes minutes; `tests/model/test_cpu_instruction_sets.py` has what is.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import pytest

from model.kernels import cpu
from model.kernels.cpu import build, library

_COMPILER = "g++"
_SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_LIBRARY = "LOGPROBD_SANITIZED"  # set in the process that runs the tests
_TESTS = ("kernels", "attention", "rows", "head", "random_shapes")


def _build(made: Path) -> None:
    flags = [flag for flag in library.FLAGS if flag != "-O3"]
    flags += [*library.INSTRUCTION_SETS[made.stem], *_SANITIZERS]
    print(f"building {made.name} with sanitizers", flush=True)
    subprocess.run(
        [_COMPILER, *flags, "-isystem", jax.ffi.include_dir(), *map(str, library.UNITS), "-o", str(made)], check=True
    )


def _runtime(name: str) -> str:
    """A sanitizer's own library, which has to be loaded before everything else."""
    command = [_COMPILER, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _run_tests(made: Path) -> int:
    for module in (library, build):
        module.library_path = lambda name: made.with_name(f"{name}.so")  # type: ignore[attr-defined]
    kernels = cpu.load()
    if kernels is None or kernels.instruction_set != made.stem:
        raise RuntimeError(f"{made} was not loaded")
    folder = Path(__file__).with_name("model")
    tests = [str(folder / f"test_cpu_{name}.py") for name in _TESTS]
    tests += [str(folder / "test_int8.py"), "-k", "not changed_sources"]  # what it changes is fixed here
    return int(pytest.main(["-q", "-p", "no:cacheprovider", *tests, *sys.argv[1:]]))


def main() -> int:
    """Builds the library of the best instruction set of this CPU, and runs the tests on it; pytest's exit code."""
    if _LIBRARY in os.environ:
        return _run_tests(Path(os.environ[_LIBRARY]))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"{library.require().instruction_set}.so"
        _build(made)
        preloaded = " ".join(map(_runtime, ("libasan.so", "libubsan.so")))
        # Python itself leaves memory behind at its end.
        sanitizers = {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0", _LIBRARY: str(made)}
        command = [sys.executable, "-m", "tests.sanitized_kernels", *sys.argv[1:]]
        return subprocess.run(command, env=os.environ | sanitizers, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
