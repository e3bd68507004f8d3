"""ModelConfig: the sizes of one network, read from config.json or from GGUF metadata."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.families import FAMILIES, Family, family_of


class ConfigError(ValueError):
    """A model's configuration is missing a value, contradicts itself or asks for what is not supported."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of one network. Frozen and hashable, so it can be static to a traced function."""

    family: str
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # E
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int  # tokens
    tie_word_embeddings: bool

    @property
    def traits(self) -> Family:
        """The family's row: what the sizes alone do not say."""
        return FAMILIES[self.family]

    def dims(self) -> dict[str, int]:
        """Axis sizes by the letters of the weight table: V, D, F, Q = H*E, KV = K*E, H, K."""
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "F": self.intermediate_size,
            "Q": self.num_heads * self.head_dim,
            "KV": self.num_kv_heads * self.head_dim,
            "H": self.num_heads,
            "K": self.num_kv_heads,
        }

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rope_theta", "rms_norm_eps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"{name} must be a positive number, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary embedding needs an even size")


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Reads a Hugging Face `config.json`.

    Raises:
        ConfigError: names the key that is missing or not supported.
    """
    family = family_of(hf_architectures=_list(config, "architectures"), hf_model_type=config.get("model_type"))
    if family is None:
        known = ", ".join(sorted(name for row in FAMILIES.values() for name in row.hf_architectures))
        raise ConfigError(f"config.json: architecture {config.get('architectures')} is not known; known: {known}")
    _refuse_unsupported(config, family)
    heads = _int(config, "num_attention_heads")
    hidden = _int(config, "hidden_size")
    rope = _mapping(config, "rope_parameters")
    return ModelConfig(
        family=family.name,
        vocab_size=_int(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_int(config, "intermediate_size"),
        num_layers=_int(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_int(config, "num_key_value_heads", heads),
        head_dim=_head_dim(config, "head_dim", hidden, heads),
        rope_theta=_float(rope if "rope_theta" in rope else config, "rope_theta", 10000.0),
        rms_norm_eps=_float(config, "rms_norm_eps", 1e-6),
        max_position_embeddings=_int(config, "max_position_embeddings"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def config_from_gguf(metadata: Mapping[str, Any], *, has_output: bool) -> ModelConfig:
    """Reads GGUF metadata (key names: the GGUF specification, `docs/gguf.md` of the ggml project).

    Args:
        metadata: key -> Python value; `tokenizer.ggml.tokens` gives the vocabulary size where no key does.
        has_output: whether the file holds `output.weight`; without it the head is the embedding.

    Raises:
        ConfigError: names the key that is missing or not supported.
    """
    arch = metadata.get("general.architecture")
    family = family_of(gguf_architecture=arch)
    if family is None:
        known = ", ".join(sorted(name for row in FAMILIES.values() for name in row.gguf_architectures))
        raise ConfigError(f"GGUF: general.architecture {arch!r} is not known; known: {known}")
    scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none":
        raise ConfigError(f"GGUF: {arch}.rope.scaling.type {scaling!r} is not supported yet")
    key = f"{arch}.".__add__
    heads = _int(metadata, key("attention.head_count"))
    hidden = _int(metadata, key("embedding_length"))
    head_dim = _head_dim(metadata, key("attention.key_length"), hidden, heads)
    if _int(metadata, key("rope.dimension_count"), head_dim) != head_dim:
        raise ConfigError(f"GGUF: {key('rope.dimension_count')} differs from the head size {head_dim}: not supported")
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    if not isinstance(tokens, list):
        raise ConfigError("tokenizer.ggml.tokens must be a list")
    return ModelConfig(
        family=family.name,
        vocab_size=len(tokens) or _int(metadata, key("vocab_size")),
        hidden_size=hidden,
        intermediate_size=_int(metadata, key("feed_forward_length")),
        num_layers=_int(metadata, key("block_count")),
        num_heads=heads,
        num_kv_heads=_int(metadata, key("attention.head_count_kv"), heads),
        head_dim=head_dim,
        rope_theta=_float(metadata, key("rope.freq_base"), 10000.0),
        # GGUF keeps it as float32: 9.99999974738e-06 is read back as the 1e-5 that was meant.
        rms_norm_eps=float(f"{_float(metadata, key('attention.layer_norm_rms_epsilon')):.6g}"),
        max_position_embeddings=_int(metadata, key("context_length")),
        tie_word_embeddings=not has_output,
    )


def _refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        rope = _mapping(config, key)
        scaling = rope.get("rope_type", rope.get("type", "default"))
        if scaling != "default":
            raise ConfigError(f"config.json: {key} of type {scaling!r} is not supported yet")
    if config.get("use_sliding_window"):
        raise ConfigError("config.json: use_sliding_window is not supported yet")
    if (config.get("hidden_act") or "silu") != "silu":
        raise ConfigError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; known: silu")
    for key in ("quantization_config", "partial_rotary_factor"):
        if config.get(key) not in (None, 1, 1.0):
            raise ConfigError(f"config.json: {key} is not supported yet")
    if config.get("attention_bias") and not family.qkv_bias:
        raise ConfigError("config.json: attention_bias is not supported for this architecture")
    if config.get("mlp_bias"):
        raise ConfigError("config.json: mlp_bias is not supported")


def _head_dim(source: Mapping[str, Any], key: str, hidden: int, heads: int) -> int:
    if source.get(key) is not None:
        return _int(source, key)
    if heads < 1 or hidden % heads:
        raise ConfigError(f"hidden size {hidden} is not a multiple of {heads} heads, and no head size is given")
    return hidden // heads


def _list(config: Mapping[str, Any], key: str) -> list[str]:
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"config.json: {key} must be a list of strings")
    return value


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {key} must be an object")
    return value


def _int(source: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = source.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key} must be an integer, got {value!r}")
    return value


def _float(source: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = source.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} must be a number, got {value!r}")
    return float(value)
