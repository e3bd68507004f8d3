"""The packed linear kernel: true, the same to the bit for every batch, and harmless where it cannot be built."""

import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from model.kernels import cpu
from model.kernels.cpu import build, library
from model.linear import matmul

SHAPES = [(1, 32, 2), (2, 1, 1), (3, 33, 5), (12, 64, 256), (13, 100, 257), (25, 31, 515), (64, 576, 96), (257, 40, 90)]


@pytest.fixture
def cache_dir(tmp_path: Path) -> Iterator[Path]:
    """A persistent compilation cache that takes every program, for the length of one test."""
    wanted = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield tmp_path
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    values = np.random.default_rng(seed).normal(scale=scale, size=shape)
    return jnp.asarray(values, jnp.bfloat16)


def on_path(path: str, x: jax.Array, weight: cpu.PackedWeight) -> np.ndarray:
    call = jax.ffi.ffi_call(f"{library.TARGET}_{path}", jax.ShapeDtypeStruct((x.shape[0], weight.n), jnp.float32))
    return np.asarray(call(x, weight.data, jnp.int32(x.shape[0])))


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_pack_keeps_every_value_and_pads_with_zeros(m: int, n: int, k: int) -> None:
    w = normal(m, n, k)
    packed = cpu.pack(w)
    assert packed.data.shape == (-(-n // 32), -(-k // 2), 32, 2)
    assert (packed.n, packed.k) == (n, k)
    data = np.asarray(packed.data, np.float32)
    i, j = np.indices((n, k))
    np.testing.assert_array_equal(data[i // 32, j // 2, i % 32, j % 2], np.asarray(w, np.float32))
    assert np.count_nonzero(data) == np.count_nonzero(np.asarray(w, np.float32))


def test_unpack_rows_gathers_rows_in_any_order() -> None:
    w = normal(0, 70, 7)
    rows = jnp.asarray([69, 0, 31, 32, 31], jnp.int32)
    np.testing.assert_array_equal(cpu.unpack_rows(cpu.pack(w), rows), w[rows])


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.usefixtures("kernels")
def test_linear_is_within_float32_rounding_of_the_exact_sum(m: int, n: int, k: int) -> None:
    x, w = normal(1, m, k), normal(2, n, k)
    y = np.asarray(cpu.linear(x, cpu.pack(w)))
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    # k sums, each off by at most half a unit in the last place of a partial sum.
    bound = k * 2.0**-24 * (np.abs(x64) @ np.abs(w64).T)
    assert y.shape == (m, n)
    assert y.dtype == np.float32
    assert (np.abs(y - x64 @ w64.T) <= bound).all()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_every_path_gives_the_documented_order_to_the_bit(kernels: cpu.CpuKernels, m: int, n: int, k: int) -> None:
    x, weight = normal(3, m, k), cpu.pack(normal(4, n, k))
    exact = np.zeros((m, n), np.float32)
    x32, w32 = np.zeros((m, k + k % 2), np.float32), np.zeros((n, k + k % 2), np.float32)
    x32[:, :k], w32[:, :k] = np.asarray(x), np.asarray(cpu.unpack_rows(weight, jnp.arange(n)))
    for j in (at + odd for at in range(0, k, 2) for odd in (1, 0)):
        exact += x32[:, j : j + 1] * w32[:, j]
    for path in kernels.paths:
        np.testing.assert_array_equal(on_path(path, x, weight), exact, err_msg=path)
    np.testing.assert_array_equal(cpu.linear(x, weight), exact)


def test_both_paths_agree_on_denormals(kernels: cpu.CpuKernels) -> None:
    if "pairs" not in kernels.paths:
        pytest.skip("this CPU has no AVX512_BF16")
    scale = 2.0**-63.5  # products and sums on both sides of float32's smallest normal number, 2^-126
    x, weight = normal(5, 13, 300, scale=scale), cpu.pack(normal(6, 64, 300, scale=scale))
    pairs = on_path("pairs", x, weight)
    np.testing.assert_array_equal(pairs, on_path("floats", x, weight))
    np.testing.assert_array_equal(pairs[:1], cpu.linear(x[:1], weight))
    assert np.count_nonzero(pairs) > 0
    assert np.count_nonzero(pairs) < pairs.size


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.usefixtures("kernels")
def test_a_row_has_the_same_bits_in_every_batch(dtype: jnp.dtype) -> None:
    x, weight = normal(7, 257, 577), cpu.pack(normal(8, 1000, 577))
    whole = np.asarray(cpu.linear(x, weight, dtype))
    for m in (1, 2, 3, 11, 12, 13, 16, 64):
        for first in (0, 257 - m):
            part = cpu.linear(x[first : first + m], weight, dtype)
            np.testing.assert_array_equal(np.asarray(part), whole[first : first + m], err_msg=f"{m} rows from {first}")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("live", [-1, 0, 1, 5, 12, 13, 40, 64, 65])
@pytest.mark.usefixtures("kernels")
def test_rows_that_are_not_live_are_zeros_and_change_no_other(live: int, dtype: jnp.dtype) -> None:
    x, weight = normal(20, 64, 70), cpu.pack(normal(21, 100, 70))
    whole = np.asarray(cpu.linear(x, weight, dtype))
    count = min(max(live, 0), 64)
    some = np.asarray(cpu.linear(x.at[count:].set(jnp.nan), weight, dtype, live=jnp.int32(live)))
    np.testing.assert_array_equal(some[:count], whole[:count])
    assert not some[count:].any()


@pytest.mark.parametrize(("m", "n"), [(1, 33), (5, 64), (30, 100)])
@pytest.mark.usefixtures("kernels")
def test_bfloat16_is_the_float32_result_rounded(m: int, n: int) -> None:
    x, weight = normal(9, m, 70), cpu.pack(normal(10, n, 70))
    x = x.at[0, 0].set(jnp.inf)  # one row of infinities
    expected = cpu.linear(x, weight).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(cpu.linear(x, weight, jnp.bfloat16)), np.asarray(expected))


@pytest.mark.usefixtures("kernels")
def test_bfloat16_rounds_ties_to_even_and_keeps_nan() -> None:
    weight = cpu.pack(jnp.ones((32, 2), jnp.bfloat16))
    step = 2.0**-8  # half of bfloat16's step at 1
    x = jnp.asarray([[1, step], [1 + 2 * step, step], [jnp.nan, 1]], jnp.bfloat16)
    y = np.asarray(cpu.linear(x, weight, jnp.bfloat16).astype(jnp.float32))
    assert (y[0] == 1).all()
    assert (y[1] == 1 + 4 * step).all()
    assert np.isnan(y[2]).all()


@pytest.mark.usefixtures("kernels")
def test_a_bad_row_does_not_touch_its_neighbours() -> None:
    # An odd k: what follows a row in memory belongs to the next one.
    x, weight = normal(11, 5, 33), cpu.pack(normal(12, 40, 33))
    clean = np.asarray(cpu.linear(x, weight))
    y = np.asarray(cpu.linear(x.at[2].set(jnp.nan), weight))
    assert np.isnan(y[2]).all()
    np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(clean, 2, 0))


@pytest.mark.usefixtures("kernels")
def test_many_calls_in_one_program_and_in_several_threads_all_finish() -> None:
    x = normal(13, 16, 128)
    weights = [cpu.pack(normal(20 + i, 2048, 128)) for i in range(16)]
    alone = [np.asarray(cpu.linear(x, weight)) for weight in weights]
    program = jax.jit(lambda x, weights: [cpu.linear(x, weight) for weight in weights]).lower(x, weights).compile()

    def check(_: int) -> bool:
        together = program(x, weights)
        return all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(check, range(64)))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.usefixtures("kernels")
def test_packed_weights_have_a_form_for_every_platform(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that this machine has packed are no reason why a step could not be compiled for another one."""
    x, w = normal(22, rows, 70), normal(23, 100, 70)
    weight = cpu.pack(w)
    product = jax.jit(matmul)
    for other in ("tpu", "cuda"):
        assert "logprobd" not in product.trace(x, weight).lower(lowering_platforms=(other,)).as_text()
    assert library.TARGET in product.trace(x, weight).lower(lowering_platforms=("cpu",)).as_text()
    in_kernel = np.asarray(product(x, weight))
    monkeypatch.setattr(cpu, "load", lambda: None)
    np.testing.assert_array_equal(matmul(x, weight), matmul(x, w))
    np.testing.assert_allclose(matmul(x, weight), in_kernel, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("kernels")
def test_it_compiles_ahead_of_time_beside_donated_buffers() -> None:
    x, weight = normal(14, 4, 64), cpu.pack(normal(15, 96, 64))
    expected = 2 * np.asarray(cpu.linear(x, weight))

    def step(total: jax.Array, x: jax.Array, weight: cpu.PackedWeight) -> jax.Array:
        return total + cpu.linear(x, weight)

    shapes = (jax.ShapeDtypeStruct((4, 96), jnp.float32), x, weight)
    program = jax.jit(step, donate_argnums=0).lower(*shapes).compile()
    total = jnp.zeros((4, 96), jnp.float32)
    for _ in range(2):
        total = program(total, x, weight)
    np.testing.assert_array_equal(total, expected)


@pytest.mark.usefixtures("kernels")
def test_a_program_from_the_persistent_cache_gives_the_same(cache_dir: Path) -> None:
    x, weight = normal(16, 3, 62), cpu.pack(normal(17, 65, 62))
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    try:
        results = []
        for _ in range(2):
            hits.clear()
            program = jax.jit(cpu.linear).lower(x, weight).compile()
            results.append(np.asarray(program(x, weight)))
            jax.clear_caches()
    finally:
        jax.monitoring.clear_event_listeners()
    assert "/jax/compilation_cache/cache_hits" in hits
    assert any(cache_dir.iterdir())
    np.testing.assert_array_equal(results[0], results[1])


def test_loading_twice_registers_once(kernels: cpu.CpuKernels) -> None:
    assert cpu.load() is kernels


@pytest.mark.usefixtures("kernels")
def test_linear_refuses_another_dtype_or_width() -> None:
    weight = cpu.pack(normal(18, 32, 8))
    with pytest.raises(TypeError, match="float32, not bfloat16"):
        cpu.linear(jnp.zeros((1, 8)), weight)
    with pytest.raises(ValueError, match=r"\(1, 9\), not \[M, 8\]"):
        cpu.linear(jnp.zeros((1, 9), jnp.bfloat16), weight)


def test_without_a_library_there_are_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_path", lambda name: tmp_path / name)
    assert library.load.__wrapped__() is None
    for name in library.INSTRUCTION_SETS:
        (tmp_path / name).write_bytes(b"not a library")
    assert library.load.__wrapped__() is None


def test_a_library_for_another_cpu_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no compiler here")
    source = tmp_path / "a.cc"
    source.write_text('extern "C" int logprobd_runs_here() { return 0; }')
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", tmp_path / "avx512"], check=True)
    monkeypatch.setattr(library, "library_path", lambda name: tmp_path / name)
    assert library.load.__wrapped__() is None


def test_a_machine_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert build.main() == 0
    assert capsys.readouterr().err == "CPU kernels: none are written for riscv64; using XLA instead\n"


def run_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str | None) -> int:
    """`python -m model.kernels.cpu.build` into an empty folder, with only `compiler` (a shell script) on PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    if compiler is not None:
        (tools / "c++").write_text(f"#!/bin/sh\n{compiler}\n")
        (tools / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(build, "library_path", lambda name: tmp_path / "_build" / name)
    return build.main()


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        (None, "no C++ compiler on PATH"),
        ("echo 'linear.cc:1: error: no such header' >&2; exit 1", "error: no such header"),
        ("exit 3", "exit code 3"),
    ],
)
def test_a_build_that_fails_says_so_in_one_line(
    compiler: str | None,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_build(monkeypatch, tmp_path, compiler) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err
    assert err.endswith("; using XLA instead\n")
    assert not list((tmp_path / "_build").glob("*"))


def test_an_instruction_set_that_a_compiler_does_not_know_is_no_loss_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    knows_one = 'case "$*" in *-mavx512f*) echo "error: no -mavx512f" >&2; exit 1;; esac; for o; do :; done; : > "$o"'
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert run_build(monkeypatch, tmp_path, knows_one) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0].startswith("CPU kernels: not built for avx512: ")
    assert out.splitlines()[1].startswith("CPU kernels: built avx2 with ")
    assert [path.name for path in (tmp_path / "_build").iterdir()] == ["avx2"]


def test_a_build_is_skipped_only_where_the_library_of_the_same_sources_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Sequence[str]] = []

    def compile_nothing(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        Path(command[-1]).write_text("library")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", compile_nothing)
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}")
    units, folder = [tmp_path / "a.cc"], tmp_path / "_build"
    assert build.build(units, folder / "a-1.so") == "CPU kernels: built a-1.so with bin/c++"
    assert build.build(units, folder / "a-1.so") == "CPU kernels: a-1.so is up to date"
    assert len(calls) == 1
    build.build(units, folder / "b-1.so")
    build.build(units, folder / "a-2.so")
    assert sorted(path.name for path in folder.iterdir()) == [
        "a-1.so",
        "a-2.so",
        "b-1.so",
    ]  # other checkouts may use the older one


