"""Promise 1: log-probs of the default model against torch in float32."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from compiled.runner import ModelRunner
from compiled.shapes import Buckets
from model.weights.source import ModelSource, default_model_path
from model.weights.weight_table import load_weights, open_checkpoint
from tests.support.golden_cases import assert_float32, figures_of
from tests.support.runners import make_runner


def test_float32_from_gguf(float32_runner: ModelRunner) -> None:
    assert_float32(figures_of(float32_runner, "smollm2-q4_1-gguf-f32"))


def test_bfloat16_from_gguf(bfloat16_runner: ModelRunner) -> None:
    figures = figures_of(bfloat16_runner, "smollm2-q4_1-gguf-f32")
    print(figures)
    assert figures.mean_error < 0.035


@pytest.mark.slow
def test_int8_from_gguf(int8_runner: ModelRunner) -> None:
    """`python -m tools.accuracy.dtypes` has the errors; the limit is twice the mean."""
    figures = figures_of(int8_runner, "smollm2-q4_1-gguf-f32")
    print(figures)
    assert figures.mean_error < 0.09


@pytest.fixture(scope="module")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face directory of the second golden file: the same weights rounded to bfloat16."""
    checkpoint = open_checkpoint(ModelSource("default", default_model_path()))
    try:
        weights = load_weights(checkpoint, np.dtype(ml_dtypes.bfloat16), lambda _, rows: rows.read())
        config = checkpoint.config
    finally:
        checkpoint.close()
    dims = config.dims()
    assert config.layers[0].rope is not None
    tensors: dict[str, NDArray[Any]] = {}
    for path, weight in config.weights().items():
        start = 0
        for tensor in weight.tensors:
            end = start + dims[tensor.shape[0]]
            tensors[tensor.hf] = np.asarray(weights[path])[start:end].astype(ml_dtypes.bfloat16)
            start = end
    directory = tmp_path_factory.mktemp("smollm2")
    save_file(tensors, directory / "model.safetensors")
    sizes = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rope_theta": config.layers[0].rope.theta,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(sizes), "utf-8")
    return directory


@pytest.mark.slow
def test_float32_from_a_hugging_face_directory(hf_directory: Path) -> None:
    buckets = Buckets(decode_rows=(8,), prefill_chunks=(64,), score_rows=64, pages_per_row=16)
    assert_float32(figures_of(make_runner(hf_directory, "float32", buckets), "smollm2-prompt-logprobs"))
