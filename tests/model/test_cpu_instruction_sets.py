"""The kernels have one result to the last bit on every instruction set, and touch no memory but their own."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model.kernels.cpu import build, library
from model.kernels.cpu.library import INSTRUCTION_SETS
from tests.sanitized_kernels import SANITIZERS

PROGRAM = Path(__file__).with_name("kernel_bits.cc")
THREADS_PROGRAM = Path(__file__).with_name("kernel_threads.cc")
CANNOT_RUN = 77  # the program's exit code on a CPU that it is not for
FLAGS = [flag for flag in library.FLAGS if flag != "-shared"]  # a later -O2 or -O1 takes the place of their -O3
FAST = "-O2"
THREAD_SANITIZER = ("-O1", "-fsanitize=thread", "-g")
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
NATIVE = build.instruction_sets(platform.machine())


def lines_of(
    folder: Path,
    flags: Sequence[str],
    compiler: str = "c++",
    runner: Sequence[str] = (),
    source: Path = PROGRAM,
) -> list[str]:
    """What the program prints when it is compiled with `flags`; skips where that cannot be done here."""
    found = shutil.which(compiler)
    if found is None:
        pytest.skip(f"no {compiler} here")
    nothing, program = folder / "nothing.cc", folder / "program"
    nothing.write_text("int main() {}")
    if subprocess.run([found, *flags, nothing, "-o", program], check=False).returncode != 0:
        pytest.skip(f"{compiler} lacks what {' '.join(flags)} need")
    subprocess.run([found, *FLAGS, *flags, "-pthread", "-I", library.FOLDER, source, "-o", program], check=True)
    run = subprocess.run([*runner, program], capture_output=True, text=True, check=False)
    if run.returncode == CANNOT_RUN:
        pytest.skip("this CPU cannot run it")
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines of the last instruction set of this machine: the one that most CPUs have."""
    if not NATIVE:
        pytest.skip(f"no kernels for {platform.machine()}")
    lines = lines_of(tmp_path_factory.mktemp("reference"), (FAST, *INSTRUCTION_SETS[NATIVE[-1]]))
    assert len(lines) > 200
    return lines


@pytest.mark.parametrize("name", NATIVE[:-1])
def test_other_instruction_sets_of_this_machine(name: str, reference: list[str], tmp_path: Path) -> None:
    assert lines_of(tmp_path, (FAST, *INSTRUCTION_SETS[name])) == reference


def test_arm(reference: list[str], tmp_path: Path) -> None:
    emulator = shutil.which(ARM_EMULATOR)
    if emulator is None:
        pytest.skip(f"no {ARM_EMULATOR} here")
    assert lines_of(tmp_path, (FAST, "-static", *INSTRUCTION_SETS["neon"]), ARM_COMPILER, (emulator,)) == reference


def lines_of_each(folder: Path, flags: Sequence[Sequence[str]], source: Path) -> list[list[str]]:
    """What the program prints for each of several lists of flags; they are compiled at once."""
    folders = [folder / f"{number}" for number in range(len(flags))]
    for each in folders:
        each.mkdir()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda each, options: lines_of(each, options, source=source), folders, flags))


def test_sanitizers_find_nothing(reference: list[str], tmp_path: Path) -> None:
    flags = [(*SANITIZERS, *INSTRUCTION_SETS[name]) for name in NATIVE]
    assert lines_of_each(tmp_path, flags, PROGRAM) == [reference] * len(NATIVE)


def test_calls_that_threads_share(tmp_path: Path) -> None:
    if not NATIVE:
        pytest.skip(f"no kernels for {platform.machine()}")
    flags = [(*sanitizers, *INSTRUCTION_SETS[NATIVE[-1]]) for sanitizers in (SANITIZERS, THREAD_SANITIZER)]
    assert lines_of_each(tmp_path, flags, THREADS_PROGRAM) == [[], []]


@pytest.mark.parametrize("name", NATIVE[1:])
@pytest.mark.usefixtures("kernels")
def test_the_handlers_of_the_other_libraries(name: str) -> None:
    """The first library that this CPU can run serves all other tests; here tests of two kernels run on another."""
    code = (
        "import sys, pytest\n"
        "from model.kernels import cpu\n"
        "from model.kernels.cpu import library\n"
        f"for other in set(library.INSTRUCTION_SETS) - {{{name!r}}}: "
        "library.INSTRUCTION_SETS[other] = library.INSTRUCTION_SETS.pop(other)\n"
        f"assert cpu.load() is not None and cpu.load().instruction_set == {name!r}\n"
        "sys.exit(pytest.main(['-q', '-x', '-k', 'bits or live', '-p', 'no:cacheprovider', *sys.argv[1:]]))\n"
    )
    tests = [str(Path(__file__).with_name(f"test_{kind}.py")) for kind in ("cpu_head", "int8")]
    run = subprocess.run([sys.executable, "-c", code, *tests], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
