"""Programs: only compiled shapes run, failures are raised, and the persistent cache recovers from damage."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from compiled import program_cache, programs
from compiled.program_cache import ModelPrograms, ProgramCache, jax_cache_disabled
from compiled.programs import Plan, Program, RefusedError, UnknownShapeError, compile_plans
from compiled.shapes import PENALTIES, DecodeShape, HeadShape
from model.config_hf import config_from_hf
from model.kernels.cpu import CpuKernels
from model.kernels.dispatch import Kernels
from model.transformer import BoundModel
from tests.support.tiny import random_weights, tiny_configs, write_checkpoint
from tools.portability.chips import abstract_model

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

    def fails(plan: Plan, *_: object) -> None:
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


@dataclass
class Traced:
    """A function of 4, 5 and 6 numbers, and how many times it has been traced."""

    cache: ModelPrograms | None
    count: int = 0

    def __call__(self, x: Any) -> Any:
        self.count += 1
        return jnp.sin(x) @ x

    def programs(self) -> dict[int, Program]:
        plans = [Plan(DecodeShape(n, 1), self, (jax.ShapeDtypeStruct((n,), jnp.float32),)) for n in (4, 5, 6)]
        compiled = compile_plans(plans, cache=self.cache)
        return {n: compiled[plan.shape] for n, plan in zip((4, 5, 6), plans, strict=True)}

    def results(self) -> list[bytes]:
        return [
            np.asarray(program.compiled(np.arange(n, dtype=np.float32))).tobytes()
            for n, program in self.programs().items()
        ]


type Start = Callable[..., tuple[list[bytes], int, int]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Compile three programs as a new process would: their results, the number traced, and the number compiled."""

    def run(subject: str = "model") -> tuple[list[bytes], int, int]:
        traced = Traced(ModelPrograms(tmp_path, subject, jax.devices()[:1]))
        programs = traced.programs().values()
        count, compiled = traced.count, sum(not program.is_cached for program in programs)
        assert all((program.lower_seconds > 0) == (count > 0) for program in programs)
        return traced.results(), count, compiled

    with jax_cache_disabled():
        yield run


def test_cached_programs_are_neither_traced_nor_compiled(start: Start, tmp_path: Path) -> None:
    results, *work = start()
    assert work == [3, 3]
    assert results == Traced(None).results()
    assert start() == (results, 0, 0)
    assert start("another model") == (results, 3, 0)  # with the same programs
    assert start("another model") == (results, 0, 0)
    assert len(list(tmp_path.iterdir())) == 3 + 2 * 3


def test_programs_that_differ_in_an_unused_argument_are_distinct(tmp_path: Path) -> None:
    """The text of a program lacks the arguments that it does not use, but calls check their shapes."""

    def increment(x: Any, unused: Any) -> Any:  # noqa: ARG001
        return x + 1

    def run(rows: int) -> bool:
        cache = ModelPrograms(tmp_path, f"{rows} slots", jax.devices()[:1])
        arguments = VECTOR, {"slots": jax.ShapeDtypeStruct((rows,), jnp.int32)}
        program = compile_plans([Plan(DecodeShape(4, 1), increment, arguments)], cache=cache)[DecodeShape(4, 1)]
        program.compiled(np.ones(4, np.float32), {"slots": np.zeros(rows, np.int32)})
        return program.is_cached

    with jax_cache_disabled():
        assert [run(2), run(3), run(2), run(3)] == [False, False, True, True]


def test_cached_programs_of_other_code_are_traced(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    results, *_ = start()
    monkeypatch.setattr(program_cache, "_sources", list)
    assert start() == (results, 3, 0)
    assert start() == (results, 0, 0)


def test_programs_of_other_versions_or_machines_are_compiled_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, *_ = start()
    monkeypatch.setattr(program_cache, "_environment", tuple)
    assert start() == (results, 3, 3)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda _: b"", lambda data: data[:-1] + b"~"])
