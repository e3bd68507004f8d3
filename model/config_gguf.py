"""ModelConfig from GGUF metadata (key names: the GGUF specification, `docs/gguf.md` of the ggml project)."""

from collections.abc import Callable, Mapping
from typing import Any

from model import rope as ropes
from model.config import (
    ConfigError,
    LayerKind,
    ModelConfig,
    factor_of,
    float_of,
    head_dim_of,
    int_of,
    layer_count,
    layer_kinds,
    short_repr,
)
from model.families import FAMILIES, Family
from model.rope import Rope

type Tensor = Callable[[str], tuple[float, ...]]

# Tensors with the divisors of rotary frequencies.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_DIVISORS, _LONG, _SHORT = ROPE_TENSORS
# The largest models of their families scale scores by hidden size over heads, not by head size. Files do not say so.
_SCALED_BY_HIDDEN = {("gemma2", 46), ("gemma3", 62)}


def config_from_gguf(metadata: Mapping[str, Any], tensor: Tensor, *, has_output: bool) -> ModelConfig:
    """Read the metadata of a file.

    Args:
        metadata: key -> Python value; `tokenizer.ggml.tokens` gives the vocabulary size if no key does.
        tensor: returns the values of one of ROPE_TENSORS, empty if the file lacks it.
        has_output: whether the file has `output.weight`; without it the head is the embedding.

    Raises:
        ConfigError: names the key that is missing or not supported.
    """
    arch = metadata.get("general.architecture")
    in_gguf = {name: row for name, row in FAMILIES.items() if row.in_gguf}
    family = in_gguf.get(arch) if isinstance(arch, str) else None
    if family is None:
        known = ", ".join(sorted(in_gguf))
        raise ConfigError(f"general.architecture {short_repr(arch)} is not known; known: {known}")
    key = f"{arch}.".__add__
    heads, hidden = int_of(metadata, key("attention.head_count")), int_of(metadata, key("embedding_length"))
    head_dim = head_dim_of(metadata, key("attention.key_length"), hidden, heads)
    for name in ("rope.dimension_count", "attention.value_length"):
        if int_of(metadata, key(name), head_dim) != head_dim:
            raise ConfigError(f"{key(name)} differs from the head size {head_dim}: not supported")
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    if not isinstance(tokens, list):
        raise ConfigError("tokenizer.ggml.tokens must be a list")
    layers = _layers(metadata, family, key, tensor, head_dim)
    by_hidden = (family.name, len(layers)) in _SCALED_BY_HIDDEN
    return ModelConfig(
        family=family.name,
        vocab_size=len(tokens) or int_of(metadata, key("vocab_size")),
        hidden_size=hidden,
        intermediate_size=int_of(metadata, key("feed_forward_length")),
        num_heads=heads,
        num_kv_heads=int_of(metadata, key("attention.head_count_kv"), heads),
        head_dim=head_dim,
        layers=layers,
        # Stored as float32: 9.99999974738e-06 is read as 1e-5.
        rms_norm_eps=float(f"{float_of(metadata, key('attention.layer_norm_rms_epsilon')):.6g}"),
        max_position_embeddings=int_of(metadata, key("context_length")),
        tie_word_embeddings=not has_output,
        attention_scale=float((hidden / heads if by_hidden else head_dim) ** -0.5),
        attention_cap=float_of(metadata, key("attn_logit_softcapping"), 0.0),
        logit_cap=float_of(metadata, key("final_logit_softcapping"), 0.0),
    )


def _layers(
    metadata: Mapping[str, Any], family: Family, key: Callable[[str], str], tensor: Tensor, head_dim: int
) -> tuple[LayerKind, ...]:
    rope = _rope(metadata, key, tensor, head_dim)
    local = rope if family.local_theta is None else Rope(family.local_theta)
    windows = _windows(metadata, family, key)
    period = family.no_rope_period
    uses_rope = [not period or (i + 1) % period != 0 for i in range(len(windows))]
    return layer_kinds(windows, uses_rope, rope, local)


def _windows(metadata: Mapping[str, Any], family: Family, key: Callable[[str], str]) -> list[int]:
    """The window of each layer; 0 for full attention."""
    count = layer_count(metadata, key("block_count"))
    window = int_of(metadata, key("attention.sliding_window"), 0)
    pattern = metadata.get(key("attention.sliding_window_pattern"))
    if isinstance(pattern, list):
        if len(pattern) != count:
            raise ConfigError(f"{key('attention.sliding_window_pattern')} must hold {count} values")
        return [window if local else 0 for local in pattern]
    period = int_of(metadata, key("attention.sliding_window_pattern"), family.local_period)
    return [0 if period and (i + 1) % period == 0 else window for i in range(count)]


def _rope(metadata: Mapping[str, Any], key: Callable[[str], str], tensor: Tensor, head_dim: int) -> Rope:
    theta = float_of(metadata, key("rope.freq_base"), 10000.0, above=1)
    length, long = int_of(metadata, key("context_length")), tensor(_LONG)
    original = int_of(metadata, key("rope.scaling.original_context_length"), length, low=2 if long else 1)
    if long:
        scale = float_of(metadata, key("rope.scaling.attn_factor"), ropes.longrope_scale(length / original, original))
        return Rope(theta, tensor(_SHORT), scale, long, original)
    type_ = metadata.get(key("rope.scaling.type"), "none")
    factor = factor_of(metadata, key("rope.scaling.factor"), 1.0)
    if type_ == "yarn":
        divisors = ropes.yarn_divisors(
            theta, head_dim, factor=factor, fast=32.0, slow=1.0, original=original, truncate=True
        )
        return Rope(theta, divisors, ropes.yarn_scale(factor))
    if type_ not in ("none", "linear"):
        raise ConfigError(f"{key('rope.scaling.type')} {short_repr(type_)} is not supported; known: none, linear, yarn")
    divisors = tensor(_DIVISORS)
    if type_ == "linear" and factor != 1:
        divisors = tuple(factor * divisor for divisor in divisors or (1.0,) * (head_dim // 2))
    return Rope(theta, divisors)
