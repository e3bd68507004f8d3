"""The kernels of per-token operations: accurate, bit-identical in every batch, and padding is skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from model.activations import clamped_swiglu_in_xla, geglu_in_xla, soft_cap_in_xla, swiglu_in_xla
from model.attention import rotary_angles, rotate_and_store, rotate_and_store_in_xla
from model.kernels import cpu
from model.kernels.cpu import library
from model.kernels.dispatch import load_kernels
from model.kv_cache import PAGE_SIZE, SplitPages, addresses_of
from model.norms import rms_norm_in_xla
from model.rope import Rope

DTYPES = ["float32", "bfloat16"]
WIDTHS = [1, 15, 16, 96, 577, 896]  # full vectors and partial ones
type Floats = NDArray[np.float32]

pytestmark = pytest.mark.usefixtures("kernels")

ROPE = Rope(1e4)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def all_of(x: jax.Array) -> jax.Array:
    return jnp.int32(x.shape[0])


def norm(x: jax.Array, weight: jax.Array, live: jax.Array, dtype: str = "float32") -> Floats:
    return np.asarray(cpu.rms_norm(x, weight, live, epsilon=1e-6, dtype=dtype))


def gated(x: jax.Array, live: jax.Array, dtype: str = "float32") -> Floats:
    return np.asarray(cpu.swiglu(x, live, dtype=dtype))


def geglu(x: jax.Array, live: jax.Array, dtype: str = "float32") -> Floats:
    return np.asarray(cpu.geglu(x, live, dtype=dtype))


def capped(x: jax.Array, live: jax.Array) -> Floats:
    return np.asarray(cpu.soft_cap(x, live, cap=30.0))


@pytest.mark.parametrize("width", WIDTHS)
def test_norm_is_within_float32_rounding(width: int) -> None:
    x, weight = 3 * normal(0, 5, width), normal(1, width)
    x64 = np.asarray(x, np.float64)
    exact = x64 / np.sqrt((x64 * x64).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight, np.float64)
    np.testing.assert_allclose(norm(x, weight, all_of(x)), exact, rtol=1e-6)
    xla = rms_norm_in_xla(x, weight, all_of(x), epsilon=1e-6, dtype="float32")
    np.testing.assert_allclose(np.asarray(xla), exact, rtol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_is_within_float32_rounding(width: int) -> None:
    x = 10 * normal(2, 5, 2 * width)
    gate, up = np.split(np.asarray(x, np.float64), 2, axis=1)
    exact = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(gated(x, all_of(x)), exact, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(swiglu_in_xla(x, all_of(x), dtype="float32")), exact, rtol=1e-6)


def test_swiglu_of_extreme_gates_neither_overflows_nor_swallows_nan() -> None:
    gates = [-1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e30, np.nan]
    x = jnp.asarray([[*gates, *[1.0] * len(gates)]], jnp.float32)
    y = gated(x, all_of(x))[0]
    np.testing.assert_allclose(y[:8], [0, 0, -88 * np.exp(-88.0), 0, 0, 88, 200, 1e30], rtol=1e-6, atol=1e-36)
    assert np.isnan(y[8])


@pytest.mark.parametrize("width", WIDTHS)
def test_geglu_is_within_float32_rounding(width: int) -> None:
    x = 3 * normal(6, 5, 2 * width)
    gate, up = np.split(np.asarray(x, np.float64), 2, axis=1)
    exact = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    np.testing.assert_allclose(geglu(x, all_of(x)), exact, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(np.asarray(geglu_in_xla(x, all_of(x), dtype="float32")), exact, rtol=2e-6, atol=1e-6)


def test_geglu_of_extreme_gates_neither_overflows_nor_swallows_nan() -> None:
    gates = [-1e30, -200.0, -10.0, -0.0, 0.0, 10.0, 200.0, 1e12, np.nan]
    x = jnp.asarray([[*gates, *[1.0] * len(gates)]], jnp.float32)
    y = geglu(x, all_of(x))[0]
    np.testing.assert_allclose(y[:8], [0, 0, 0, 0, 0, 10, 200, 1e12], rtol=1e-6, atol=1e-6)
    assert np.isnan(y[8])


@pytest.mark.parametrize("width", WIDTHS)
def test_clamped_swiglu_is_within_float32_rounding(width: int) -> None:
    x = 8 * normal(7, 5, 2 * width)
    gate, up = np.split(np.asarray(x, np.float64), 2, axis=1)
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    exact = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    ours, xla = (form(x, all_of(x), dtype="float32") for form in (cpu.clamped_swiglu, clamped_swiglu_in_xla))
    np.testing.assert_allclose(ours, exact, rtol=4e-6, atol=1e-6)
    np.testing.assert_allclose(xla, exact, rtol=4e-6, atol=1e-6)


def test_clamped_swiglu_of_extreme_values_keeps_nan() -> None:
    gates, ups = [-1e30, 1e30, 1.0, 1.0, np.nan, 1.0], [1.0, 1e30, -1e30, 2.0, 1.0, np.nan]
    y = np.asarray(cpu.clamped_swiglu(jnp.asarray([gates + ups], jnp.float32), jnp.int32(1), dtype="float32"))[0]
    one = 1 / (1 + np.exp(-1.702))
    np.testing.assert_allclose(y[:4], [0, 56 / (1 + np.exp(-1.702 * 7)), -6 * one, 3 * one], rtol=1e-6, atol=1e-36)
    assert np.isnan(y[4:]).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_soft_cap_is_within_float32_rounding(width: int) -> None:
    x = normal(8, 7, width) * jnp.asarray([[1e-6], [0.01], [1.0], [7.0], [7.6], [30.0], [1000.0]])
    exact = 30 * np.tanh(np.asarray(x, np.float64) / 30)
    np.testing.assert_allclose(capped(x, all_of(x)), exact, rtol=4e-7)
    np.testing.assert_allclose(np.asarray(soft_cap_in_xla(x, all_of(x), cap=30.0)), exact, rtol=4e-6)


def test_soft_cap_keeps_order_signs_and_nan() -> None:
    x = jnp.asarray([[-np.inf, -1e30, -31.0, -1e-30, 0.0, 1e-30, 31.0, 1e30, np.inf, np.nan]], jnp.float32)
    y = capped(x, all_of(x))[0]
    assert (np.diff(y[:9]) >= 0).all()
    assert (y[0], y[4], y[8]) == (-30, 0, 30)
    assert np.isnan(y[9])
    np.testing.assert_array_equal(capped(jnp.stack([x[0]] * 3), jnp.int32(1))[1:], np.zeros((2, 10)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_same_bits_in_every_batch(dtype: str) -> None:
    x, weight = normal(3, 257, 2 * 577), normal(4, 2 * 577)
    whole_norm, whole_gated = norm(x, weight, all_of(x), dtype), gated(x, all_of(x), dtype)
    whole_geglu, whole_capped = geglu(x, all_of(x), dtype), capped(x, all_of(x))
    for m in (1, 2, 3, 16, 64):
        for first in (0, 257 - m):
            part = x[first : first + m]
            np.testing.assert_array_equal(norm(part, weight, all_of(part), dtype), whole_norm[first : first + m])
            np.testing.assert_array_equal(geglu(part, all_of(part), dtype), whole_geglu[first : first + m])
            np.testing.assert_array_equal(capped(part, all_of(part)), whole_capped[first : first + m])
            np.testing.assert_array_equal(gated(part, all_of(part), dtype), whole_gated[first : first + m])


def test_bfloat16_result_is_the_float32_result_rounded() -> None:
    x, weight = normal(5, 9, 66), normal(6, 66)
    rounded = jnp.asarray(norm(x, weight, all_of(x))).astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm(x, weight, all_of(x), "bfloat16"), np.asarray(rounded))
    rounded = jnp.asarray(gated(x, all_of(x))).astype(jnp.bfloat16)
    np.testing.assert_array_equal(gated(x, all_of(x), "bfloat16"), np.asarray(rounded))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("live", [-1, 0, 1, 30, 64, 65])
def test_padding_rows_are_zeros_and_change_no_other(live: int, dtype: str) -> None:
    x, weight = normal(7, 64, 60), normal(8, 60)
    count = min(max(live, 0), 64)
    torn = x.at[count:].set(jnp.nan)
    for some, full in (
        (norm(torn, weight, jnp.int32(live), dtype), norm(x, weight, all_of(x), dtype)),
        (gated(torn, jnp.int32(live), dtype), gated(x, all_of(x), dtype)),
    ):
        np.testing.assert_array_equal(some[:count], full[:count])
        assert not some[count:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "K", "E"), [(9, 3, 64), (14, 2, 64), (4, 1, 256), (3, 3, 6), (5, 1, 98)])
@pytest.mark.parametrize(("R", "T"), [(1, 1), (4, 1), (1, 70)])
def test_rotate_and_store_equals_xla(H: int, K: int, E: int, R: int, T: int, dtype: str) -> None:
    heads = normal(9, R, T, H + 2 * K, E)
    keys, values = (jnp.asarray(normal(seed, 2 * R + 1, K, PAGE_SIZE, E), dtype) for seed in (10, 11))
    tables = jnp.arange(1, 2 * R + 1, dtype=jnp.int32)[::-1].reshape(R, 2)
    positions = jnp.where(jnp.arange(R * T).reshape(R, T) % 7 == 5, -1, 63 + jnp.arange(R)[:, None] * 20)
    positions = jnp.where(positions >= 0, jnp.minimum(positions, 127 - T) + jnp.arange(T), -1).astype(jnp.int32)
    angles = rotary_angles(positions, E, ROPE)
    ours = jax.jit(cpu.rotate_and_store)(heads, *angles, keys, values, tables, positions)
    xla = jax.tree.leaves(jax.jit(rotate_and_store_in_xla)(heads, *angles, SplitPages(keys, values), tables, positions))
    valid = np.asarray(positions) >= 0
    np.testing.assert_allclose(np.asarray(ours[0])[valid], np.asarray(xla[0])[valid], rtol=0, atol=1e-6)
    assert not np.asarray(ours[0])[~valid].any()
    for mine, theirs, old in zip(ours[1:], xla[1:], (keys, values), strict=True):
        mine, theirs = np.asarray(mine, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_allclose(mine[1:], theirs[1:], rtol=0, atol=1e-6 if dtype == "float32" else 0.02)
        np.testing.assert_array_equal(mine[0], np.asarray(old[0], np.float32))  # padding is stored nowhere


def test_rotate_and_store_has_the_same_bits_in_every_batch() -> None:
    H, K, E, T = 9, 3, 64, 128
    heads, tables = normal(12, 1, T, H + 2 * K, E), jnp.asarray([[1, 2]], jnp.int32)
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    empty = jnp.zeros((3, K, PAGE_SIZE, E), jnp.bfloat16)
    cos, sin = rotary_angles(positions, E, ROPE)
    full = cpu.rotate_and_store(heads, cos, sin, empty, empty, tables, positions)
    for start, end in ((0, 1), (63, 64), (64, 128), (100, 117)):
        cut = slice(start, end)
        part = cpu.rotate_and_store(heads[:, cut], cos[:, cut], sin[:, cut], empty, empty, tables, positions[:, cut])
        np.testing.assert_array_equal(part[0], full[0][:, cut])
        for mine, all_ in zip(part[1:], full[1:], strict=True):
            flat = (np.asarray(pages)[1:].transpose(0, 2, 1, 3).reshape(T, K, E) for pages in (mine, all_))
            few, many = flat
            np.testing.assert_array_equal(few[cut], many[cut])
            assert not few[:start].any()
            assert not few[end:].any()


def test_rotate_and_store_writes_donated_pages_in_place() -> None:
    pages = (normal(13, 3, 1, PAGE_SIZE, 8), normal(14, 3, 1, PAGE_SIZE, 8))
    zero = jnp.zeros((1, 1), jnp.int32)
    pointers = [page.unsafe_buffer_pointer() for page in pages]
    step = jax.jit(cpu.rotate_and_store, donate_argnums=(3, 4))
    _, *updated = step(normal(15, 1, 1, 3, 8), *rotary_angles(zero, 8, ROPE), *pages, zero, zero)
    assert [page.unsafe_buffer_pointer() for page in updated] == pointers


@pytest.mark.parametrize(("table", "position"), [([[9]], 0), ([[-1]], 0), ([[0]], 64)])
def test_rotate_and_store_rejects_an_address_outside_the_cache(table: list[list[int]], position: int) -> None:
    pages, positions = jnp.zeros((2, 1, PAGE_SIZE, 8)), jnp.asarray([[position]], jnp.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of bounds"):
        jax.block_until_ready(
            cpu.rotate_and_store(
                jnp.zeros((1, 1, 3, 8)),
                *rotary_angles(positions, 8, ROPE),
                pages,
                pages,
                jnp.asarray(table, jnp.int32),
                positions,
            )
        )


def test_rotate_and_store_rejects_values_of_another_size_than_the_keys() -> None:
    zero = jnp.zeros((1, 1), jnp.int32)
    pages = jnp.zeros((2, 1, PAGE_SIZE, 8)), jnp.zeros((1, 1, PAGE_SIZE, 8))
    with pytest.raises(jax.errors.JaxRuntimeError, match="rotate takes"):
        jax.block_until_ready(
            cpu.rotate_and_store(jnp.zeros((1, 1, 3, 8)), *rotary_angles(zero, 8, ROPE), *pages, zero, zero)
        )


@pytest.mark.parametrize(("platform", "holds"), [("cpu", True), ("tpu", False), ("cuda", False)])
def test_rotate_and_store_kernel_is_only_in_cpu_programs(platform: str, holds: bool) -> None:
    pages, zero = jnp.zeros((2, 1, PAGE_SIZE, 8)), jnp.zeros((1, 1), jnp.int32)
    traced = jax.jit(rotate_and_store, static_argnums=4).trace(
        jnp.zeros((1, 1, 3, 8)),
        rotary_angles(zero, 8, ROPE),
        SplitPages(pages, pages),
        addresses_of(zero, zero),
        load_kernels(),
    )
    assert (library.Target.ROTATE in traced.lower(lowering_platforms=(platform,)).as_text()) is holds