def test_build_leaves_no_unfinished_file_where_the_compiler_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        Path(command[-1]).write_text("half")
        return subprocess.CompletedProcess(command, 1, "", "error: disk full")

    monkeypatch.setattr(subprocess, "run", write_half)
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}")
    with pytest.raises(RuntimeError, match="disk full"):
        build.build([], tmp_path / "cache" / "a-1.so")
    assert list((tmp_path / "cache").iterdir()) == []


def test_build_accepts_a_library_that_another_process_finished_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "a-1.so"

    def finish_second(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert not library.exists()
        library.write_text("the other's")
        Path(command[-1]).write_text("ours")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", finish_second)
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}")
    build.build([], library)
    assert library.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [library]


def test_library_path_prefers_the_bundled_library_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "BUNDLED", tmp_path / "_build")
    path = library.library_path("avx2")
    assert path.parent == tmp_path / "home" / ".cache" / "logprobd" / "kernels"
    bundled = tmp_path / "_build" / path.name
    bundled.parent.mkdir()
    bundled.touch()
    assert library.library_path("avx2") == bundled


def test_ensure_built_builds_once_and_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "BUNDLED", tmp_path / "_build")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    (tmp_path / "c++").write_text('#!/bin/sh\nfor o; do :; done; : > "$o"\n')
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    lines: list[str] = []
    build.ensure_built(lines.append)
    assert lines[0] == "CPU kernels: building for neon; this happens once"
    assert lines[1].startswith(f"CPU kernels: built {library.library_name('neon')} with ")
    lines.clear()
    build.ensure_built(lines.append)
    assert lines == []


