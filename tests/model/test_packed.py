"""Packed weights of every format: exact values, and products in the kernels and in XLA."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from jax import Array
from numpy.typing import NDArray

from model import linear
from model.formats import FLOATS, FORMATS
from model.kernels import cpu
from model.kernels.cpu import library
from model.kernels.dispatch import Kernels, load_kernels
from model.linear import matmul, take_rows
from model.packed import _DECODERS, PackedWeight, StackedWeight, pack, unpack, unpack_rows
from tests.support.packed import CODED, IN_GGUF, limit, random_blocks, random_weight

WIDE = 9  # powers of ten of scales, down to float16's smallest
SHAPES = [(1, 32, 2), (2, 1, 1), (3, 33, 31), (12, 64, 256), (13, 100, 257), (64, 300, 96), (100, 40, 90)]

product, rows_of = jax.jit(matmul, static_argnums=2), jax.jit(take_rows)


def normal(seed: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def in_float64(x: Array, values: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(x, np.float64) @ values.T.astype(np.float64)


@pytest.mark.parametrize("name", [*FLOATS, *IN_GGUF])
def test_blocks_have_the_size_of_the_file(name: str) -> None:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    block_format = FORMATS[name]
    assert block_format.block_bytes * block == size * block_format.block
    weight, _ = random_weight(name, 64, 512)
    assert weight.words.nbytes + weight.scales.nbytes == 64 * 512 // block * size == block_format.nbytes(64, 512)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 31), (100, 257), (40, 64)])
def test_pack_pads_with_zeros(name: str, n: int, k: int) -> None:
    block_format = FORMATS[name]
    weight, values = random_weight(name, n, k)
    blocks, depth = -(-n // 32), block_format.depth(k)
    assert weight.words.shape == (blocks, depth, block_format.words, 32)
    assert weight.scales.shape == (blocks, depth if block_format.scale_bytes else 0, 32)
    assert (weight.n, weight.k) == (n, k)
    padding = jax.tree.map(lambda array: array[-1, ..., n % 32 or 32 :], weight)
    assert not np.asarray(padding.words).any()
    assert not np.asarray(padding.scales).any()
    rows = jnp.asarray([n - 1, 0, n - 1], jnp.int32)
    np.testing.assert_array_equal(rows_of(weight, rows).astype(jnp.float32), values[np.asarray(rows)])


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_the_file_to_the_bit(name: str) -> None:
    weight, expected = random_weight(name, 70, 768, spread=WIDE)
    got = np.asarray(jax.jit(unpack)(weight).astype(jnp.float32))
    np.testing.assert_array_equal(got, expected)
    ids = jnp.asarray([69, 0, 33, 33, 7])
    np.testing.assert_array_equal(np.asarray(jax.jit(unpack_rows)(weight, ids).astype(jnp.float32)), expected[ids])


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 127, 249])
@pytest.mark.usefixtures("kernels")
def test_mxfp4_exponents(exponent: int) -> None:
    """Half of 2^(e - 127) for each step; the two smallest are denormal and count as zero."""
    rows = random_blocks("MXFP4", 40, 32)
    rows[:, 0] = exponent
    weight = pack((40, 32), FORMATS["MXFP4"], [rows])
    codes = np.concatenate([rows[:, 1:] & 15, rows[:, 1:] >> 4], axis=1)
    steps = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])[codes]
    expected = (steps * (0.0 if exponent < 2 else 2.0 ** (exponent - 128))).astype(np.float32)
    np.testing.assert_array_equal(unpack(weight), expected)
    np.testing.assert_array_equal(cpu.linear(jnp.eye(32), weight), expected.T)
    np.testing.assert_array_equal(cpu.linear(jnp.eye(32)[:1], weight), expected.T[:1])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.usefixtures("kernels")
def test_kernel_multiplies_the_values_of_the_file(name: str) -> None:
    """Rows of the identity give the values themselves: one row, few rows and many, which run different code."""
    n, k = 70, 512
    weight, expected = random_weight(name, n, k, spread=WIDE)
    normal_values = np.where(np.abs(expected) < np.finfo(np.float32).tiny, 0, expected)
    identity = np.eye(k, dtype=np.float32)
    for start, count in ((0, 300), (300, 1), (301, 2), (303, 3), (306, 4), (310, 202)):
        rows = identity[start : start + count]
        got = np.asarray(cpu.linear(jnp.asarray(rows), weight))
        np.testing.assert_array_equal(got, normal_values.T[start : start + count])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("form", ["kernels", "XLA"])
def test_matmul_is_within_float32_rounding(name: str, form: str) -> None:
    kernels = load_kernels() if form == "kernels" else Kernels()
    if form == "kernels" and kernels.cpu is None:
        pytest.skip("no kernels here")
    for m, n, k in SHAPES if form == "kernels" else SHAPES[1:5:3]:
        x, (weight, values) = normal(3, m, k), random_weight(name, n, k, seed=4)
        if name == "BF16":  # bfloat16 activations too
            y = np.asarray(product(x.astype(jnp.bfloat16), weight, kernels))
            assert (np.abs(y - in_float64(x.astype(jnp.bfloat16), values)) <= limit(x, values) * 1.01).all()
        elif name in CODED:  # they are widened
            y = np.asarray(product(x.astype(jnp.bfloat16), weight, kernels))
            np.testing.assert_array_equal(y, product(x.astype(jnp.bfloat16).astype(jnp.float32), weight, kernels))
        y = np.asarray(product(x, weight, kernels))
        assert (
            np.abs(y - in_float64(x, values))
            <= limit(x, values, weight if form == "kernels" and name in CODED else None)
        ).all()


@pytest.mark.parametrize("name", [*FLOATS, "FP8_128"])
@pytest.mark.usefixtures("kernels")
def test_linear_sums_in_ascending_order_by_fused_multiply_adds(name: str) -> None:
    k = 257
    (weight, values), x = random_weight(name, 70, k, seed=6), normal(5, 13, k)
    x = x.astype(jnp.bfloat16).astype(jnp.float32)  # a product of 8 by 24 bits is exact in float64
    x64, w64, y = np.asarray(x, np.float64), values.astype(np.float64), np.zeros((13, 70), np.float32)
    for i in range(k):
        # A sum that float64 rounds first could differ, which chance spares here.
        y = (y + x64[:, i, None] * w64[:, i]).astype(np.float32)
    np.testing.assert_array_equal(cpu.linear(x, weight), y)


def integers(x: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Groups x [..., kGroup] as integers of 24 bits, and the scale [..., 1] of each group, a power of two."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    scale = 2.0 ** np.floor(np.log2(largest) - 22)
    scale = np.where(largest / scale > 127 * (65536 + 256 + 1), 2 * scale, scale)
    return np.rint(x / scale).astype(np.int64), scale


# The words of a block that hold nothing but codes.
CODE_WORDS = {"Q4_1": (1, 5), "Q5_1": (1, 6), "Q2_K": (4, 20), "Q3_K": (0, 24), "Q4_K": (4, 36), "Q5_K": (4, 44)}
CODE_WORDS |= {
    "Q6_K": (0, 48),
    "IQ4_XS": (2, 34),
    **{name: (1, FORMATS[name].words) for name in CODED if "INT" in name},
}


@pytest.mark.parametrize("name", CODED)
@pytest.mark.usefixtures("kernels")
def test_linear_sums_integers_of_groups(name: str) -> None:
    m, n, k = 9, 70, 512
    weight, _ = random_weight(name, n, k, seed=6)
    first, last = CODE_WORDS.get(name, (0, None))
    extremes = weight.words.at[:, :, first:last, 0].set(0xFFFFFFFF).at[:, :, first:last, 1].set(0)
    weight = replace(weight, words=extremes.at[:, :, first:last, 2].set(0xFF00FF00))
    words, scales = weight.words.transpose(0, 3, 1, 2), weight.scales.transpose(0, 2, 1)
    codes, factors, minima = (part if part is None else np.asarray(part) for part in _DECODERS[name](words, scales))
    assert codes is not None
    assert factors is not None
    groups = max(factors.shape[-1] * factors.shape[-2], k // 32)
    repeats = groups // (factors.shape[-1] * factors.shape[-2])  # groups of a block of our own formats are alike
    factors = factors.repeat(repeats, axis=-1)
    minima = None if minima is None else minima.repeat(repeats, axis=-1)
    codes = codes.reshape(-1, groups, k // groups)[:n].astype(np.int64)  # [N, groups, kGroup]
    factors = factors.reshape(-1, groups)[:n].astype(np.float64)
    x = np.asarray(normal(5, m, k)) * 10.0 ** np.random.default_rng(4).uniform(-8, 8, (m, k // 16)).repeat(16, axis=1)
    x[0], x[1], x[2] = 127 / 128, -127 / 128, 2 - 2.0**-23  # digits of -128 and 127, and an integer that is halved
    x[:2, ::32] *= 128 / 127
    ints, scale = integers(x.astype(np.float32).reshape(m, groups, -1))
    y = np.zeros((m, n), np.float32)
    for group in range(groups):
        sums = ((ints[:, group] @ codes[:, group].T) * scale[:, group]).astype(np.float32)  # [M, N], rounded once
        # A sum that float64 rounds first could differ, which chance spares here.
        y = (y + sums * factors[:, group]).astype(np.float32)
        if minima is not None:
            x_sum = ints[:, group].sum(axis=1, keepdims=True).astype(np.float32) * scale[:, group]
            y = (y - x_sum * minima.reshape(-1, groups)[:n, group].astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(cpu.linear(jnp.asarray(x, jnp.float32), weight), y)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.usefixtures("kernels")
def test_outputs_of_a_value_that_is_not_finite_are_nan(name: str, value: float) -> None:
    weight, _ = random_weight(name, 40, 256)
    for m in (1, 2, 7):
        x = normal(1, m, 256).at[m - 1, 100].set(value)
        y = np.asarray(cpu.linear(x, weight))
        assert np.isnan(y[m - 1]).all()
        assert np.isfinite(y[: m - 1]).all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-37, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q8_0"])
@pytest.mark.usefixtures("kernels")
def test_products_of_any_magnitude(name: str, magnitude: float) -> None:
    x, (weight, values) = normal(1, 7, 256) * magnitude, random_weight(name, 40, 256)
    y = np.asarray(cpu.linear(x, weight))
    tiny = 256 * np.finfo(np.float32).tiny  # smaller ones count as zero
    assert (np.abs(y - in_float64(x, values)) <= limit(x, values, weight) + tiny * np.abs(values).max()).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.usefixtures("kernels")
def test_linear_has_the_same_bits_in_every_batch(name: str) -> None:
    x, (weight, _) = normal(7, 140, 577), random_weight(name, 300, 577, seed=8)
    full = np.asarray(cpu.linear(x, weight))
    for m in (1, 2, 3, 4, 5, 11, 12, 13, 16, 64):
        for first in (0, 140 - m):
            part = np.asarray(cpu.linear(x[first : first + m], weight))
            np.testing.assert_array_equal(part, full[first : first + m], err_msg=f"{m} rows from {first}")


@pytest.mark.parametrize("name", ["BF16", "Q4_1", "Q6_K"])
@pytest.mark.parametrize("live", [-1, 0, 1, 4, 12, 13, 64, 65])
@pytest.mark.usefixtures("kernels")
def test_linear_padding_rows_are_zeros_and_change_no_other(name: str, live: int) -> None:
    x, (weight, _) = normal(9, 64, 70), random_weight(name, 100, 70, seed=10)
    full, count = np.asarray(cpu.linear(x, weight)), min(max(live, 0), 64)
    some = np.asarray(cpu.linear(x.at[count:].set(jnp.nan), weight, live=jnp.int32(live)))
    np.testing.assert_array_equal(some[:count], full[:count])
    assert not some[count:].any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.usefixtures("kernels")
def test_score_has_the_bits_of_token_logprobs(name: str) -> None:
    for rows, width, vocab in ((1, 5, 7), (13, 64, 1024), (64, 96, 2001)):
        hidden, (weight, _) = normal(11, rows, width), random_weight(name, vocab, width, seed=12)
        ids = jnp.arange(rows, dtype=jnp.int32) % vocab
        requested_ids, live = jnp.zeros((rows, 2), jnp.int32), jnp.int32(rows)
        expected = cpu.token_logprobs(cpu.linear(hidden, weight), ids, requested_ids, live, k=5)
        result = cpu.score(hidden, weight, ids, requested_ids, live, k=5)
        for mine, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
            assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()


@pytest.mark.usefixtures("kernels")
def test_linear_rejects_another_dtype_or_shape() -> None:
    weight, _ = random_weight("Q8_0", 40, 64)
    with pytest.raises(TypeError, match="x is bfloat16, the weight Q8_0"):
        cpu.linear(jnp.zeros((1, 64), jnp.bfloat16), weight)
    with pytest.raises(ValueError, match=r"\(1, 65\), not \[M, 64\]"):
        cpu.linear(jnp.zeros((1, 65)), weight)
    for torn in (
        replace(weight, scales=weight.scales[:, :1]),
        replace(weight, words=weight.words[:, :1]),
        replace(weight, words=weight.words[:, :, :4]),
        replace(weight, n=65),
        replace(weight, format=FORMATS["Q5_0"]),
        replace(weight, format=replace(FORMATS["Q8_0"], name="Q8_1")),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="linear takes"):
            jax.block_until_ready(cpu.linear(jnp.zeros((1, 64)), torn))


@pytest.mark.parametrize("name", FORMATS)
def test_matmul_on_an_accelerator_unpacks_blocks(name: str) -> None:
    """The implementation for accelerators, run on this CPU: less than the blocks of one part, and several parts."""
    for m, n, k in ((3, 40, 33), (2, 4097, 64)):
        weight, values = random_weight(name, n, k, seed=3)
        x, weight = linear.operands(normal(4, m, k).astype(jnp.bfloat16), weight)
        y = np.asarray(jax.jit(linear._by_blocks)(x, weight, jnp.int32(m)))
        assert (np.abs(y - in_float64(x, values)) <= limit(x, values)).all()


@pytest.mark.parametrize(
    ("name", "n", "k"),
    [
        *(("Q8_0", n, k) for n, k in ((576, 576), (1536, 576), (960, 576), (576, 1536), (1152, 896), (896, 4864))),
        ("Q4_1", 576, 1536),
        ("Q4_K", 640, 2048),
    ],
)
def test_matmul_without_kernels_has_the_same_bits_in_every_batch(name: str, n: int, k: int) -> None:
    """In the shapes of real models: XLA's products of other shapes (96 columns) can differ, with any weights."""
    x, (weight, _) = normal(15, 64, k), random_weight(name, n, k, seed=16)
    full = np.asarray(product(x, weight, Kernels()))
    for m in (1, 2, 3, 8, 16):
        np.testing.assert_array_equal(product(x[:m], weight, Kernels()), full[:m], err_msg=f"{m} rows")


