"""Arrays by path from a checkpoint, or one complete list of problems."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from model.families import FAMILIES
from model.transformer import abstract_weights
from model.weights.checkpoint import ModelLoadError
from model.weights.gguf import GgufCheckpoint
from model.weights.gguf_header import read_header
from model.weights.rows import Rows
from model.weights.safetensors import SafetensorsCheckpoint
from model.weights.source import default_model_path, resolve_model
from model.weights.weight_table import Storage, load_weights, open_checkpoint
from tests.support.tiny_checkpoints import BF16, F32, LAYERS, Tensors, TinyModel, gguf_name

UP = "model.layers.1.mlp.up_proj.weight"
KEY = "model.layers.0.self_attn.k_proj.weight"
NORM = "model.norm.weight"


def keep(_: str, rows: Rows) -> NDArray[Any]:
    return rows.read()


def load(path: Path, dtype: np.dtype[Any] = F32) -> Tensors:
    with closing(open_checkpoint(resolve_model(str(path), None))) as checkpoint:
        return load_weights(checkpoint, Storage(dtype, "none"), keep)


def problems(path: Path, dtype: np.dtype[Any] = F32) -> list[str]:
    """The lines of the loading error, without the first."""
    with pytest.raises(ModelLoadError) as caught:
        load(path, dtype)
    first, *rest = str(caught.value).split("\n")
    count = "1 problem" if len(rest) == 1 else f"{len(rest)} problems"
    assert first == f"{path}: {count} with the weights"
    return [line.removeprefix("  ") for line in rest]


def rewrite(folder: Path, change: dict[str, Any]) -> Path:
    """Replace tensors of model.safetensors; None removes one."""
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: values for name, values in tensors.items() if values is not None}, folder / "model.safetensors")
    return folder


def assert_same(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    for path, values in expected.items():
        assert got[path].dtype == values.dtype, path
        np.testing.assert_array_equal(got[path], values, err_msg=path)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False)])
def test_load_weights_is_the_same_from_both_formats(
    tmp_path: Path, family: str, tied: bool, dtype: np.dtype[Any]
) -> None:
    tiny = TinyModel(family, tied)
    expected = tiny.expected(dtype)
    assert_same(load(tiny.write_hf(tmp_path / "single"), dtype), expected)
    assert_same(load(tiny.write_hf(tmp_path / "sharded", shards=3), dtype), expected)
    assert_same(load(tiny.write_gguf(tmp_path / "a.gguf"), dtype), expected)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_load_weights_of_quantized_matrices(tmp_path: Path, kind: str) -> None:
    tiny = TinyModel("llama", tied=False)
    assert_same(load(tiny.write_gguf(tmp_path / "a.gguf", kind)), tiny.rounded(kind).expected())


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_load_weights_of_stored_bfloat16(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    tiny = TinyModel("qwen2")
    folder = tiny.write_hf(tmp_path, BF16, shards=2)
    for name, values in tiny.tensors.items():
        tiny.tensors[name] = values.astype(BF16).astype(np.float32)
    assert_same(load(folder, dtype), tiny.expected(dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False)])
def test_load_weights_gives_all_weights_of_the_transformer(
    tmp_path: Path, family: str, tied: bool, dtype: np.dtype[Any]
) -> None:
    folder = TinyModel(family, tied).write_hf(tmp_path)
    with closing(SafetensorsCheckpoint(folder)) as checkpoint:
        expected = abstract_weights(checkpoint.config, dtype)
    got = load(folder, dtype)
    assert {path: (array.shape, array.dtype) for path, array in got.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in expected.items()
    }


def test_load_weights_reorders_rotary_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No family has both; a Qwen2 with an interleaved file represents one."""
    tiny = TinyModel("qwen2")
    path = tiny.write_gguf(tmp_path / "a.gguf")
    monkeypatch.setitem(FAMILIES, "qwen2", replace(FAMILIES["qwen2"], gguf_interleaved_rotary=True))
    got = load(path)["layers.0.attention.qkv.bias"]
    stored = tiny.tensors["model.layers.0.self_attn.q_proj.bias"]
    np.testing.assert_array_equal(got[:16], np.concatenate([stored[0:16:2], stored[1:16:2]]))  # the first head
    values = tiny.tensors["model.layers.0.self_attn.v_proj.bias"]
    np.testing.assert_array_equal(got[-values.size :], values)


def test_load_weights_ignores_copies_and_known_leftovers(tmp_path: Path) -> None:
    tiny = TinyModel()
    extra: Tensors = {"lm_head.weight": np.zeros((1, 1), np.float64)}
    extra |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.zeros(8) for i in range(LAYERS)}
    assert_same(load(rewrite(tiny.write_hf(tmp_path), extra)), tiny.expected())


def test_load_weights_returns_what_put_returns(tmp_path: Path) -> None:
    tiny = TinyModel()
    paths: list[str] = []

    def put(path: str, rows: Rows) -> tuple[int, ...]:
        paths.append(path)
        assert rows.read().shape == rows.shape
        return rows.shape

    with closing(SafetensorsCheckpoint(tiny.write_hf(tmp_path))) as checkpoint:
        weights = load_weights(checkpoint, Storage(BF16), put)
    assert weights == {path: array.shape for path, array in tiny.expected().items()}
    assert paths == list(weights)


