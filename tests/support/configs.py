"""Configurations of one small network in both formats."""

from typing import Any

from model.config import ModelConfig
from model.config_gguf import config_from_gguf as read_gguf
from model.rope import Rope

HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.context_length": 512,
    "llama.embedding_length": 48,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 8,
    "tokenizer.ggml.tokens": ["t"] * 100,
}


def config_from_gguf(metadata: dict[str, Any], *, has_output: bool, **tensors: tuple[float, ...]) -> ModelConfig:
    """ModelConfig of a file with these small tensors."""
    return read_gguf(metadata, lambda name: tensors.get(name.removesuffix(".weight"), ()), has_output=has_output)


def ropes(config: ModelConfig) -> list[Rope | None]:
    return [kind.rope for kind in config.layers]


def windows(config: ModelConfig) -> list[int]:
    return [kind.window for kind in config.layers]
