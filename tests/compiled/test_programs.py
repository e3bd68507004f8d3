"""Programs: only compiled shapes run, failures are raised, and the persistent cache recovers from damage."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compiled import program_cache, programs
from compiled.programs import Plan, Program, RefusedError, UnknownShapeError, compile_plans
from compiled.shapes import PENALTIES, DecodeShape, HeadShape
from tests.support.tiny import random_weights, tiny_configs, write_checkpoint

ROOT = Path(__file__).parents[2]
VECTOR = jax.ShapeDtypeStruct((4,), jnp.float32)


def double(x: Any) -> Any:
    return 2 * x


def plan(rows: int) -> Plan:
    return Plan(DecodeShape(rows, 1), double, (jax.ShapeDtypeStruct((rows,), jnp.float32),))


def test_compile_plans_compiles_and_reports_each_plan_once() -> None:
    reported: list[Program] = []
    programs = compile_plans([plan(2), plan(3)], reported.append)
    assert {program.name for program in reported} == {"decode_2", "decode_3"}
    assert {shape: program.shape for shape, program in programs.items()} == {
        s: s for s in (DecodeShape(2, 1), DecodeShape(3, 1))
    }
    assert all(program.lower_seconds > 0 and program.compile_seconds > 0 for program in programs.values())
    assert all(program.temp_bytes >= 0 for program in programs.values())
    np.testing.assert_array_equal(programs[DecodeShape(3, 1)].compiled(np.ones(3, np.float32)), np.full(3, 2.0))


def test_programs_reject_an_unknown_shape() -> None:
    programs = compile_plans([plan(2)])
    for shape in (DecodeShape(3, 1), DecodeShape(2, 2), HeadShape(2, full_vocab=True), PENALTIES):
        with pytest.raises(UnknownShapeError, match="no program was compiled"):
            programs[shape]


@pytest.mark.parametrize(
    "argument", [np.ones(3, np.float32), np.ones((2, 2), np.float32), np.ones(2, np.int32), np.ones(2, jnp.bfloat16)]
)
def test_program_rejects_other_shapes_and_dtypes(argument: Any) -> None:
    program = compile_plans([plan(2)])[DecodeShape(2, 1)]
    with pytest.raises(TypeError, match="computation was compiled"):
        program.compiled(argument)


def test_program_has_the_name_of_its_shape() -> None:
    program = compile_plans([plan(2)])[DecodeShape(2, 1)]
    text = program.compiled.as_text()
    assert text is not None
    assert text.startswith("HloModule jit_decode_2,")


def test_program_donates_its_arguments() -> None:
    shape = HeadShape(4, full_vocab=False)
    program = compile_plans([Plan(shape, double, (VECTOR,), donate=(0,))])[shape]
    x = jnp.ones(4)
    np.testing.assert_array_equal(program.compiled(x), np.full(4, 2.0))
    assert x.is_deleted()


def test_compile_plans_raises_a_failure() -> None:
    def wrong(x: Any) -> Any:
        raise ValueError(f"cannot trace {x.shape}")

    bad = Plan(HeadShape(4, full_vocab=True), wrong, (VECTOR,))
    with pytest.raises(ValueError, match="cannot trace"):
        compile_plans([plan(2), bad, plan(3)])


def test_compile_plans_starts_nothing_after_a_failure_or_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    ended = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            ended.set()
            super().shutdown(wait=wait)

    def fails(plan: Plan, _: object) -> None:
        started.append(plan)
        if len(started) == 1:
            raise KeyboardInterrupt
        assert ended.wait(20)

    monkeypatch.setattr(programs, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(programs, "_compile", fails)
    with pytest.raises(KeyboardInterrupt):
        compile_plans([plan(rows) for rows in range(2, 12)])
    assert len(started) < 10


def test_compile_plans_raises_a_failure_after_lowering() -> None:
    def unknown(x: Any) -> Any:
        return jax.ffi.ffi_call("no_such_target", VECTOR)(x)

    with pytest.raises(RefusedError, match=r"^full_vocab_4: .*no_such_target"):
        compile_plans([Plan(HeadShape(4, full_vocab=True), unknown, (VECTOR,)), plan(2)])


# Warnings are only recorded, as in a server: turned into errors they would cause the recovery.
CACHE_SCRIPT = """
import os, stat, sys, warnings
from pathlib import Path

import jax, jax.monitoring, jax.numpy as jnp
import numpy as np

from compiled.program_cache import use_persistent_cache
from compiled.programs import Plan, compile_plans
from compiled.shapes import DecodeShape

directory = Path(sys.argv[1])
directory.mkdir(parents=True, mode=0o755)  # exists before the start, and other users can read it
os.umask(0)
use_persistent_cache(directory)
assert stat.S_IMODE(directory.stat().st_mode) == 0o700, oct(directory.stat().st_mode)

warnings.simplefilter("always")
shown_warnings = []
warnings.showwarning = lambda message, *_, **__: shown_warnings.append(message)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None)
SIZES = (4, 5, 6)


