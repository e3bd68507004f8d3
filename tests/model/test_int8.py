"""int8 weights: rounding, values stored as int8, and the product in the kernel and in XLA."""

from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from model import linear
from model.kernels import cpu
from model.kernels.dispatch import Kernels, load_kernels
from model.layout import GROUP_SIZE
from model.linear import matmul, take_rows
from model.weights.checkpoint import ModelLoadError
from model.weights.rows import Int8Array, Int8Rows, Rows, quantize
from model.weights.source import resolve_model
from model.weights.weight_table import load_weights, open_checkpoint
from tests.support.packed import pack, pack_int8
from tests.support.tiny_checkpoints import BF16, TinyModel, gguf_name

UP = "model.layers.1.mlp.up_proj.weight"
SHAPES = [
    (1, 32, 2),
    (2, 1, 1),
    (3, 33, 31),
    (12, 64, 256),
    (13, 100, 257),
    (25, 31, 515),
    (64, 576, 96),
    (257, 40, 90),
]

product = jax.jit(matmul, static_argnums=2)


def values_of(array: Int8Array) -> NDArray[np.float32]:
    """The float32 values [N, K] of an int8 matrix."""
    scales = np.repeat(array.scales.astype(np.float32), GROUP_SIZE, axis=1)[:, : array.values.shape[1]]
    with np.errstate(invalid="ignore"):
        return array.values.astype(np.float32) * scales


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def packed(seed: int, n: int, k: int) -> tuple[cpu.PackedInt8, NDArray[np.float32]]:
    """A packed weight and its values [n, k]."""
    array = quantize(normal(seed, n, k))
    return pack_int8(array), values_of(array)


def load(path: Path) -> dict[str, NDArray[Any]]:
    """All weights: matrices as the float32 values of their int8 form."""
    with closing(open_checkpoint(resolve_model(str(path), None))) as checkpoint:
        return load_weights(checkpoint, BF16, lambda _, rows: _values(rows), int8=True)


def _values(rows: Rows | Int8Rows) -> NDArray[Any]:
    return rows.read() if isinstance(rows, Rows) else np.concatenate([values_of(run) for run in rows.runs])


@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (7, 32), (3, 33), (64, 576)])
def test_quantize_rounds_to_the_nearest_step(shape: tuple[int, int]) -> None:
    matrix = normal(1, *shape) * np.exp(normal(2, shape[0], 1) * 3)
    array = quantize(matrix)
    steps = np.repeat(array.scales.astype(np.float32), GROUP_SIZE, axis=1)[:, : shape[1]]
    # Half a step, and more for the largest of a group: the scale is rounded to float16's eleven bits.
    limit = 0.5 * steps + np.abs(matrix) * 2.0**-11
    assert (np.abs(values_of(array) - matrix) <= limit).all()
    assert array.values.min() >= -127


def test_quantize_zeros_and_values_too_small_for_a_scale() -> None:
    matrix = np.zeros((2, 64), np.float32)
    matrix[0, 5], matrix[1, 40] = 1e-30, 2.0
    expected = np.zeros_like(matrix)
    expected[1, 40] = 127 * np.float32(np.float16(2 / 127))
    np.testing.assert_array_equal(values_of(quantize(matrix)), expected)


@pytest.mark.parametrize("greatest", [7.7e-3, 1e-4, 3e-5, 1e-5, 8e-6])
def test_quantize_groups_with_subnormal_scales(greatest: float) -> None:
    matrix = normal(17, 64, 320)
    matrix *= greatest / np.abs(matrix).max()
    array = quantize(matrix)
    steps = np.repeat(array.scales.astype(np.float32), GROUP_SIZE, axis=1)
    assert (np.abs(values_of(array) - matrix) <= 0.501 * np.maximum(steps, 2.0**-24)).all()


def test_quantize_large_matrix_in_batches_of_rows() -> None:
    matrix = normal(18, 3000, 600)  # more than is rounded at once
    array, last = quantize(matrix), quantize(matrix[-1:])
    np.testing.assert_array_equal(array.values[-1:], last.values)
    np.testing.assert_array_equal(array.scales[-1:], last.scales)
    narrow = matrix.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(values_of(quantize(narrow)), values_of(quantize(narrow.astype(np.float32))))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_load_weights_keeps_q8_0(tmp_path: Path, family: str, tied: bool) -> None:
    tiny = TinyModel(family, tied)
    got = load(tiny.write_gguf(tmp_path / "a.gguf", "Q8_0"))
    expected = tiny.rounded("Q8_0").expected()
    assert got.keys() == expected.keys()
    for path, values in expected.items():
        np.testing.assert_array_equal(got[path], values, err_msg=path)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_1"])
