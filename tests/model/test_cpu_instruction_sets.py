"""The kernels give the same bits on every instruction set and access no memory out of bounds."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.kernel_lines import NATIVE

type Results = Mapping[str, Mapping[str, Any]]


@pytest.fixture(scope="module")
def results(kernel_lines: str) -> Results:
    """The output of each program."""
    parsed: Results = json.loads(kernel_lines)
    return parsed


def lines_of(results: Results, case: str) -> list[str]:
    """The lines that a program printed; skips where it cannot be compiled or run here."""
    if "skipped" in results[case]:
        pytest.skip(results[case]["skipped"])
    assert "failed" not in results[case], results[case]["failed"]
    lines: list[str] = results[case]["lines"]
    return lines


@pytest.fixture(scope="module")
def reference(results: Results) -> list[str]:
    """The lines of this machine's most common instruction set."""
    if not NATIVE:
        pytest.skip(f"no kernels for {platform.machine()}")
    lines = lines_of(results, NATIVE[-1])
    assert len(lines) > 500
    return lines


@pytest.mark.parametrize("name", NATIVE[:-1])
def test_kernels_of_other_instruction_sets_give_the_same_bits(
    results: Results, name: str, reference: list[str]
) -> None:
    assert lines_of(results, name) == reference


def test_kernels_on_arm_give_the_same_bits(results: Results, reference: list[str]) -> None:
    assert lines_of(results, "arm") == reference


@pytest.mark.parametrize("name", NATIVE)
def test_kernels_pass_the_sanitizers(results: Results, name: str, reference: list[str]) -> None:
    lines = lines_of(results, f"{name}, sanitized")  # not of all formats, which come last
    assert len(lines) > 200
    assert lines == reference[: len(lines)]


def test_calls_shared_among_threads_pass_the_sanitizers(results: Results) -> None:
    if not NATIVE:
        pytest.skip(f"no kernels for {platform.machine()}")
    for kind in ("sanitized", "threads sanitized"):
        assert lines_of(results, f"shared calls, {kind}") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE[1:])
@pytest.mark.usefixtures("kernels")
def test_handlers_of_the_other_libraries(name: str) -> None:
    """The first library that this CPU can run serves all other tests; here tests of two kernels run on another."""
    code = (
        "import sys, pytest\n"
        "from model.kernels import cpu\n"
        "from model.kernels.cpu import library\n"
        f"for other in set(library.INSTRUCTION_SETS) - {{{name!r}}}: "
        "library.INSTRUCTION_SETS[other] = library.INSTRUCTION_SETS.pop(other)\n"
        f"assert cpu.load_library() is not None and cpu.load_library().instruction_set == {name!r}\n"
        "sys.exit(pytest.main(['-q', '-x', '-k', 'bits or live', '-p', 'no:cacheprovider', *sys.argv[1:]]))\n"
    )
    tests = [str(Path(__file__).with_name(f"test_{kind}.py")) for kind in ("cpu_head", "packed")]
    run = subprocess.run([sys.executable, "-c", code, *tests], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