@pytest.mark.parametrize("name", CODED)
def test_matmul_lowers_for_every_platform(name: str) -> None:
    """Programs for other platforms have no call of our kernels."""
    x, (weight, _) = jnp.zeros((4, 64)), random_weight(name, 64, 64, seed=14)
    for platform in ("tpu", "cuda"):
        text = product.trace(x, weight, load_kernels()).lower(lowering_platforms=(platform,)).as_text()
        assert "logprobd" not in text
        assert "HIGHEST" in text  # of float32 operands, which other platforms would round
    if load_kernels().cpu is not None:
        text = product.trace(x, weight, load_kernels()).lower(lowering_platforms=("cpu",)).as_text()
        assert library.Target.LINEAR in text
        assert f'format = "{name}"' in text


@pytest.mark.parametrize("form", ["kernels", "XLA"])
def test_stacked_weights_are_multiplied_in_order(form: str) -> None:
    kernels = load_kernels() if form == "kernels" else Kernels()
    parts = tuple(random_weight(name, n, 256)[0] for name, n in (("Q4_K", 64), ("Q6_K", 31), ("F16", 5)))
    x = normal(1, 7, 256)
    y = np.asarray(matmul(x, StackedWeight(parts), kernels))
    np.testing.assert_array_equal(y, np.concatenate([matmul(x, part, kernels) for part in parts], axis=1))


