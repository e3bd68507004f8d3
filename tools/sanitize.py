"""`make sanitize`: the kernels' unit tests on a library built with AddressSanitizer and UBSan.

Not a part of every test run, since it takes minutes; `tests/model/test_cpu_instruction_sets.py` has what is.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from model.kernels import cpu
from model.kernels.cpu import build, library

SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_RUNTIMES = ("libasan.so", "libubsan.so")
_LIBRARY = "LOGPROBD_SANITIZED"  # set in the process that runs the tests
_TESTS = ("kernels", "attention", "rows", "head", "random_shapes")


def _path_of(runtime: str) -> str:
    """A sanitizer's own library, which has to be loaded before everything else."""
    command = ["g++", f"-print-file-name={runtime}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _run_tests(made: Path) -> int:
    folder = Path(__file__).with_name("model")
    tests = [str(folder / f"test_cpu_{name}.py") for name in _TESTS]
    tests += [str(folder / "test_int8.py"), "-k", "not changed_sources"]  # what it changes is fixed here
    with pytest.MonkeyPatch.context() as patch:
        for module in (library, build):
            patch.setattr(module, "library_path", lambda name: made.with_name(f"{name}.so"))
        kernels = cpu.load()
        if kernels is None or kernels.instruction_set != made.stem:
            raise RuntimeError(f"{made} was not loaded")
        return int(pytest.main(["-q", "-p", "no:cacheprovider", *tests, *sys.argv[1:]]))


def main() -> int:
    """Builds the library of the best instruction set of this CPU, and runs the tests on it; pytest's exit code."""
    if _LIBRARY in os.environ:
        return _run_tests(Path(os.environ[_LIBRARY]))
    name = library.require().instruction_set
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"{name}.so"
        print(build.build(library.UNITS, made, (*library.INSTRUCTION_SETS[name], *SANITIZERS)), flush=True)
        # Python itself leaves memory behind at its end.
        sanitized = {"LD_PRELOAD": " ".join(map(_path_of, _RUNTIMES)), "ASAN_OPTIONS": "detect_leaks=0"}
        command = [sys.executable, "-m", "tools.sanitize", *sys.argv[1:]]
        return subprocess.run(command, env=os.environ | sanitized | {_LIBRARY: str(made)}, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
