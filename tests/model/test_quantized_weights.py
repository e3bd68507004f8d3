"""Weights in block formats: kept as stored, rounded at load, refused if damaged, sharded, and counted."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from compiled.shapes import Buckets
from model.config import ConfigError, ModelConfig
from model.formats import FLOATS, FORMATS, WIDER_FORMATS
from model.kernels.dispatch import Kernels, load_kernels
from model.packed import PackedWeight, StackedWeight
from model.sharding import TensorParallel
from model.weights import loader
from model.weights.checkpoint import ModelLoadError
from model.weights.loader import load_model, stored_weights
from model.weights.rows import Arena, BlockRows, Rows, quantized
from model.weights.source import ModelSource
from model.weights.weight_table import Storage, load_weights, open_checkpoint
from serve.engine.request import PromptScoring, SamplingParams
from tests.support.in_process import run
from tests.support.packed import IN_GGUF, random_blocks, values_of
from tests.support.runners import make_runner
from tests.support.tiny_checkpoints import BF16, F32, TinyModel, gguf_name

UP = "model.layers.1.mlp.up_proj.weight"
QKV = "layers.0.attention.qkv.weight"
BY_32 = tuple(name for name in IN_GGUF if FORMATS[name].block == 32 and name != "IQ4_NL")
OURS = ("Q4_K", "Q5_K", "Q6_K")  # blocks of 256 that we can round to
BUCKETS = Buckets(decode_rows=(1,), prefill_chunks=(16,), score_rows=16, pages_per_row=2)
INT8 = Storage(BF16, "Q8_0")


def load(path: Path, storage: Storage) -> dict[str, tuple[tuple[str, ...], NDArray[Any]]]:
    """Formats and values of all weights; no formats: a plain array."""
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        return load_weights(checkpoint, storage, lambda _, rows: read(rows))


def read(rows: Rows | Sequence[BlockRows]) -> tuple[tuple[str, ...], NDArray[Any]]:
    if isinstance(rows, Rows):
        return (), rows.read()
    with np.errstate(all="ignore"):  # the loader refuses what is not finite
        values = [values_of(part.format.name, np.concatenate(list(part.runs)), part.shape[1]) for part in rows]
    return tuple(part.format.name for part in rows), np.concatenate(values)


def check(path: Path, storage: Storage, formats: tuple[str, ...], expected: dict[str, NDArray[Any]]) -> None:
    """The formats of all matrices, and all values."""
    found = load(path, storage)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name][0] == (formats if values.ndim == 2 else ()), name
        np.testing.assert_array_equal(found[name][1], values, err_msg=name)


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def rounded(matrix: NDArray[Any], name: str = "Q8_0") -> NDArray[np.float32]:
    return values_of(name, quantized(matrix, FORMATS[name]), matrix.shape[1])


def steps_of(matrix: NDArray[Any]) -> NDArray[np.float32]:
    """The step of each value of a matrix in Q8_0."""
    blocks = quantized(matrix, FORMATS["Q8_0"]).reshape(len(matrix), -1, 34)
    scales = blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
    return np.repeat(scales, 32, axis=1)[:, : matrix.shape[1]]


@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (7, 32), (3, 33), (64, 576)])
def test_q8_0_rounds_to_the_nearest_step(shape: tuple[int, int]) -> None:
    matrix = normal(1, *shape) * np.exp(normal(2, shape[0], 1) * 3)
    # Half a step, and more for the largest of a block: the scale is rounded to float16's eleven bits.
    limit = 0.5 * steps_of(matrix) + np.abs(matrix) * 2.0**-11
    assert (np.abs(rounded(matrix) - matrix) <= limit).all()
    blocks = quantized(matrix, FORMATS["Q8_0"]).reshape(-1, 34)
    assert blocks[:, 2:].view(np.int8).min() >= -127


def test_q8_0_of_zeros_and_values_too_small_for_a_scale() -> None:
    matrix = np.zeros((2, 64), np.float32)
    matrix[0, 5], matrix[1, 40] = 1e-30, 2.0
    expected = np.zeros_like(matrix)
    expected[1, 40] = 127 * np.float32(np.float16(2 / 127))
    np.testing.assert_array_equal(rounded(matrix), expected)


@pytest.mark.parametrize("greatest", [7.7e-3, 1e-4, 3e-5, 1e-5, 8e-6])
def test_q8_0_of_blocks_with_subnormal_scales(greatest: float) -> None:
    matrix = normal(17, 64, 320)
    matrix *= greatest / np.abs(matrix).max()
    assert (np.abs(rounded(matrix) - matrix) <= 0.501 * np.maximum(steps_of(matrix), 2.0**-24)).all()


def test_q8_0_of_a_large_matrix_in_batches_of_rows() -> None:
    matrix = normal(18, 3000, 600)  # more than is rounded at once
    q8_0 = FORMATS["Q8_0"]
    np.testing.assert_array_equal(quantized(matrix, q8_0)[-1:], quantized(matrix[-1:], q8_0))
    narrow = matrix.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(rounded(narrow), rounded(narrow.astype(np.float32)))


@pytest.mark.parametrize("name", [*BY_32, *OURS])
def test_rows_that_end_inside_a_block_are_padded_with_zeros(name: str) -> None:
    matrix = normal(3, 5, 300)
    padded = np.pad(matrix, ((0, 0), (0, -300 % FORMATS[name].block)))
    np.testing.assert_array_equal(quantized(matrix, FORMATS[name]), quantized(padded, FORMATS[name]))
    assert np.abs(rounded(matrix, name) - matrix).mean() < 0.2


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("storage", [Storage(F32), Storage(F32, packs=True), Storage(BF16), INT8])
def test_q8_0_is_kept(tmp_path: Path, family: str, tied: bool, storage: Storage) -> None:
    tiny = TinyModel(family, tied)
    check(tiny.write_gguf(tmp_path / "a.gguf", "Q8_0"), storage, ("Q8_0",), tiny.rounded("Q8_0").expected())


@pytest.mark.parametrize("kind", [*BY_32, *OURS])
def test_block_formats_are_kept(tmp_path: Path, kind: str) -> None:
    tiny = TinyModel(width=8 if kind in OURS else 1)
    path = tiny.write_gguf(tmp_path / "a.gguf", kind)
    check(path, Storage(F32), (kind,), tiny.rounded(kind).expected())
    check(path, Storage(F32, kind.upper()), (kind,), tiny.rounded(kind).expected())


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_1", "Q4_0"])
def test_none_gives_the_models_dtype(tmp_path: Path, kind: str) -> None:
    """As it was before block formats were kept: packed for kernels in bfloat16, and in float32 without loss."""
    tiny = TinyModel()
    path, values = tiny.write_gguf(tmp_path / "a.gguf", kind), tiny.rounded(kind)
    check(path, Storage(BF16, "none"), (), values.expected(BF16))
    check(path, Storage(BF16, "none", packs=True), ("BF16",), values.expected(BF16))
    check(path, Storage(F32, "none"), (), values.expected())
    float_format = kind if kind in FLOATS else "F32"
    check(path, Storage(F32, "none", packs=True), (float_format,), values.expected())
    if kind in FLOATS:  # nor are they quantized by themselves
        check(path, Storage(BF16, packs=True), ("BF16",), values.expected(BF16))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_1"])
@pytest.mark.parametrize("target", ["Q8_0", "Q4_0", "MXFP4"])
def test_other_formats_are_rounded_once(tmp_path: Path, kind: str, target: str) -> None:
    tiny = TinyModel()
    expected = {
        path: rounded(values, target) if values.ndim == 2 else values
        for path, values in tiny.rounded(kind).expected().items()
    }
    check(tiny.write_gguf(tmp_path / "a.gguf", kind), Storage(F32, target), (target,), expected)


@pytest.mark.parametrize("target", ["Q8_0", "Q5_1", "Q6_K"])
def test_rounding_is_the_same_from_both_file_formats(tmp_path: Path, target: str) -> None:
    tiny = TinyModel("qwen2", tied=False)
    from_gguf = load(tiny.write_gguf(tmp_path / "a.gguf"), Storage(F32, target))
    for path, (formats, values) in load(tiny.write_hf(tmp_path / "hf"), Storage(F32, target)).items():
        assert formats == from_gguf[path][0]
        np.testing.assert_array_equal(values, from_gguf[path][1], err_msg=path)


GATE_UP = "layers.1.mlp.gate_up.weight"


def with_random_blocks(path: Path, kind: str, scales: NDArray[np.float16]) -> tuple[Path, NDArray[np.float32]]:
    """A file in Q4_K with random blocks of another format as UP, and the values of that tensor."""
    tiny, qtype = TinyModel(width=8), gguf.GGMLQuantizationType[kind]
    n, k = tiny.tensors.pop(UP).shape
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    blocks = np.random.default_rng(1).integers(0, 256, (n, k // block, size), np.uint8)
    place = size - 2 if kind.startswith("TQ") else 0
    blocks[..., place : place + 2] = np.resize(scales, (*blocks.shape[:2], 1)).view(np.uint8)
    raw = blocks.reshape(n, -1)
    tiny.write_gguf(path, "Q4_K", raw={gguf_name(UP): (raw, kind)})
    with np.errstate(all="ignore"):
        return path, gguf.quants.dequantize(raw, qtype)


@pytest.mark.parametrize("kind", ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"])
def test_formats_that_no_packed_one_holds_become_float32(tmp_path: Path, kind: str) -> None:
    path, values = with_random_blocks(tmp_path / "a.gguf", kind, np.array([0.125], np.float16))
    for found in (load(path, Storage(F32)), load(path, Storage(F32, packs=True))):
        assert found[GATE_UP][0] == ("Q4_K", "F32")
        np.testing.assert_array_equal(found[GATE_UP][1][-len(values) :], values)
    assert load(path, Storage(F32, stacks=False))[GATE_UP][0] == ("F32",)


@pytest.mark.parametrize(("kind", "wider"), WIDER_FORMATS.items())
def test_formats_without_kernels_are_kept_in_a_wider_one_to_the_bit(tmp_path: Path, kind: str, wider: str) -> None:
    """The smallest and subnormal scales, negative ones, and the largest of which Q5_K has 8 times as much."""
    numbers = np.random.default_rng(2).standard_normal(97) * 10.0 ** np.random.default_rng(3).integers(-8, 4, 97)
    scales = np.concatenate([numbers, [0, 2.0**-24, 3 * 2.0**-24, -(2.0**-24), 8188]]).astype(np.float16)
    path, values = with_random_blocks(tmp_path / "a.gguf", kind, scales)
    found = load(path, Storage(F32))[GATE_UP]
    assert found[0] == ("Q4_K", wider)
    got = found[1][-len(values) :]
    np.testing.assert_array_equal(got, values)
    assert got[got != 0].tobytes() == values[values != 0].tobytes()  # zeros may differ in sign
    assert load(path, Storage(F32, "none"))[GATE_UP][0] == ()
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        assert stored_weights(checkpoint, Storage(F32)).matrices[wider] == values.size
    for bad in (np.nan, np.inf):
        damaged, _ = with_random_blocks(tmp_path / "b.gguf", kind, np.append(scales, np.float16(bad)))
        with pytest.raises(ModelLoadError, match=rf"  {gguf_name(UP)}: holds scales that are not finite, or "):
            load(damaged, Storage(F32))


def test_scales_too_large_for_the_wider_format_are_refused(tmp_path: Path) -> None:
    path, _ = with_random_blocks(tmp_path / "a.gguf", "IQ3_S", np.array([1, 8192], np.float16))
    with pytest.raises(ModelLoadError, match=rf"  {gguf_name(UP)}: .* values too large for Q5_K$"):
        load(path, Storage(F32))


@pytest.mark.parametrize(
    ("target", "bad", "problem"),
    [
        *(("Q8_0", bad, "scales that are not finite, or values too large for Q8_0") for bad in (np.nan, np.inf, 1e9)),
        ("Q4_K", np.nan, "values that are not finite"),
        ("Q5_0", np.inf, "values that are not finite"),
        ("Q6_K", 1e9, "values that are too large for float16 scales"),
    ],
)
def test_values_too_large_for_the_format_are_refused(tmp_path: Path, target: str, bad: float, problem: str) -> None:
    tiny = TinyModel()
    tiny.tensors[UP].flat[-1] = bad
    with pytest.raises(ModelLoadError, match=rf"1 problem with the weights\n  {UP}: holds {problem}$"):
        load(tiny.write_hf(tmp_path / "hf"), Storage(F32, target))


@pytest.mark.parametrize("kind", IN_GGUF)
def test_damaged_scales_are_refused(tmp_path: Path, kind: str) -> None:
    tiny, name, block_format = TinyModel(width=8), gguf_name(UP), FORMATS[kind]
    n, k = tiny.tensors.pop(UP).shape
    good = random_blocks(kind, n, k)
    tiny.write_gguf(tmp_path / "a.gguf", "Q8_0", raw={name: (good, kind)})
    load(tmp_path / "a.gguf", Storage(F32))
    bad_bytes = [np.array([bad], "<f2").view(np.uint8) for bad in (np.nan, np.inf, -np.inf)]
    places = [(start, values) for start in block_format.float16_at for values in bad_bytes]
    places += [(0, np.array([250], np.uint8))] if kind == "MXFP4" else []
    assert places
    for place, values in places:
        blocks = good.copy()
        last = blocks.shape[1] - block_format.block_bytes + place
        blocks[-3, last : last + len(values)] = values
        path = tiny.write_gguf(tmp_path / "b.gguf", "Q8_0", raw={name: (blocks, kind)})
        with pytest.raises(ModelLoadError, match=rf"  {name}: holds scales that are not finite, or .* for {kind}$"):
            load(path, Storage(F32))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyModel]:
    """A file with q and k in Q4_K and v in Q6_K, and its values."""
    tiny, kinds = TinyModel(width=8), {"v_proj": "Q6_K", "down_proj": "Q5_K"}
    for values in tiny.tensors.values():
        if values.ndim == 2:
            values /= np.sqrt(values.shape[1])  # as of a trained model
    path = tiny.write_gguf(tmp_path_factory.mktemp("mixed") / "a.gguf", "Q4_K", kinds=kinds)
    copy = tiny.rounded("Q4_K", kinds)
    return path, copy


def test_formats_of_stacked_tensors_differ(mixed: tuple[Path, TinyModel]) -> None:
    path, values = mixed
    found = load(path, Storage(F32))
    assert found[QKV][0] == ("Q4_K", "Q6_K")  # q and k are one part
    assert found["layers.0.mlp.gate_up.weight"][0] == ("Q4_K",)
    for name, expected in values.expected().items():
        np.testing.assert_array_equal(found[name][1], expected, err_msg=name)
    assert load(path, Storage(F32, stacks=False))[QKV][0] == ("F32",)
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        stored = load_weights(checkpoint, Storage(F32), lambda _, rows: loader._put(rows, Arena()))
    assert isinstance(stored[QKV], StackedWeight)
    assert [(part.n, part.format.name) for part in stored[QKV].parts] == [(768, "Q4_K"), (256, "Q6_K")]
    assert isinstance(stored["layers.0.mlp.down.weight"], PackedWeight)


@pytest.mark.usefixtures("kernels")
def test_logprobs_of_mixed_formats_are_those_of_their_values(mixed: tuple[Path, TinyModel], tmp_path: Path) -> None:
    path, values = mixed
    request = {"mine": ([1, 5, 17, 40, 3, 9, 22], SamplingParams(8, temperature=0, prompt=PromptScoring()))}
    answers = [
        run(make_runner(file, "float32", BUCKETS), request)["mine"]
        for file in (path, values.write_gguf(tmp_path / "dequantized.gguf"))
    ]
    packed, plain = answers
    assert packed.token_ids == plain.token_ids
    assert packed.prompt is not None
    assert plain.prompt is not None
    np.testing.assert_allclose(packed.prompt.logprob, plain.prompt.logprob, rtol=0, atol=1e-5)
    assert packed.ranks == plain.ranks
    np.testing.assert_allclose(packed.logprobs, plain.logprobs, rtol=0, atol=1e-5)
    assert np.ptp(plain.prompt.logprob) > 0.1


def sharded(rows: Rows | Sequence[BlockRows], config: ModelConfig, path: str, shards: int = 2) -> Any:
    indices = TensorParallel(config, shards).weight_indices(config.weights()[path])
    return loader._shard_rows(rows, indices), indices


@pytest.mark.parametrize(
    ("kind", "width", "shards"),
    [
        *(("Q4_0", 2, 2), ("Q5_1", 2, 2), ("MXFP4", 2, 2), ("Q4_K", 8, 2), ("Q6_K", 8, 2)),
        *(("BF16", 1, 4), ("F16", 1, 4), ("F32", 1, 4)),  # 16 columns of `out` each, less than a block
    ],
)
def test_shards_have_their_blocks(tmp_path: Path, kind: str, width: int, shards: int) -> None:
    tiny = TinyModel("qwen2", tied=False, width=width)
    expected = tiny.rounded(kind).expected()
    path = tiny.write_gguf(tmp_path / "a.gguf", kind, kinds={"down_proj": "Q8_0"} if width > 1 else {})
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        config = checkpoint.config
        storage = Storage(F32, packs=True, stacks=False)
        weights = load_weights(
            checkpoint,
            storage,
            lambda path, rows: sharded(rows, config, path, shards),
        )
    for name in (QKV, "layers.1.attention.out.weight", "layers.0.mlp.gate_up.weight", "head.weight"):
        parts, (rows, columns) = weights[name]
        for part, own_rows, own_columns in zip(parts, rows, columns, strict=True):
            formats, values = read(part)
            assert formats == (kind,)
            whole = expected[name][np.ix_(own_rows.clip(0), own_columns.clip(0))]
            np.testing.assert_array_equal(values, np.where(own_rows[:, None] < 0, 0, whole), err_msg=name)


@pytest.mark.parametrize(("shards", "local"), [(2, 512), (3, 256), (4, 256)])
def test_shards_of_the_mlp_are_padded_to_full_blocks(tmp_path: Path, shards: int, local: int) -> None:
    """768 columns of the down projection; with 4 shards the last one holds only padding."""
    tiny = TinyModel(width=8)
    path, expected = tiny.write_gguf(tmp_path / "a.gguf", "Q4_K"), tiny.rounded("Q4_K").expected()
    storage = Storage(F32, stacks=False)
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        config = loader._sharded(checkpoint, storage)
        assert TensorParallel(config, shards).local.intermediate_size == local
        assert TensorParallel(checkpoint.config, 1).local.intermediate_size == 768

        def parts_of(path: str, rows: Any) -> Any:
            return sharded(rows, config, path, shards) if ".mlp." in path else read(rows)

        weights = load_weights(checkpoint, storage, parts_of)
    for name in ("layers.1.mlp.down.weight", "layers.0.mlp.gate_up.weight"):
        parts, (own_rows, own_columns) = weights[name]
        for part, rows, columns in zip(parts, own_rows, own_columns, strict=True):
            whole = expected[name][np.ix_(rows.clip(0), columns.clip(0))]
            is_padding = (rows[:, None] < 0) | (columns < 0)
            np.testing.assert_array_equal(read(part)[1], np.where(is_padding, 0, whole), err_msg=name)


def test_shards_that_split_a_block_are_refused(tmp_path: Path) -> None:
    """Of the output projection, 128 of whose 512 columns are of the heads of one of four shards."""
    path = TinyModel(width=8).write_gguf(tmp_path / "a.gguf", "Q4_K")
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        config = checkpoint.config
        message = "Q4_K with tensor parallelism needs shards of a multiple of 256 columns"
        with pytest.raises(ConfigError, match=message):
            load_weights(
                checkpoint,
                Storage(F32, stacks=False),
                lambda path, rows: sharded(rows, config, path, 4),
            )


@pytest.mark.parametrize(
    ("columns", "splits"),
    [
        ([*range(256)], False),
        ([*range(256, 512), *[-1] * 256], False),
        ([*range(512, 600), *[-1] * 168], False),  # the end of K
        ([*range(256, 448), *[-1] * 64], True),  # a padded head, whose weights are in the block
        ([*range(128), *range(256, 384)], True),
        ([*range(128, 384)], True),
        ([*range(384)], True),
    ],
)
def test_shards_of_full_blocks(columns: list[int], splits: bool) -> None:
    rows = BlockRows((1, 600), FORMATS["Q4_K"], iter(()))
    indices = np.array([columns])
    if splits:
        with pytest.raises(ConfigError, match="a multiple of 256 columns"):
            loader._byte_indices(indices, rows)
        return
    expected = [i // 256 * 144 + byte if i >= 0 else -1 for i in columns[::256] for byte in range(144)]
    np.testing.assert_array_equal(loader._byte_indices(indices, rows)[0], expected)


@pytest.mark.parametrize(
    ("kind", "width", "storage"),
    [
        ("Q4_K", 8, Storage(F32)),
        ("Q4_K", 8, Storage(F32, packs=True)),
        ("Q4_1", 1, Storage(F32)),
        ("Q4_1", 1, Storage(F32, "none")),
        ("Q4_1", 1, Storage(BF16, "none", packs=True)),
        ("F16", 1, Storage(F32, packs=True)),
        ("F32", 1, INT8),
        ("F32", 1, Storage(F32, "Q6_K")),  # rows of 64 take a whole block
    ],
)
def test_stored_weights_are_those_of_the_loaded_model(tmp_path: Path, kind: str, width: int, storage: Storage) -> None:
    path = TinyModel("qwen2", tied=False, width=width).write_gguf(tmp_path / "a.gguf", kind, kinds={"v_proj": "F32"})
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        stored = stored_weights(checkpoint, storage)
        weights = load_weights(checkpoint, storage, lambda _, rows: loader._put(rows, Arena()))
    total, matrices, elements = 0, 0, 0
    for weight in weights.values():
        for part in weight.parts if isinstance(weight, StackedWeight) else [weight]:
            size = part.format.nbytes(part.n, part.k) if isinstance(part, PackedWeight) else part.nbytes
            if isinstance(part, PackedWeight):
                padded = part.format.nbytes(-(-part.n // 32) * 32, part.k)
                assert sum(leaf.nbytes for leaf in jax.tree.leaves(part)) == padded
            total += size
            if isinstance(part, PackedWeight) or part.ndim == 2:
                matrices += size
                elements += part.n * part.k if isinstance(part, PackedWeight) else part.size
    assert stored.nbytes == total
    assert sum(stored.matrices.values()) == elements
    assert stored.bits_per_weight == pytest.approx(8 * matrices / elements)
    [values_in] = [form for form, names in stored.tensors.items() if "blk.1.attn_v.weight" in names]
    float_format = "BF16" if storage.dtype == BF16 else "F32"
    assert values_in == (storage.quantization if storage.quantization in FORMATS else float_format, "F32")
    assert sum(map(len, stored.tensors.values())) == 2 + 7 * 2


def test_a_block_format_needs_no_kernels(mixed: tuple[Path, TinyModel]) -> None:
    """XLA would unpack blocks in each call, so a CPU without kernels has plain arrays unless a format is asked for."""
    path, _ = mixed
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        plain = load_model(checkpoint, "float32", kernels=Kernels())
        rounded = load_model(checkpoint, "float32", quantization="Q8_0", kernels=Kernels())
        packed = load_model(checkpoint, "float32", kernels=load_kernels())
    assert {leaf.dtype.name for leaf in plain.leaves} == {"float32"}
    assert "uint32" in {leaf.dtype.name for leaf in rounded.leaves} & {leaf.dtype.name for leaf in packed.leaves}
