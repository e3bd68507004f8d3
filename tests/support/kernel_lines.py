"""`python -m tests.support.kernel_lines`: output of the kernels' C++ test programs for several builds, as JSON.

Each case maps to "lines" (its stdout), "skipped" (why it cannot run on this machine) or "failed" (its stderr).
"""

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from model.kernels.cpu import build, library
from model.kernels.cpu.library import INSTRUCTION_SETS
from tools.sanitize import SANITIZERS

_FOLDER = Path(__file__).parents[1] / "model"
_CANNOT_RUN = 77  # the program's exit code on a CPU without its instruction set
_FLAGS = [flag for flag in library.FLAGS if flag != "-shared"]  # a later -O2 or -O1 overrides their -O3
_FAST = "-O2"
# The long functions of the kernels for Arm compile in half the time; GCC then finds fewer equal loads.
_FEW_ALIASES = ("--param=sccvn-max-alias-queries-per-access=20", "-fno-tree-pta")
# AddressSanitizer finds what these checks find, which double the time of compilation; `make sanitize` has all.
_SANITIZERS = (*SANITIZERS, "-fno-sanitize=null,alignment,object-size,vptr", "-g1")
_THREAD_SANITIZER = ("-O1", "-fsanitize=thread", "-g")
NATIVE = build.instruction_sets(platform.machine())


@dataclass(frozen=True)
class Case:
    """A program and how to compile and run it."""

    flags: Sequence[str]
    source: Path = _FOLDER / "kernel_bits.cc"
    compiler: str = "c++"
    emulator: str | None = None


def _cases() -> dict[str, Case]:
    cases = {name: Case((_FAST, *INSTRUCTION_SETS[name])) for name in NATIVE}
    arm = (_FAST, *_FEW_ALIASES, "-static", *INSTRUCTION_SETS["neon"])
    cases["arm"] = Case(arm, compiler="aarch64-linux-gnu-g++", emulator="qemu-aarch64-static")
    cases |= {f"{name}, sanitized": Case((*_SANITIZERS, *INSTRUCTION_SETS[name])) for name in NATIVE}
    for name in NATIVE[-1:]:
        for kind, sanitizers in (("sanitized", _SANITIZERS), ("threads sanitized", _THREAD_SANITIZER)):
            cases[f"shared calls, {kind}"] = Case((*sanitizers, *INSTRUCTION_SETS[name]), _FOLDER / "kernel_threads.cc")
    return cases


def result_of(case: Case) -> dict[str, list[str] | str]:
    """Compile and run a program."""
    for needed in (case.compiler, *filter(None, [case.emulator])):
        if shutil.which(needed) is None:
            return {"skipped": f"{needed} is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        nothing, program = Path(folder) / "nothing.cc", Path(folder) / "program"
        nothing.write_text("int main() {}")
        if _run(case.compiler, *case.flags, nothing, "-o", program).returncode != 0:
            return {"skipped": f"{case.compiler} does not support {' '.join(case.flags)}"}
        included = ("-pthread", "-I", library.FOLDER)
        made = _run(case.compiler, *_FLAGS, *case.flags, *included, case.source, "-o", program)
        if made.returncode != 0:
            return {"failed": made.stderr}
        run = _run(*filter(None, [case.emulator]), program)
    if run.returncode == _CANNOT_RUN:
        return {"skipped": "this CPU lacks the instruction set"}
    return {"lines": run.stdout.splitlines()} if run.returncode == 0 else {"failed": run.stderr}


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def main() -> int:
    """Print the result of each case; two are compiled at a time."""
    cases = _cases()
    with ThreadPoolExecutor(2) as pool:
        json.dump(dict(zip(cases, pool.map(result_of, cases.values()), strict=True)), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