def test_load_weights_progress_counts_bytes(tmp_path: Path) -> None:
    tiny = TinyModel()
    seen: list[tuple[int, int]] = []
    with closing(SafetensorsCheckpoint(tiny.write_hf(tmp_path, BF16))) as checkpoint:
        load_weights(checkpoint, Storage(F32), keep, lambda done, total: seen.append((done, total)))
    total = 2 * sum(values.size for values in tiny.tensors.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert len(seen) == len(tiny.tensors)


def test_load_weights_lists_every_problem_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = rewrite(
        TinyModel().write_hf(tmp_path),
        {
            UP: None,
            NORM: np.zeros((3, 2), np.float32),
            KEY: np.zeros((32, 64), np.float64),
            "model.layers.9.mlp.up_proj.weight": np.zeros(1),
            "mystery": np.zeros(1),
        },
    )

    def read(*_: Any) -> NDArray[Any]:
        raise AssertionError("nothing may be read")

    monkeypatch.setattr(SafetensorsCheckpoint, "read", read)
    assert sorted(problems(folder)) == [
        "model.layers.0.self_attn.k_proj.weight: stored as F64, which is not supported",
        "model.layers.1.mlp.up_proj.weight: missing",
        "model.layers.9.mlp.up_proj.weight: unexpected",
        "model.norm.weight: has shape [3, 2], must be [64]",
        "mystery: unexpected",
    ]


def test_load_weights_problems_use_names_of_the_gguf_file(tmp_path: Path) -> None:
    tiny = TinyModel()
    del tiny.tensors[UP]
    tiny.tensors["model.embed_tokens.weight"] = np.zeros((48, 32), np.float32)
    block = np.zeros((64, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_1][1]), np.uint8)
    path = tiny.write_gguf(
        tmp_path / "a.gguf", raw={"mystery.weight": (block, "Q8_1"), "blk.1.ffn_up.weight": (block, "Q8_1")}
    )
    assert problems(path) == [
        "token_embd.weight: has shape [48, 32], must be [48, 64]",
        "blk.1.ffn_up.weight: has shape [64, 32], must be [96, 64]",
        "blk.1.ffn_up.weight: stored as Q8_1, which is not supported",
        "mystery.weight: unexpected",
    ]


def test_load_weights_rejects_a_missing_untied_head(tmp_path: Path) -> None:
    folder = rewrite(TinyModel(tied=False).write_hf(tmp_path), {"lm_head.weight": None})
    assert problems(folder) == ["lm_head.weight: missing"]


@pytest.mark.parametrize("stored", [F32, BF16, np.dtype(np.float16)])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_load_weights_rejects_values_that_are_not_finite(
    tmp_path: Path, stored: np.dtype[Any], dtype: np.dtype[Any], bad: float
) -> None:
    tiny = TinyModel()
    for name in (UP, KEY, NORM):
        tiny.tensors[name].flat[-1] = bad
    names = [KEY, UP, NORM]
    expected = [f"{name}: holds values that are not finite" for name in names]
    assert problems(tiny.write_hf(tmp_path, stored), dtype) == expected


def test_load_weights_rejects_values_beyond_the_dtype(tmp_path: Path) -> None:
    tiny = TinyModel()
    tiny.tensors[UP][0, 0] = np.finfo(np.float32).max
    folder = tiny.write_hf(tmp_path)
    assert_same(load(folder), tiny.expected())
    with pytest.raises(ModelLoadError, match=r"up_proj\.weight: holds values that are not finite"):
        load(folder, BF16)


def test_load_weights_keeps_the_largest_finite_values(tmp_path: Path) -> None:
    tiny = TinyModel()
    tiny.tensors[UP][0, :2] = [3.3895314e38, -3.3895314e38]
    assert_same(load(tiny.write_hf(tmp_path), BF16), tiny.expected(BF16))


def test_load_weights_rejects_a_damaged_scale_of_a_quantized_block(tmp_path: Path) -> None:
    path = TinyModel().write_gguf(tmp_path / "a.gguf", "Q4_1")
    data = bytearray(path.read_bytes())
    row = read_header(path).tensors["blk.0.attn_k.weight"]
    data[row.offset : row.offset + 2] = np.array([np.inf], "<f2").tobytes()
    path.write_bytes(data)
    assert problems(path) == ["blk.0.attn_k.weight: holds values that are not finite"]


def test_load_weights_lists_all_unreadable_tensors(tmp_path: Path) -> None:
    path = TinyModel().write_gguf(tmp_path / "a.gguf")
    put: list[str] = []

    def note(path: str, rows: Rows) -> None:
        rows.read()
        put.append(path)

    with closing(GgufCheckpoint(path)) as checkpoint:
        path.write_bytes(path.read_bytes()[: read_header(path).tensors[gguf_name(UP)].offset])
        with pytest.raises(ModelLoadError) as caught:
            load_weights(checkpoint, Storage(F32), note)
    lines = str(caught.value).split("\n")
    assert len(lines) > 2
    assert f"  {gguf_name(UP)}: cannot be read: the file has 0 of 24576 bytes" in lines
    assert "layers.1.mlp.gate_up.weight" not in put


def test_load_weights_of_the_default_model() -> None:
    weights = load(default_model_path(), BF16)
    assert len(weights) == 30 * 6 + 2
    assert weights["embed.weight"].shape == (49152, 576)
    assert weights["layers.29.attention.qkv.weight"].shape == (960, 576)
    # A trained norm is around one, a trained matrix around zero: the values are not noise.
    assert 0.5 < float(weights["norm.weight"].mean()) < 50
    assert 0.01 < float(weights["layers.0.mlp.down.weight"].astype(np.float32).std()) < 1
