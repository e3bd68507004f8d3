"""The language models of multimodal checkpoints: their configuration, their tensors, and what is skipped."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import CONFIG_MAPPING

from model.config import ConfigError
from model.config_hf import config_from_hf
from model.text_half import TEXT_HALVES, TextHalf
from model.weights.checkpoint import Checkpoint, ModelLoadError
from model.weights.source import ModelSource, resolve_model
from model.weights.weight_table import Storage, check_headers, load_weights, open_checkpoint
from tests.support.configs import GGUF, config_from_gguf
from tests.support.tiny import tiny_configs, write_checkpoint
from tests.support.tiny_checkpoints import TinyModel
from tests.support.tiny_multimodal import Multimodal, architecture, multimodal

GOLDEN = Path(__file__).parent / "golden"
CASES = multimodal()


def write(folder: Path, name: str, change: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """Write a case with other keys and more tensors; None removes one."""
    folder.mkdir(exist_ok=True)
    config = CASES[name].config | architecture(name) | (change or {})
    (folder / "config.json").write_text(json.dumps(config))
    found = {key: value for key, value in (CASES[name].tensors() | tensors).items() if value is not None}
    save_file(found, folder / "model.safetensors")
    return folder


def read(checkpoint: Checkpoint) -> dict[str, Any]:
    return load_weights(checkpoint, Storage(np.dtype(np.float32), "none"), lambda _, rows: rows.read())


@pytest.mark.parametrize("name", CASES)
def test_checkpoint_is_that_of_its_language_model(tmp_path: Path, name: str) -> None:
    case: Multimodal = CASES[name]
    plain = tmp_path / "plain"
    plain.mkdir()
    write_checkpoint(plain, tiny_configs()[case.text], case.weights())
    with closing(open_checkpoint(ModelSource("plain", plain))) as checkpoint:
        config, expected = checkpoint.config, read(checkpoint)
    with closing(open_checkpoint(ModelSource("full", write(tmp_path / "full", name)))) as checkpoint:
        assert checkpoint.config == config
        assert checkpoint.skipped == dict.fromkeys(case.others, 60)
        found = read(checkpoint)
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        np.testing.assert_array_equal(found[path], values, err_msg=path)
    # The language model's own golden values are those of the multimodal module.
    with np.load(GOLDEN / "multimodal.npz") as file, np.load(GOLDEN / f"{case.text}.npz") as own:
        np.testing.assert_allclose(file[name], own["logits"], rtol=0, atol=3e-6)


@pytest.mark.parametrize("half", TEXT_HALVES, ids=lambda half: half.model_type)
def test_config_takes_all_keys_that_transformers_writes(half: TextHalf) -> None:
    written = CONFIG_MAPPING[half.model_type](architectures=[half.hf_architecture])
    config = config_from_hf(written.to_dict())
    assert config.num_layers == written.text_config.num_hidden_layers
    assert config.tie_word_embeddings == written.tie_word_embeddings


def test_config_of_gemma_3_4b_lacks_most_sizes() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    config = config_from_hf({"model_type": "gemma3", "text_config": text, **architecture("Gemma3")})
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262208, 8, 4, 256)
    assert [kind.window for kind in config.layers[:6]] == [1024] * 5 + [0]
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"text_config": {}}, "text_config is missing: the checkpoint has no language model"),
        ({"model_type": "mistral3"}, "model_type 'mistral3' is not that of Gemma3ForConditionalGeneration"),
        ({"text_config": {"model_type": "llama"}}, "text_config.model_type 'llama' is not supported"),
        ({"residual_multiplier": 0.5}, "residual_multiplier 0.5 is not supported"),
        ({"vocab_size": 5}, "vocab_size 5 is not supported"),
        ({"text_config": {"model_type": "gemma3_text", "use_resampler": True}}, "text_config.use_resampler True"),
        ({"text_config": CASES["Gemma3"].config["text_config"] | {"layer_types": ["full_attention"]}}, "layer_types"),
    ],
)
def test_config_is_refused_by_key(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config_from_hf(CASES["Gemma3"].config | architecture("Gemma3") | change)


def test_head_of_the_file_is_used_whatever_the_configuration_says(tmp_path: Path) -> None:
    for tied in (True, False):
        folder = write(tmp_path / str(tied), "Qwen3VL", {"tie_word_embeddings": tied})
        with closing(open_checkpoint(ModelSource("m", folder))) as checkpoint:
            assert not checkpoint.config.tie_word_embeddings
            assert "head.weight" in read(checkpoint)


def test_vision_only_checkpoint_lists_every_missing_tensor(tmp_path: Path) -> None:
    write(tmp_path, "Gemma3", **dict.fromkeys(CASES["Gemma3"].tensors().keys() - {*CASES["Gemma3"].others}))
    with closing(open_checkpoint(ModelSource("m", tmp_path))) as checkpoint:
        with pytest.raises(ModelLoadError) as error:
            check_headers(checkpoint)
        tensors = sum(len(weight.tensors) for weight in checkpoint.config.weights().values())
    assert str(error.value).count(": missing") == tensors
    assert f"{tensors} problems" in str(error.value)


def test_unknown_tensors_are_not_skipped(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {"model.language_model.layers.0.mlp.gate.weight": np.ones((2, 2), np.float32)}
    write(tmp_path, "Qwen3VL", **tensors)
    problem = r"model.layers.0.mlp.gate.weight: unexpected"
    with (
        closing(open_checkpoint(ModelSource("m", tmp_path))) as checkpoint,
        pytest.raises(ModelLoadError, match=problem),
    ):
        check_headers(checkpoint)


def test_gguf_folder_with_a_file_for_images(tmp_path: Path) -> None:
    path = TinyModel().write_gguf(tmp_path / "m-F32.gguf")
    (tmp_path / "mmproj-F16.gguf").write_bytes(b"x" * 7)
    assert resolve_model(str(tmp_path), None).path == path
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        assert checkpoint.skipped == {"mmproj-F16.gguf": 7}
    with pytest.raises(ConfigError, match="is the part for images or audio; name the language model's file"):
        config_from_gguf(GGUF | {"general.architecture": "clip"}, has_output=True)


@pytest.mark.parametrize(("architecture", "family"), [("qwen2vl", "qwen2"), ("qwen3vl", "qwen3")])
def test_gguf_architectures_with_rotary_axes(architecture: str, family: str) -> None:
    metadata = {key.replace("llama.", f"{architecture}."): value for key, value in GGUF.items()}
    metadata |= {"general.architecture": architecture, f"{architecture}.rope.dimension_sections": [2, 1, 1, 0]}
    plain = {key.replace("llama.", f"{family}."): value for key, value in GGUF.items()}
    plain["general.architecture"] = family
    assert config_from_gguf(metadata, has_output=True) == config_from_gguf(plain, has_output=True)
