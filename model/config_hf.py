"""ModelConfig from a Hugging Face `config.json`."""

from collections.abc import Mapping
from typing import Any

from model import rope as ropes
from model.config import (
    ConfigError,
    LayerKind,
    ModelConfig,
    factor_of,
    float_of,
    floats_of,
    head_dim_of,
    int_of,
    layer_count,
    layer_kinds,
    mapping_of,
    short_repr,
    strings_of,
)
from model.families import FAMILIES, Family
from model.rope import Rope

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"  # entries of `layer_types`


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Read a `config.json`.

    Raises:
        ConfigError: names the key that is missing or not supported.
    """
    family = _family(strings_of(config, "architectures"), config.get("model_type"))
    if family is None:
        known = ", ".join(sorted(row.hf_architecture for row in FAMILIES.values()))
        names = short_repr(config.get("architectures"))
        raise ConfigError(f"architecture {names} is not known; known: {known}")
    config = {**family.hf_defaults, **config}
    _refuse_unsupported(config, family)
    heads, hidden = int_of(config, "num_attention_heads"), int_of(config, "hidden_size")
    head_dim = head_dim_of(config, "head_dim", hidden, heads)
    return ModelConfig(
        family=family.name,
        vocab_size=int_of(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=int_of(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=int_of(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        layers=_layers(config, family, head_dim),
        rms_norm_eps=float_of(config, "rms_norm_eps", 1e-6),
        max_position_embeddings=int_of(config, "max_position_embeddings"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_scale=float(float_of(config, "query_pre_attn_scalar", head_dim, above=0) ** -0.5),
        attention_cap=float_of(config, "attn_logit_softcapping", 0.0),
        logit_cap=float_of(config, "final_logit_softcapping", 0.0),
    )


def _family(architectures: list[str], model_type: Any) -> Family | None:
    rows = FAMILIES.values()
    if architectures:
        return next((row for row in rows if row.hf_architecture in architectures), None)
    return next((row for row in rows if model_type == (row.hf_model_type or row.name)), None)


def _refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    for key in ("hidden_activation", "hidden_act"):
        if config.get(key) not in (None, *family.activation_names):
            known = ", ".join(family.activation_names)
            raise ConfigError(f"{key} {short_repr(config[key])} is not supported; known: {known}")
    for key in ("quantization_config", "partial_rotary_factor"):
        if config.get(key) not in (None, 1, 1.0):
            raise ConfigError(f"{key} is not supported yet")
    for key in ("mlp_bias", "use_bidirectional_attention", *(() if family.qkv_bias else ("attention_bias",))):
        if config.get(key):
            raise ConfigError(f"{key} is not supported for this architecture")


def _layers(config: Mapping[str, Any], family: Family, head_dim: int) -> tuple[LayerKind, ...]:
    windows, uses_rope = _windows(config, family), _uses_rope(config, family)
    if family.no_rope_period and not strings_of(config, "layer_types"):  # SmolLM3: only layers without RoPE
        windows = [0 if is_rotary else window for window, is_rotary in zip(windows, uses_rope, strict=True)]
    rope = _rope(config, _GLOBAL, family, head_dim)
    local_rope = _rope(config, _LOCAL, family, head_dim) if family.local_theta else rope
    return layer_kinds(windows, uses_rope, rope, local_rope)


def _windows(config: Mapping[str, Any], family: Family) -> list[int]:
    """The window of each layer; 0 for full attention."""
    count = layer_count(config, "num_hidden_layers")
    types = strings_of(config, "layer_types")
    flagged = family.window_flag and not config.get("use_sliding_window")
    window = 0 if flagged else int_of(config, "sliding_window", 0)
    if types:
        if len(types) != count or not set(types) <= {_GLOBAL, _LOCAL}:
            raise ConfigError(f"layer_types must be {count} of {_GLOBAL}, {_LOCAL}")
        if _LOCAL in types and not window:
            raise ConfigError(f"layer_types has {_LOCAL}, but sliding_window is missing")
        return [window if kind == _LOCAL else 0 for kind in types]
    period = int_of(config, "sliding_window_pattern", family.local_period)
    first = int_of(config, "max_window_layers", 0) if family.window_flag else 0
    return [0 if i < first or (period and (i + 1) % period == 0) else window for i in range(count)]


def _uses_rope(config: Mapping[str, Any], family: Family) -> list[bool]:
    """Whether each layer applies RoPE."""
    count = layer_count(config, "num_hidden_layers")
    if not family.no_rope_period:
        return [True] * count
    flags = config.get("no_rope_layers")
    if flags is None:
        period = int_of(config, "no_rope_layer_interval", family.no_rope_period)
        return [(i + 1) % max(1, period) != 0 for i in range(count)]
    if not isinstance(flags, list) or len(flags) != count or not all(flag in (0, 1) for flag in flags):
        raise ConfigError(f"no_rope_layers must be {count} of 0 and 1")
    return [bool(flag) for flag in flags]


def _rope(config: Mapping[str, Any], kind: str, family: Family, head_dim: int) -> Rope:
    """The angles of one kind of layer.

    transformers 5 has `rope_parameters`, per kind of layer if they differ; older files have `rope_theta` and
    `rope_scaling`.
    """
    parameters = mapping_of(config, "rope_parameters")
    if kind in parameters:
        parameters = mapping_of(parameters, kind)
    elif kind == _LOCAL:
        return Rope(float_of(config, "rope_local_base_freq", family.local_theta))
    theta = float_of(parameters if "rope_theta" in parameters else config, "rope_theta", 10000.0, above=1)
    key = "rope_parameters" if parameters else "rope_scaling"
    maximum = int_of(config, "max_position_embeddings")
    original = int_of(config, "original_max_position_embeddings", maximum)
    lengths = {"max_position_embeddings": maximum, "original_max_position_embeddings": original}
    scaling = {**lengths, **(parameters or mapping_of(config, key))}
    match scaling.get("rope_type", scaling.get("type", "default")):
        case "default":
            return Rope(theta)
        case "linear":
            return Rope(theta, (float_of(scaling, "factor"),) * (head_dim // 2))
        case "llama3":
            return _llama3(theta, head_dim, scaling)
        case "yarn":
            return _yarn(theta, head_dim, scaling)
        case "longrope" | "su":  # the older name
            return _longrope(theta, scaling)
        case type_:
            known = "default, linear, llama3, yarn, longrope, su"
            raise ConfigError(f"{key} of type {short_repr(type_)} is not supported; known: {known}")


def _original(scaling: Mapping[str, Any], low: int = 1) -> int:
    """Context length in training, in tokens."""
    return int_of(scaling, "original_max_position_embeddings", low=low)


def _llama3(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> Rope:
    low, high = float_of(scaling, "low_freq_factor"), float_of(scaling, "high_freq_factor")
    if not high > low:
        raise ConfigError(f"high_freq_factor {high} is not above low_freq_factor {low}")
    factor, original = factor_of(scaling, "factor"), _original(scaling)
    return Rope(theta, ropes.llama3_divisors(theta, head_dim, factor=factor, low=low, high=high, original=original))


def _yarn(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> Rope:
    factor = factor_of(scaling, "factor")
    divisors = ropes.yarn_divisors(
        theta,
        head_dim,
        factor=factor,
        fast=factor_of(scaling, "beta_fast", 32.0, low=1e-6),
        slow=factor_of(scaling, "beta_slow", 1.0, low=1e-6),
        original=_original(scaling),
        truncate=bool(scaling.get("truncate", True)),
    )
    share, all_share = float_of(scaling, "mscale", 0.0), float_of(scaling, "mscale_all_dim", 0.0)
    scale = ropes.yarn_scale(factor)
    if min(share, all_share) < 0:
        raise ConfigError(f"mscale {share} or mscale_all_dim {all_share} is negative")
    if share and all_share:
        scale = ropes.yarn_scale(factor, share) / ropes.yarn_scale(factor, all_share)
    return Rope(theta, divisors, float_of(scaling, "attention_factor", scale))


def _longrope(theta: float, scaling: Mapping[str, Any]) -> Rope:
    original = _original(scaling, low=2)
    factor = float_of(scaling, "factor", int_of(scaling, "max_position_embeddings") / original)
    scale = float_of(scaling, "attention_factor", ropes.longrope_scale(factor, original))
    return Rope(theta, floats_of(scaling, "short_factor"), scale, floats_of(scaling, "long_factor"), original)
