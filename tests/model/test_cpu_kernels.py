"""The packed linear kernel: accurate, bit-identical for every batch, and optional."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from model.kernels import cpu
from model.kernels.cpu import library
from model.kernels.dispatch import Kernels, load_kernels
from model.linear import matmul
from model.packed import PackedWeight, unpack_rows
from tests.support.packed import pack

SHAPES = [(1, 32, 2), (2, 1, 1), (3, 33, 5), (12, 64, 256), (13, 100, 257), (25, 31, 515), (64, 576, 96), (257, 40, 90)]


@pytest.fixture
def cache_dir(tmp_path: Path) -> Iterator[Path]:
    """A persistent compilation cache of every program, for one test."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    old_settings = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield tmp_path
    finally:
        for name, value in old_settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    values = np.random.default_rng(seed).normal(scale=scale, size=shape)
    return jnp.asarray(values, jnp.bfloat16)


def on_path(path: str, x: jax.Array, weight: PackedWeight) -> np.ndarray:
    call = jax.ffi.ffi_call(
        f"{library.Target.LINEAR}_{path}", jax.ShapeDtypeStruct((x.shape[0], weight.n), jnp.float32)
    )
    return np.asarray(call(x, weight.words, weight.scales, jnp.int32(x.shape[0]), format=weight.format.name))


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_pack_keeps_every_value_and_pads_with_zeros(m: int, n: int, k: int) -> None:
    """Pairs of K are next to each other, which vdpbf16ps reads."""
    w = normal(m, n, k)
    packed = pack(w)
    assert packed.words.shape == (-(-n // 32), -(-k // 32), 16, 32)
    assert (packed.n, packed.k) == (n, k)
    pairs = np.asarray(packed.words).reshape(-1, packed.words.shape[1] * 16, 32)[..., None].view(np.uint16)
    data = pairs.view(ml_dtypes.bfloat16).astype(np.float32)
    i, j = np.indices((n, k))
    np.testing.assert_array_equal(data[i // 32, j // 2, i % 32, j % 2], np.asarray(w, np.float32))
    assert np.count_nonzero(data) == np.count_nonzero(np.asarray(w, np.float32))


def test_unpack_rows_gathers_rows_in_any_order() -> None:
    w = normal(0, 70, 7)
    rows = jnp.asarray([69, 0, 31, 32, 31], jnp.int32)
    np.testing.assert_array_equal(unpack_rows(pack(w), rows), w[rows])


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.usefixtures("kernels")
def test_linear_is_within_float32_rounding_of_the_exact_sum(m: int, n: int, k: int) -> None:
    x, w = normal(1, m, k), normal(2, n, k)
    y = np.asarray(cpu.linear(x, pack(w)))
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    # k sums, each off by at most half a unit in the last place of a partial sum.
    bound = k * 2.0**-24 * (np.abs(x64) @ np.abs(w64).T)
    assert y.shape == (m, n)
    assert y.dtype == np.float32
    assert (np.abs(y - x64 @ w64.T) <= bound).all()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_linear_paths_sum_in_the_documented_order(kernels: cpu.CpuKernels, m: int, n: int, k: int) -> None:
    x, weight = normal(3, m, k), pack(normal(4, n, k))
    exact = np.zeros((m, n), np.float32)
    x32, w32 = np.zeros((m, k + k % 2), np.float32), np.zeros((n, k + k % 2), np.float32)
    x32[:, :k], w32[:, :k] = np.asarray(x), np.asarray(unpack_rows(weight, jnp.arange(n)))
    for j in (pair + odd for pair in range(0, k, 2) for odd in (1, 0)):
        exact += x32[:, j : j + 1] * w32[:, j]
    for path in kernels.paths:
        np.testing.assert_array_equal(on_path(path, x, weight), exact, err_msg=path)
    np.testing.assert_array_equal(cpu.linear(x, weight), exact)


def test_linear_paths_agree_on_denormals(kernels: cpu.CpuKernels) -> None:
    if "pairs" not in kernels.paths:
        pytest.skip("this CPU has no AVX512_BF16")
    scale = 2.0**-63.5  # products and sums on both sides of float32's smallest normal number, 2^-126
    x, weight = normal(5, 13, 300, scale=scale), pack(normal(6, 64, 300, scale=scale))
    pairs = on_path("pairs", x, weight)
    np.testing.assert_array_equal(pairs, on_path("floats", x, weight))
    np.testing.assert_array_equal(pairs[:1], cpu.linear(x[:1], weight))
    assert np.count_nonzero(pairs) > 0
    assert np.count_nonzero(pairs) < pairs.size


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.usefixtures("kernels")
def test_linear_has_the_same_bits_in_every_batch(dtype: jnp.dtype) -> None:
    x, weight = normal(7, 257, 577).astype(dtype), pack(normal(8, 1000, 577))
    full = np.asarray(cpu.linear(x, weight))
    for m in (1, 2, 3, 4, 5, 11, 12, 13, 16, 64):
        for first in (0, 257 - m):
            part = cpu.linear(x[first : first + m], weight)
            np.testing.assert_array_equal(np.asarray(part), full[first : first + m], err_msg=f"{m} rows from {first}")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("live", [-1, 0, 1, 5, 12, 13, 40, 64, 65])
@pytest.mark.usefixtures("kernels")
def test_linear_padding_rows_are_zeros_and_change_no_other(live: int, dtype: jnp.dtype) -> None:
    x, weight = normal(20, 64, 70).astype(dtype), pack(normal(21, 100, 70))
    full = np.asarray(cpu.linear(x, weight))
    count = min(max(live, 0), 64)
    some = np.asarray(cpu.linear(x.at[count:].set(jnp.nan), weight, live=jnp.int32(live)))
    np.testing.assert_array_equal(some[:count], full[:count])
    assert not some[count:].any()


@pytest.mark.usefixtures("kernels")
def test_linear_row_of_nan_changes_no_other() -> None:
    # An odd k: the value after a row in memory belongs to the next row.
    x, weight = normal(11, 5, 33), pack(normal(12, 40, 33))
    clean = np.asarray(cpu.linear(x, weight))
    y = np.asarray(cpu.linear(x.at[2].set(jnp.nan), weight))
    assert np.isnan(y[2]).all()
    np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(clean, 2, 0))


@pytest.mark.usefixtures("kernels")
def test_linear_in_many_concurrent_calls() -> None:
    x = normal(13, 16, 128)
    weights = [pack(normal(20 + i, 2048, 128)) for i in range(16)]
    alone = [np.asarray(cpu.linear(x, weight)) for weight in weights]
    program = jax.jit(lambda x, weights: [cpu.linear(x, weight) for weight in weights]).lower(x, weights).compile()

    def check(_: int) -> bool:
        together = program(x, weights)
        return all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(check, range(64)))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.usefixtures("kernels")
def test_matmul_lowers_for_every_platform(rows: int) -> None:
    """A step with weights packed on this machine can be compiled for another platform."""
    x, w = normal(22, rows, 70), normal(23, 100, 70)
    weight = pack(w)
    product, kernels = jax.jit(matmul, static_argnums=2), load_kernels()
    for other in ("tpu", "cuda"):
        assert "logprobd" not in product.trace(x, weight, kernels).lower(lowering_platforms=(other,)).as_text()
    assert library.Target.LINEAR in product.trace(x, weight, kernels).lower(lowering_platforms=("cpu",)).as_text()
    in_kernel = np.asarray(product(x, weight, kernels))
    np.testing.assert_array_equal(matmul(x, weight, Kernels()), matmul(x, w, Kernels()))
    np.testing.assert_allclose(matmul(x, weight, Kernels()), in_kernel, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("kernels")
def test_linear_compiles_ahead_of_time_with_donated_buffers() -> None:
    x, weight = normal(14, 4, 64), pack(normal(15, 96, 64))
    expected = 2 * np.asarray(cpu.linear(x, weight))

    def step(total: jax.Array, x: jax.Array, weight: PackedWeight) -> jax.Array:
        return total + cpu.linear(x, weight)

    shapes = (jax.ShapeDtypeStruct((4, 96), jnp.float32), x, weight)
    program = jax.jit(step, donate_argnums=0).lower(*shapes).compile()
    total = jnp.zeros((4, 96), jnp.float32)
    for _ in range(2):
        total = program(total, x, weight)
    np.testing.assert_array_equal(total, expected)


@pytest.mark.usefixtures("kernels")
def test_linear_in_a_program_from_the_persistent_cache(cache_dir: Path) -> None:
    x, weight = normal(16, 3, 62), pack(normal(17, 65, 62))
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


def test_load_twice(kernels: cpu.CpuKernels) -> None:
    assert cpu.load_library() == kernels


@pytest.mark.usefixtures("kernels")
def test_linear_rejects_another_dtype_or_width() -> None:
    weight = pack(normal(18, 32, 8))
    with pytest.raises(TypeError, match="x is float16, the weight BF16"):
        cpu.linear(jnp.zeros((1, 8), jnp.float16), weight)
    with pytest.raises(ValueError, match=r"\(1, 9\), not \[M, 8\]"):
        cpu.linear(jnp.zeros((1, 9), jnp.bfloat16), weight)
