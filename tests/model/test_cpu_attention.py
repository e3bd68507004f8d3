"""The attention kernel: accurate, bit-identical for every batch and chunk, and only in programs for the CPU."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.stages import Traced
from numpy.typing import NDArray

from model.attention import attend, attend_in_xla
from model.kernels import ScoreOptions, cpu
from model.kernels.cpu import library
from model.kernels.dispatch import load_kernels
from model.kv_cache import PAGE_SIZE, SplitPages, addresses_of
from tests.support.crowd import Crowd, Floats, compiled
from tests.support.crowd import crowd as a_crowd

# H, K, E of SmolLM2, Qwen2.5-0.5B, Llama-3.2-1B (twice: the two shapes that differed in XLA), Gemma 3, and odd ones.
HEADS = [(9, 3, 64), (14, 2, 64), (32, 8, 64), (32, 32, 64), (32, 8, 128), (4, 1, 256), (3, 3, 6), (5, 1, 98)]

pytestmark = pytest.mark.usefixtures("kernels")


def run(
    form: Callable[..., jax.Array],
    crowd: Crowd,
    queries: Floats,
    tables: NDArray[np.int32],
    positions: NDArray[np.int32],
    *,
    window: int = 0,
    cap: float = 0.0,
    sinks: Floats | None = None,
) -> Floats:
    """Attention over the crowd's pages by a compiled implementation."""
    pages = (SplitPages(crowd.keys, crowd.values),) if form is attend_in_xla else (crowd.keys, crowd.values)
    program = compiled(form, options=ScoreOptions(queries.shape[-1] ** -0.5, window, cap))
    return np.asarray(program(queries, *pages, tables, positions, *(() if sinks is None else (sinks,))))


class Rows(Crowd):
    """A crowd whose attention the kernel computes."""

    def chunk(self, row: int, start: int, end: int, *, window: int = 0, cap: float = 0.0) -> Floats:
        """Attention of tokens [start, end) of a row as one prefill chunk, from the kernel."""
        positions = self.positions(row, start, end)
        tables = self.tables[row : row + 1]
        queries = self.queries[row : row + 1, start:end]
        out = run(cpu.attend, self, queries, tables, positions, window=window, cap=cap)[0]
        valid: Floats = out[positions[0] >= 0]
        return valid

    def full(self, row: int, *, window: int = 0, cap: float = 0.0) -> Floats:
        return self.chunk(row, 0, self.lengths[row], window=window, cap=cap)