def function(x):
    return jnp.sin(x) @ x


def run():
    hits.clear()
    plans = [Plan(DecodeShape(n, 1), function, (jax.ShapeDtypeStruct((n,), jnp.float32),)) for n in SIZES]
    programs = compile_plans(plans)
    results = [float(programs[plan.shape].compiled(np.arange(n, dtype=np.float32))) for n, plan in zip(SIZES, plans)]
    return len(hits), results


def entries():
    return sorted(directory.glob("jit_decode_*-cache"))


cold, first = run()
complete = entries()
print("cold", cold, len(complete))
warm, second = run()
print("warm", warm, second == first)

for divisor in (2, 10**9):  # half of the file, then none of it
    sizes = [entry.stat().st_size // divisor for entry in complete]
    for entry, size in zip(complete, sizes):
        entry.write_bytes(entry.read_bytes()[:size])
    torn, third = run()
    assert entries() == complete
    print("torn", torn, third == first, all(entry.stat().st_size > size for entry, size in zip(complete, sizes)))
    mended, fourth = run()
    print("mended", mended, fourth == first)
    use_persistent_cache(directory)  # as the next start does
    print("sealed", entries() == complete, run()[0])

for entry in complete:  # of the right length
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(data)
flipped, fifth = run()
print("flipped", flipped, fifth == first)

print("warnings", len(shown_warnings))
for entry in directory.iterdir():
    entry.unlink()
directory.rmdir()
directory.touch()  # a cache that nothing can be written to, even by root
lost, sixth = run()
print("lost", lost, sixth == first, len(shown_warnings) > 0)
"""

EXPECTED = [
    "cold 0 3",
    "warm 3 True",
    *["torn 0 True True", "mended 3 True", "sealed True 3"] * 2,
    "flipped 0 True",
    "warnings 0",
    "lost 0 True True",
]


def test_persistent_cache_is_private_read_and_repaired(tmp_path: Path) -> None:
    """In a separate process, to leave this one's jax configuration unchanged."""
    command = [sys.executable, "-c", CACHE_SCRIPT, str(tmp_path / "programs")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == EXPECTED
    assert process.stderr == ""


def test_cache_options_restored_leaves_no_option(tmp_path: Path) -> None:
    values = [getattr(jax.config, name) for name in program_cache._OPTIONS]
    with program_cache.cache_options_restored():
        program_cache.use_persistent_cache(tmp_path)
        assert [getattr(jax.config, name) for name in program_cache._OPTIONS] == [str(tmp_path), -1, 0.0]
    assert [getattr(jax.config, name) for name in program_cache._OPTIONS] == values


START_SCRIPT = """
import sys, warnings
from pathlib import Path

import numpy as np

from model.weights.loader import load_model
from compiled.program_cache import use_persistent_cache
from compiled.runner import ModelRunner
from compiled.shapes import Buckets
from model.weights.weight_table import open_checkpoint
from model.weights.source import ModelSource

warnings.simplefilter("ignore")
use_persistent_cache(Path(sys.argv[1]))
checkpoint = open_checkpoint(ModelSource("tiny", Path(sys.argv[2])))
model = load_model(checkpoint, "bfloat16", int8=sys.argv[3] == "int8")
buckets = Buckets(decode_rows=(1,), prefill_chunks=(16,), score_rows=16, pages_per_row=2, full_vocab_rows=8)
runner = ModelRunner(model, buckets, pages=3, max_logprobs=5)
print(float(runner.full_vocab_logprobs(np.zeros(8, np.int32))[0, 0]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_start_with_a_cache_of_truncated_entries(weights: str, tmp_path: Path) -> None:
    """Includes programs that jax compiles itself, such as those of jnp functions."""
    directory, command = tmp_path / "programs", _start_command(tmp_path, weights)
    first = _started(command)
    entries = list(directory.glob("*-cache"))
    assert len(entries) >= 6  # the programs of START_SCRIPT
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    assert _started(command) == first


@pytest.mark.slow
def test_start_after_one_killed_while_writing_the_cache(tmp_path: Path) -> None:
    directory, command = tmp_path / "programs", _start_command(tmp_path, "bfloat16")
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while len(list(directory.glob("*-cache"))) < 4:
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    again = _started(command)
    for entry in directory.glob("*-cache"):
        entry.unlink()
    assert _started(command) == again  # without the entries of killed processes


def _start_command(folder: Path, weights: str) -> list[str]:
    """Start a tiny model whose cache of programs is in the next folder."""
    directory, model = folder / "programs", folder / "model"
    model.mkdir()
    config = tiny_configs()["llama"]
    write_checkpoint(model, config, random_weights(config, seed=3))
    return [sys.executable, "-c", START_SCRIPT, str(directory), str(model), weights]


def _started(command: list[str]) -> str:
    """Standard output."""
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300, check=True).stdout
