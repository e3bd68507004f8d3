"""The default model as a Hugging Face directory, made without torch."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from model.weights.source import ModelSource, default_model_path
from model.weights.weight_table import Storage, load_weights, open_checkpoint


def write_default_model(directory: Path) -> Path:
    """Write config.json and the weights of the default model rounded to bfloat16; without a tokenizer."""
    checkpoint = open_checkpoint(ModelSource("default", default_model_path()))
    try:
        weights = load_weights(checkpoint, Storage(np.dtype(ml_dtypes.bfloat16), "none"), lambda _, rows: rows.read())
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
