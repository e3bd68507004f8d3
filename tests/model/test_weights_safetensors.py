"""Hugging Face directories: values read, and rejection in one clear line."""

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from model.weights.checkpoint import ModelLoadError, TensorInfo
from model.weights.safetensors import SafetensorsCheckpoint
from tests.support.tiny_checkpoints import BF16, TinyModel

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def tiny() -> TinyModel:
    return TinyModel()


def refused(folder: Path) -> str:
    """The one-line error of opening `folder`."""
    with pytest.raises(ModelLoadError) as caught:
        SafetensorsCheckpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder: Path) -> Mapping[str, TensorInfo]:
    with closing(SafetensorsCheckpoint(folder)) as checkpoint:
        return checkpoint.names()


@pytest.mark.parametrize("shards", [1, 3])
def test_names_lists_every_tensor(tiny: TinyModel, tmp_path: Path, shards: int) -> None:
    with closing(SafetensorsCheckpoint(tiny.write_hf(tmp_path, shards=shards))) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.names().items()} == tiny.shapes()
        for name, values in tiny.tensors.items():
            np.testing.assert_array_equal(checkpoint.read(name), values)


def test_names_has_sizes_and_types_of_the_header(tmp_path: Path) -> None:
    folder = TinyModel().write_hf(tmp_path)
    arrays: dict[str, Any] = {kind: np.zeros((2, 3), kind) for kind in ("float32", "float16", "float64", "int8")}
    save_file(arrays | {"bfloat16": np.zeros((2, 3), BF16)}, folder / "model.safetensors")
    infos = names(folder)
    assert {name: (info.stored_as, info.supported, info.nbytes) for name, info in infos.items()} == {
        "float32": ("F32", True, 24),
        "float16": ("F16", True, 12),
        "bfloat16": ("BF16", True, 12),
        "float64": ("F64", False, 0),
        "int8": ("I8", False, 0),
    }


def test_read_keeps_bfloat16_and_widens_float16(tiny: TinyModel, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    values = tiny.tensors[name]
    with closing(SafetensorsCheckpoint(tiny.write_hf(tmp_path / "bf16", BF16))) as checkpoint:
        read = checkpoint.read(name)
    assert read.dtype == BF16
    np.testing.assert_array_equal(read, values.astype(BF16))
    with closing(SafetensorsCheckpoint(tiny.write_hf(tmp_path / "f16", np.float16))) as checkpoint:
        widened = checkpoint.read(name)
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(widened, values.astype(np.float16).astype(np.float32))


def test_read_arrays_outlive_the_files(tiny: TinyModel, tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(tiny.write_hf(tmp_path))
    values = checkpoint.read("model.norm.weight")
    checkpoint.close()
    np.testing.assert_array_equal(values, tiny.tensors["model.norm.weight"])
    with pytest.raises(ModelLoadError, match="cannot be read"):
        checkpoint.read("model.norm.weight")


def test_open_single_file_of_any_name(tiny: TinyModel, tmp_path: Path) -> None:
    (tiny.write_hf(tmp_path) / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert len(names(tmp_path)) == len(tiny.tensors)


def test_open_prefers_model_safetensors(tiny: TinyModel, tmp_path: Path) -> None:
    tiny.write_hf(tmp_path)
    save_file({"copy": np.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert "copy" not in names(tmp_path)


def test_open_several_files_without_an_index(tiny: TinyModel, tmp_path: Path) -> None:
    (tiny.write_hf(tmp_path, shards=3) / INDEX).unlink()
    assert "has 3 *.safetensors files" in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "weight_map is missing"),
        (b'{"weight_map": []}', "weight_map is missing or not an object"),
        (b'{"weight_map": {"a": 3}}', "3 is not the name of a .safetensors file"),
        (b'{"weight_map": {"a": "../other.safetensors"}}', "'../other.safetensors' is not the name"),
        (b'{"weight_map": {"a": "weights.bin"}}', "'weights.bin' is not the name"),
        (rb'{"weight_map": {"a": "\u0000.safetensors"}}', r"'\x00.safetensors' is not the name"),
        (rb'{"weight_map": {"a": "\ud800.safetensors"}}', r"'\ud800.safetensors' is not the name"),
        (b'{"weight_map": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}", "is not the name of a .safetensors file"),
        (b'{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: listed in"),
    ],
)
def test_open_bad_index(tiny: TinyModel, tmp_path: Path, content: bytes, message: str) -> None:
    (tiny.write_hf(tmp_path, shards=3) / INDEX).write_bytes(content)
    assert message in refused(tmp_path)


def test_open_tensor_in_two_shards(tiny: TinyModel, tmp_path: Path) -> None:
    tiny.write_hf(tmp_path, shards=3)
    save_file({"model.embed_tokens.weight": np.zeros(1)}, tmp_path / SHARD)
    assert "model.embed_tokens.weight is in another shard too" in refused(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: data[:0],
        lambda data: b"x" * len(data),
        lambda data: data[:8] + b"!" + data[9:],
    ],
)
def test_open_damaged_shard(tiny: TinyModel, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    shard = tiny.write_hf(tmp_path, shards=3) / SHARD
    shard.write_bytes(damage(shard.read_bytes()))
    assert f"{SHARD}: not a complete safetensors file" in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json: not JSON"),
        (b"3", "config.json: not a JSON object"),
        (json.dumps(TinyModel().hf_config() | {"vocab_size": None}).encode(), "config.json: vocab_size is missing"),
        (b'{"architectures": ["BertModel"]}', "config.json: architecture ['BertModel'] is not known"),
    ],
)
def test_open_bad_config(tiny: TinyModel, tmp_path: Path, content: bytes, message: str) -> None:
    (tiny.write_hf(tmp_path) / "config.json").write_bytes(content)
    assert message in refused(tmp_path)


def test_open_without_config(tiny: TinyModel, tmp_path: Path) -> None:
    (tiny.write_hf(tmp_path) / "config.json").unlink()
    assert "config.json: No such file or directory" in refused(tmp_path)