def crowd(heads: tuple[int, int, int], lengths: tuple[int, ...], dtype: str = "bfloat16", seed: int = 0) -> Rows:
    return Rows(**vars(a_crowd(heads, lengths, dtype, seed)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [0, 1, 40, 64, 100])
def test_attend_is_within_float32_rounding(heads: tuple[int, int, int], dtype: str, window: int) -> None:
    rows = crowd(heads, (1, 63, 200), dtype)
    for row in range(3):
        np.testing.assert_allclose(
            rows.full(row, window=window), rows.in_float64(row, window=window), rtol=0, atol=4e-6
        )


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_attend_with_capped_scores(dtype: str, window: int) -> None:
    rows = crowd((4, 2, 32), (1, 200), dtype)
    full = rows.full(1, window=window, cap=1.5)
    np.testing.assert_allclose(full, rows.in_float64(1, window=window, cap=1.5), rtol=0, atol=4e-6)
    assert np.abs(full - rows.full(1, window=window)).max() > 1e-2
    for start, end in ((0, 1), (63, 65), (134, 200)):
        np.testing.assert_array_equal(rows.chunk(1, start, end, window=window, cap=1.5), full[start:end])
    out = run(attend_in_xla, rows, rows.queries[1:], rows.tables[1:], rows.positions(1, 0, 200), window=window, cap=1.5)
    np.testing.assert_allclose(out[0], full, rtol=0, atol=4e-6)


@pytest.mark.parametrize("window", [0, 40])
def test_attend_with_sinks(window: int) -> None:
    rows = crowd((6, 2, 16), (1, 200))
    sinks = np.linspace(-3, 6, 6, dtype=np.float32)  # the last takes most of the weight
    positions = rows.positions(1, 0, 200)
    full = run(cpu.attend, rows, rows.queries[1:], rows.tables[1:], positions, window=window, sinks=sinks)
    np.testing.assert_allclose(full[0], rows.in_float64(1, window=window, sinks=sinks), rtol=0, atol=4e-6)
    for start, end in ((0, 1), (63, 65), (134, 200)):
        queries, part = rows.queries[1:, start:end], rows.positions(1, start, end)
        chunk = run(cpu.attend, rows, queries, rows.tables[1:], part, window=window, sinks=sinks)
        np.testing.assert_array_equal(chunk[0], full[0, start:end])
    out = run(attend_in_xla, rows, rows.queries[1:], rows.tables[1:], positions, window=window, sinks=sinks)
    np.testing.assert_allclose(out, full, rtol=0, atol=4e-6)


@pytest.mark.parametrize("window", [0, 40])
def test_attend_in_xla_equals_the_kernel_within_rounding(window: int) -> None:
    rows = crowd((14, 2, 64), (150,))
    for start in (0, 130):
        positions = rows.positions(0, start, 170)
        queries = np.resize(rows.queries, (1, 170, 14, 64))[:, start:]
        out = run(attend_in_xla, rows, queries, rows.tables, positions, window=window)
        np.testing.assert_allclose(out[0, positions[0] >= 0], rows.full(0, window=window)[start:], rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("heads", HEADS)
def test_attend_has_the_same_bits_in_every_chunk_and_batch(heads: tuple[int, int, int], dtype: str) -> None:
    rows = crowd(heads, (130, 70, 129, 1, 65), dtype)
    full = [rows.full(row) for row in range(5)]
    for size in (1, 7, 31, 32, 64, 100):
        for start in range(0, 130, size) if size > 1 else (0, 63, 64, 129):
            part = rows.chunk(0, start, min(130, start + size))
            np.testing.assert_array_equal(part, full[0][start : start + size], err_msg=f"{start}, {size}")
    # Decode steps of all five rows, some of them already at their end.
    for back in (1, 2, 66):
        positions = np.asarray([[length - back if length >= back else -1] for length in rows.lengths], np.int32)
        queries = np.stack([rows.queries[row, max(0, positions[row, 0])][None] for row in range(5)])
        out = run(cpu.attend, rows, queries, rows.tables, positions)
        for row, position in enumerate(positions[:, 0]):
            expected = full[row][position] if position >= 0 else np.zeros_like(out[row, 0])
            np.testing.assert_array_equal(out[row, 0], expected, err_msg=f"row {row} at {position}")


def test_attend_with_a_window_has_the_same_bits_in_every_chunk() -> None:
    rows = crowd((4, 2, 32), (300,))
    full = rows.full(0, window=70)
    for start, end in ((0, 1), (69, 70), (133, 134), (134, 200), (299, 300)):
        np.testing.assert_array_equal(rows.chunk(0, start, end, window=70), full[start:end])


def test_attend_with_a_window_gives_zeros_for_padding() -> None:
    rows = crowd((4, 2, 32), (70,))
    positions = np.where(np.arange(70) < 40, np.arange(70), -1).astype(np.int32)[None]
    out = run(cpu.attend, rows, rows.queries, rows.tables, positions, window=20)
    np.testing.assert_array_equal(out[0, :40], rows.full(0, window=20)[:40])
    assert not out[0, 40:].any()


def test_attend_propagates_nan() -> None:
    rows = crowd((2, 1, 16), (3,))
    out = run(cpu.attend, rows, rows.queries * np.float32(np.nan), rows.tables, rows.positions(0, 0, 3))
    assert np.isnan(out).all()


def test_attend_in_many_concurrent_calls() -> None:
    """Independent calls share XLA's threads: none may wait for a task that another call prevents from starting."""
    rows = crowd((14, 2, 64), (256,))
    args = (rows.queries, rows.keys, rows.values, rows.tables, rows.positions(0, 0, 256))
    calls = jax.jit(lambda *args: [cpu.attend(args[0] + i, *args[1:], options=ScoreOptions(0.125)) for i in range(12)])
    first = [np.asarray(out) for out in calls(*args)]
    with ThreadPoolExecutor(8) as pool:
        for outs in pool.map(lambda _: calls(*args), range(40)):
            for out, expected in zip(outs, first, strict=True):
                np.testing.assert_array_equal(np.asarray(out), expected)


@pytest.mark.parametrize(("table", "position"), [([[9]], 0), ([[-1]], 0), ([[0]], 64)])
def test_attend_rejects_an_address_outside_the_cache(table: list[list[int]], position: int) -> None:
    pages = jnp.zeros((2, 1, PAGE_SIZE, 8))
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of bounds"):
        cpu.attend(
            jnp.zeros((1, 1, 1, 8)),
            pages,
            pages,
            jnp.asarray(table, jnp.int32),
            jnp.asarray([[position]], jnp.int32),
            options=ScoreOptions(1.0),
        ).block_until_ready()


def test_attend_rejects_pages_of_another_size() -> None:
    pages = jnp.zeros((2, 1, 32, 8))
    zero = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"\[N, K, 64, E\]"):
        cpu.attend(jnp.zeros((1, 1, 1, 8)), pages, pages, zero, zero, options=ScoreOptions(1.0)).block_until_ready()


def trace_attend(rows: Rows) -> Traced:
    """`attend` of the first 20 tokens of a row, traced for any platform."""

    def call(queries: jax.Array, pages: SplitPages, tables: jax.Array, positions: jax.Array) -> jax.Array:
        return attend(queries, pages, addresses_of(tables, positions), load_kernels(), ScoreOptions(0.125))

    return jax.jit(call).trace(rows.queries, SplitPages(rows.keys, rows.values), rows.tables, rows.positions(0, 0, 20))


@pytest.mark.parametrize(("platform", "holds"), [("cpu", True), ("tpu", False), ("cuda", False)])
def test_attend_kernel_is_only_in_cpu_programs(platform: str, holds: bool) -> None:
    rows = crowd((14, 2, 64), (20,), "float32")
    text = trace_attend(rows).lower(lowering_platforms=(platform,)).as_text()
    assert (library.Target.ATTENTION in text) is holds
    # XLA must not round both operands of both products.
    assert text.count("HIGHEST") == (0 if holds else 4)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "holds"), [("bfloat16", 64, True), ("float32", 64, False), ("bfloat16", 98, False)]
)
def test_attend_on_a_gpu_uses_its_kernel_for_bfloat16(dtype: str, head_dim: int, *, holds: bool) -> None:
    rows = crowd((2, 1, head_dim), (20,), dtype)
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("tensor",), abstract_device=h100)):
        text = trace_attend(rows).lower(lowering_platforms=("cuda",)).as_text()
    assert ("xla.gpu.triton" in text) is holds
