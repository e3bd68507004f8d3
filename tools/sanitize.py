"""`make sanitize`: run the kernels' unit tests on a library built with AddressSanitizer and UBSan. Takes minutes."""

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
_LIBRARY = "LOGPROBD_SANITIZED"  # set in the child process, which runs the tests
_FOLDER = Path(__file__).parents[1] / "tests" / "model"
_TESTS = (
    "test_cpu_kernels",
    "test_cpu_attention",
    "test_cpu_rows",
    "test_cpu_head",
    "test_cpu_random_shapes",
    "test_packed",
)


def _runtime_path(name: str) -> str:
    """Path of a sanitizer's runtime library, which must be loaded before all others."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _run_tests(sanitized: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        for module in (library, build):
            patch.setattr(module, "library_path", lambda name: sanitized.with_name(f"{name}.so"))
        kernels = cpu.load_library()
        if kernels is None or kernels.instruction_set != sanitized.stem:
            raise RuntimeError(f"{sanitized} was not loaded")
        tests = [str(_FOLDER / f"{name}.py") for name in _TESTS]
        return int(pytest.main(["-q", "-p", "no:cacheprovider", *tests, *sys.argv[1:]]))


def main() -> int:
    """Build the library of this CPU's best instruction set and run the tests on it; return pytest's exit code."""
    if _LIBRARY in os.environ:
        return _run_tests(Path(os.environ[_LIBRARY]))
    kernels = cpu.load_library()
    if kernels is None:
        raise RuntimeError("there are no kernels for this CPU")
    name = kernels.instruction_set
    with tempfile.TemporaryDirectory() as folder:
        sanitized = Path(folder) / f"{name}.so"
        print(build.build_library(library.UNITS, sanitized, (*library.INSTRUCTION_SETS[name], *SANITIZERS)), flush=True)
        variables = {
            _LIBRARY: str(sanitized),
            "LD_PRELOAD": " ".join(map(_runtime_path, _RUNTIMES)),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python does not free everything at exit
        }
        command = [sys.executable, "-m", "tools.sanitize", *sys.argv[1:]]
        return subprocess.run(command, env=os.environ | variables, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