def test_bfloat16_values_stay_bfloat16() -> None:
    weight, _ = random_weight("BF16", 33, 40)
    assert unpack(weight).dtype == ml_dtypes.bfloat16
    assert not any(weight.format.is_float for weight, _ in (random_weight(name, 1, 1) for name in CODED))
    assert all(FORMATS[name].is_float for name in FLOATS)


def test_pack_takes_runs_of_any_length() -> None:
    rows = random_blocks("Q5_K", 150, 256)
    whole = pack((150, 256), FORMATS["Q5_K"], [rows])
    for step in (1, 31, 32, 33, 64, 149):
        parts: PackedWeight = pack((150, 256), FORMATS["Q5_K"], (rows[i : i + step] for i in range(0, 150, step)))
        for mine, other in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("name", ["BF16", "Q8_0", "Q4_K", "INT4_32"])
def test_pack_only_changes_the_order_of_a_large_weight(name: str) -> None:
    """Larger than what is transposed at once, and with rows of a power of two."""
    block_format = FORMATS[name]
    n, depth = 200, 4096 // block_format.block
    rows = np.random.default_rng(3).integers(0, 256, (n, depth * block_format.block_bytes), np.uint8)
    weight = pack((n, 4096), block_format, [rows])
    blocks = np.pad(rows, ((0, 24), (0, 0))).reshape(7, 32, depth, block_format.block_bytes)
    first = block_format.scale_bytes if block_format.scale_first else 0
    words = np.ascontiguousarray(blocks[..., first : first + 4 * block_format.words]).view(np.uint32)
    np.testing.assert_array_equal(weight.words, words.transpose(0, 2, 3, 1))
    if block_format.scale_bytes:
        scales = np.ascontiguousarray(blocks[..., : block_format.scale_bytes]).view(block_format.scale_dtype)
        np.testing.assert_array_equal(weight.scales, scales[..., 0].transpose(0, 2, 1))