def test_damaged_programs_are_compiled_again(
    start: Start, damage: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results, *_ = start()
    entries = sorted(tmp_path.glob("*.program"))
    for entry in entries:
        entry.write_bytes(damage(entry.read_bytes()))
    assert start() == (results, 3, 3)
    assert len(caplog.messages) == 3
    assert "a cached program is damaged" in caplog.text
    assert sorted(tmp_path.glob("*.program")) == entries
    assert start() == (results, 0, 0)


@pytest.mark.parametrize("text", ["", "torn", "\xff", "two words"])
def test_damaged_index_is_written_again(start: Start, text: str, tmp_path: Path) -> None:
    results, *_ = start()
    for index in tmp_path.glob("*.index"):
        index.write_text(text, "latin-1")
    assert start() == (results, 3, 0)
    assert start() == (results, 0, 0)


def test_unreadable_and_unserializable_programs_are_compiled(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    results, *_ = start()

    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("Compilation does not support serialization")

    monkeypatch.setattr(program_cache, "deserialize_and_load", fail)
    assert start() == (results, 3, 3)
    monkeypatch.setattr(program_cache, "serialize", fail)
    assert start() == (results, 3, 3)


def test_programs_are_compiled_if_the_folder_cannot_be_written(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.rmdir()
    tmp_path.touch()
    results, *work = start()
    assert work == [3, 3]
    assert caplog.messages == [f"{tmp_path} cannot be written (Not a directory): programs are compiled at every start"]
    assert start() == (results, 3, 3)


def test_unfinished_file_that_another_start_removed(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts remove unfinished files of killed processes, and may remove those of others."""
    replace = Path.replace

    def replace_removed(path: Path, target: Path) -> Path:
        path.unlink()
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_removed)
        results, *_ = start()
    assert not caplog.messages
    assert not list(tmp_path.glob("*.program"))
    assert start() == (results, 3, 3)


def test_programs_read_by_jax_are_not_saved(start: Start, tmp_path: Path) -> None:
    """JAX serializes them without their code."""
    options = {"jax_compilation_cache_dir": str(tmp_path / "jax"), "jax_persistent_cache_min_compile_time_secs": 0.0}
    options["jax_persistent_cache_min_entry_size_bytes"] = -1
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    try:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
        results = Traced(None).results()
        with jax_cache_disabled():
            assert start() == (results, 3, 3)
            assert start() == (results, 0, 0)
        assert jax.config.jax_enable_compilation_cache
        assert len(list((tmp_path / "jax").glob("jit_decode_*-cache"))) == 3
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_key_has_all_that_programs_depend_on(tmp_path: Path) -> None:
    model = abstract_model(config_from_hf(tiny_configs()["llama"]), "bfloat16")
    cache = ProgramCache(tmp_path)

    def key(changed: BoundModel, *sizes: object) -> str:
        programs = cache.programs_of(changed, *sizes)
        assert programs is not None
        return programs._key

    config = replace(model.config, rms_norm_eps=0.5)
    wider: Any = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    others = [
        replace(model, config=config),
        replace(model, kv_dtype=jnp.dtype("float32")),
        replace(model, dtype=jnp.dtype("float32")),
        replace(model, kernels=Kernels(CpuKernels("digest", "avx9", ()))),
        replace(model, leaves=(wider, *model.leaves[1:])),
        replace(model, definition=(None, jax.tree.structure([0]))),
    ]
    keys = [key(model, 1), key(model, 2), *(key(other, 1) for other in others)]
    assert len(set(keys)) == len(keys)
    assert key(model, 1) == keys[0]
    facts = repr((program_cache._facts_of(model), program_cache._environment()))
    assert " at 0x" not in facts  # would differ in every process
    assert "..." not in facts


@pytest.mark.parametrize("name", ["jax_default_matmul_precision", "XLA_FLAGS"])
def test_environment_has_options_of_compilers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = program_cache._environment()
    if name.isupper():
        monkeypatch.setenv(name, "--xla_cpu_enable_fast_math=true")
        assert program_cache._environment() != before
    else:
        jax.config.update(name, "float32")
        try:
            assert program_cache._environment() != before
        finally:
            jax.config.update(name, None)
    monkeypatch.undo()
    assert program_cache._environment() == before


def test_sources_are_those_of_model_and_compiled() -> None:
    names = [name for name, _ in program_cache._sources()]
    assert {"compiled/step.py", "model/kernels/cpu/operations.py"} <= set(names)
    assert names == [*sorted(names)]


START_SCRIPT = """
import sys, warnings
from pathlib import Path

import numpy as np

from model.weights.loader import load_model
from compiled.program_cache import ProgramCache, jax_cache_disabled
from compiled.runner import ModelRunner
from compiled.shapes import Buckets
from model.weights.weight_table import open_checkpoint
from model.weights.source import ModelSource

warnings.simplefilter("ignore")
cache = ProgramCache(Path(sys.argv[1]))
checkpoint = open_checkpoint(ModelSource("tiny", Path(sys.argv[2])))
model = load_model(checkpoint, "bfloat16", quantization="Q8_0" if sys.argv[3] == "int8" else "auto")
buckets = Buckets(decode_rows=(1,), prefill_chunks=(16,), score_rows=16, pages_per_row=2, full_vocab_rows=8)
with jax_cache_disabled():
    runner = ModelRunner(model, buckets, pages=3, max_logprobs=5, cache=cache)
print(float(runner.full_vocab_logprobs(np.zeros(8, np.int32))[0, 0]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_start_with_a_cache_of_truncated_entries(weights: str, tmp_path: Path) -> None:
    directory, command = tmp_path / "programs", _start_command(tmp_path, weights)
    first = _started(command)
    entries = list(directory.glob("*.program"))
    assert len(entries) >= 6  # the programs of START_SCRIPT
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    assert _started(command) == first


@pytest.mark.slow
def test_start_after_one_killed_while_writing_the_cache(tmp_path: Path) -> None:
    directory, command = tmp_path / "programs", _start_command(tmp_path, "bfloat16")
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while len(list(directory.glob("*.program"))) < 4:
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    again = _started(command)
    for entry in directory.glob("*.program"):
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