@pytest.mark.parametrize(("compiler", "says"), [("", "no C++ compiler on PATH"), ("exit 1", "failed: exit code 1")])
def test_ensure_built_reports_why_xla_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, says: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "BUNDLED", tmp_path / "_build")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    if compiler:
        (tmp_path / "c++").write_text(f"#!/bin/sh\n{compiler}\n")
        (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    lines: list[str] = []
    build.ensure_built(lines.append)
    assert says in lines[-1]
    assert lines[-1].endswith("; using XLA instead")


def test_ensure_built_reports_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").touch()  # a file: no folder can be made in it
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "BUNDLED", tmp_path / "_build")
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}")
    lines: list[str] = []
    build.ensure_built(lines.append)
    assert "Not a directory" in lines[-1]
    assert lines[-1].endswith("; using XLA instead")


def test_changed_sources_are_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of older sources is never loaded, also where the new one cannot be built."""
    source = tmp_path / "a.cc"
    monkeypatch.setattr(library, "UNITS", [source])
    monkeypatch.setattr(library, "digest", library.digest.__wrapped__)
    names = set()
    for text in ("one", "two"):
        source.write_text(text)
        names.add(library.library_path("avx2").name)
    assert len(names) == 2


def test_the_next_compiler_is_tried_where_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_clang(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        if command[0] == "bin/clang++":
            Path(command[-1]).write_text("library")
        return subprocess.CompletedProcess(command, int(command[0] != "bin/clang++"), "", "error: too old")

    monkeypatch.setattr(subprocess, "run", only_clang)
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}")
    assert build.build([], tmp_path / "a-1.so") == "CPU kernels: built a-1.so with bin/clang++"