def test_load_weights_rounds_other_types_once(tmp_path: Path, kind: str) -> None:
    tiny = TinyModel()
    got = load(tiny.write_gguf(tmp_path / "a.gguf", kind))
    for path, values in tiny.rounded(kind).expected().items():
        np.testing.assert_array_equal(got[path], values_of(quantize(values)) if values.ndim == 2 else values, path)


def test_load_weights_is_the_same_from_both_formats(tmp_path: Path) -> None:
    tiny = TinyModel("qwen2", tied=False)
    from_gguf = load(tiny.write_gguf(tmp_path / "a.gguf"))
    for path, values in load(tiny.write_hf(tmp_path / "hf")).items():
        np.testing.assert_array_equal(values, from_gguf[path], err_msg=path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
def test_load_weights_rejects_values_too_large_for_int8(tmp_path: Path, bad: float) -> None:
    tiny = TinyModel()
    tiny.tensors[UP].flat[-1] = bad
    with pytest.raises(ModelLoadError, match=rf"{UP}: holds values that are not finite, or too large for int8"):
        load(tiny.write_hf(tmp_path / "hf"))


def test_load_weights_rejects_a_damaged_scale_of_q8_0(tmp_path: Path) -> None:
    tiny, name = TinyModel(), gguf_name(UP)
    blocks = gguf.quants.quantize(tiny.tensors.pop(UP), gguf.GGMLQuantizationType.Q8_0)
    blocks[3, :2] = np.array([np.nan], "<f2").view(np.uint8)
    path = tiny.write_gguf(tmp_path / "a.gguf", "Q8_0", raw={name: (blocks, "Q8_0")})
    with pytest.raises(ModelLoadError, match=rf"{name}: holds values that are not finite"):
        load(path)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_pack_int8_keeps_every_value_and_pads_with_zeros(m: int, n: int, k: int) -> None:
    weight, values = packed(m, n, k)
    assert weight.data.shape == (-(-n // 32), -(-k // 32) * 32, 32)
    assert weight.scales.shape == (-(-n // 32), -(-k // 32), 32)
    np.testing.assert_array_equal(cpu.unpack_rows(weight, jnp.arange(n)), values)
    assert np.count_nonzero(weight.data) == np.count_nonzero(values)
    rows = jnp.asarray([n - 1, 0, n - 1], jnp.int32)
    np.testing.assert_array_equal(take_rows(weight, rows), values[np.asarray(rows)])


@pytest.mark.parametrize("form", ["kernels", "XLA"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matmul_is_within_float32_rounding(m: int, n: int, k: int, form: str) -> None:
    kernels = load_kernels() if form == "kernels" else Kernels()
    if form == "kernels" and kernels.cpu is None:
        pytest.skip("no kernels here")
    x = jnp.asarray(normal(3, m, k), jnp.bfloat16)
    weight, values = packed(4, n, k)
    y = np.asarray(matmul(x, weight, kernels))
    x64, w64 = np.asarray(x, np.float64), values.astype(np.float64)
    bound = k * 2.0**-24 * (np.abs(x64) @ np.abs(w64).T)
    assert (np.abs(y - x64 @ w64.T) <= bound).all()


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 64), (3, 2048, 33), (5, 2100, 96), (2, 4097, 64)])
def test_matmul_on_an_accelerator_unpacks_blocks(m: int, n: int, k: int, kind: str) -> None:
    """The implementation for accelerators, run on this CPU."""
    weight, values = packed(3, n, k)
    if kind == "bfloat16":
        values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    chosen: cpu.Packed = weight if kind == "int8" else pack(values)
    x = normal(4, m, k).astype(ml_dtypes.bfloat16)
    y = jax.jit(linear._by_blocks)(x, chosen, jnp.int32(m))
    np.testing.assert_allclose(y, x.astype(np.float64) @ values.T.astype(np.float64), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("n", "k"), [(576, 576), (1536, 576), (960, 576), (576, 1536), (1152, 896), (896, 4864)])
def test_matmul_without_kernels_has_the_same_bits_in_every_batch(n: int, k: int) -> None:
    """In the shapes of real models: XLA's products of other shapes (96 columns) can differ, with any weights."""
    x, (weight, _) = jnp.asarray(normal(15, 64, k)), packed(16, n, k)
    full = np.asarray(product(x, weight, Kernels()))
    for m in (1, 2, 3, 8, 16):
        np.testing.assert_array_equal(product(x[:m], weight, Kernels()), full[:m], err_msg=f"{m} rows")


@pytest.mark.usefixtures("kernels")
def test_linear_sums_in_ascending_order_by_fused_multiply_adds() -> None:
    x, (weight, values) = jnp.asarray(normal(5, 13, 257), jnp.bfloat16), packed(6, 70, 257)
    x64, w64, y = np.asarray(x, np.float64), values.astype(np.float64), np.zeros((13, 70), np.float32)
    for i in range(257):
        # A product of 8 by 19 bits is exact; a sum that float64 rounds first could differ, which chance spares here.
        y = (y + x64[:, i, None] * w64[:, i]).astype(np.float32)
    np.testing.assert_array_equal(cpu.linear(x, weight), y)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.usefixtures("kernels")
def test_linear_has_the_same_bits_in_every_batch(dtype: Any) -> None:
    x, (weight, _) = jnp.asarray(normal(7, 257, 577), jnp.bfloat16), packed(8, 1000, 577)
    full = np.asarray(cpu.linear(x, weight, dtype=dtype))
    for m in (1, 2, 3, 11, 12, 13, 16, 64):
        for first in (0, 257 - m):
            part = np.asarray(cpu.linear(x[first : first + m], weight, dtype=dtype))
            np.testing.assert_array_equal(part, full[first : first + m], err_msg=f"{m} rows from {first}")


@pytest.mark.parametrize("live", [-1, 0, 1, 12, 13, 64, 65])
@pytest.mark.usefixtures("kernels")
def test_linear_padding_rows_are_zeros_and_change_no_other(live: int) -> None:
    x, (weight, _) = jnp.asarray(normal(9, 64, 70), jnp.bfloat16), packed(10, 100, 70)
    full, count = np.asarray(cpu.linear(x, weight)), min(max(live, 0), 64)
    some = np.asarray(cpu.linear(x.at[count:].set(jnp.nan), weight, live=jnp.int32(live)))
    np.testing.assert_array_equal(some[:count], full[:count])
    assert not some[count:].any()


@pytest.mark.parametrize(("rows", "width", "vocab"), [(1, 5, 7), (13, 64, 1024), (64, 96, 3001)])
@pytest.mark.usefixtures("kernels")
def test_score_has_the_bits_of_token_logprobs(rows: int, width: int, vocab: int) -> None:
    hidden, (weight, _) = jnp.asarray(normal(11, rows, width), jnp.bfloat16), packed(12, vocab, width)
    ids = jnp.arange(rows, dtype=jnp.int32) % vocab
    named, live = jnp.zeros((rows, 2), jnp.int32), jnp.int32(rows)
    expected = cpu.token_logprobs(cpu.linear(hidden, weight), ids, named, live, k=5)
    result = cpu.score(hidden, weight, ids, named, live, k=5)
    for mine, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()


@pytest.mark.usefixtures("kernels")
def test_linear_rejects_another_dtype_or_shape() -> None:
    weight, _ = packed(13, 40, 64)
    with pytest.raises(TypeError, match="float32, not bfloat16"):
        cpu.linear(jnp.zeros((1, 64)), weight)
    with pytest.raises(ValueError, match=r"\(1, 65\), not \[M, 64\]"):
        cpu.linear(jnp.zeros((1, 65), jnp.bfloat16), weight)
    torn = cpu.PackedInt8(weight.data, weight.scales[:, :1], weight.n, weight.k)
    with pytest.raises(jax.errors.JaxRuntimeError, match="linear takes"):
        jax.block_until_ready(cpu.linear(jnp.zeros((1, 64), jnp.bfloat16), torn))


def test_matmul_lowers_for_every_platform() -> None:
    """Programs for other platforms have no call of our kernels."""
    x, (weight, _) = jnp.zeros((4, 64), jnp.bfloat16), packed(14, 64, 64)
    for platform in ("tpu", "cuda"):
        text = product.trace(x, weight, load_kernels()).lower(lowering_platforms=(platform,)).as_text()
        assert "logprobd" not in text
        assert "HIGHEST" in text  # of float32 operands, which other platforms would round
    if load_kernels().cpu is not None:
        assert (
            "logprobd_linear_int8"
            in product.trace(x, weight, load_kernels()).lower(lowering_platforms=("cpu",)).as_text()
        )
