"""ModelConfig from a Hugging Face `config.json`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model import rope as ropes
from model.config import (
    ConfigError,
    LayerKind,
    ModelConfig,
    bool_of,
    check_keys,
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
from model.config_experts import HF_KEYS, experts_from_hf, sparse_layers
from model.config_latent import latent_from_hf, score_scale_from_hf
from model.families import FAMILIES
from model.family import Family
from model.hf_keys import IGNORED, NEUTRAL, READ, ROPE_READ
from model.rope import Rope
from model.text_half import text_config_of

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"  # entries of `layer_types`
_TYPES = {"attention": _GLOBAL}  # other names of them


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Read a `config.json`.

    Raises:
        ConfigError: names the key that is missing or not supported.
    """
    config = text_config_of(config)
    family = _family(strings_of(config, "architectures"), config.get("model_type"))
    if family is None:
        known = ", ".join(sorted(row.hf_architecture for row in FAMILIES.values()))
        key = "model_type" if config.get("architectures") is None and "model_type" in config else "architectures"
        names = f"{key.removesuffix('s')} {short_repr(config.get(key))}"
        raise ConfigError(f"{names} is not known; known: {known}")
    if config.get("model_type") not in (None, family.hf_model_type or family.name):
        raise ConfigError(f"model_type {short_repr(config['model_type'])} is not that of {family.hf_architecture}")
    config = {**family.hf_defaults, **config}
    _refuse_unsupported(config, family)
    heads, hidden = int_of(config, "num_attention_heads"), int_of(config, "hidden_size")
    latent = latent_from_hf(config, heads) if family.latent else None
    head_dim = latent.rope if latent else head_dim_of(config, "head_dim", hidden, heads)
    layers = sparse_layers(config, family, _layers(config, family, head_dim))
    scales = _scales(config, family, hidden, head_dim)
    if latent:  # its rotated elements come first in the cache
        layers = tuple(replace(kind, rope=kind.rope and replace(kind.rope, dims=latent.rope)) for kind in layers)
        _, parameters = _rope_parameters(config, _GLOBAL, family)
        scales["attention_scale"] = score_scale_from_hf(latent, parameters)
    return ModelConfig(
        family=family.name,
        vocab_size=int_of(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=int_of(config, family.mlp_size),
        num_heads=heads,
        num_kv_heads=1 if latent else int_of(config, "num_key_value_heads", heads),
        head_dim=latent.cached if latent else head_dim,
        layers=layers,
        rms_norm_eps=float_of(config, family.norm_eps, 1e-6),
        max_position_embeddings=int_of(config, "max_position_embeddings"),
        tie_word_embeddings=bool_of(config, "tie_word_embeddings", False),
        attention_cap=_cap(config, "attn_logit_softcapping"),
        logit_cap=_cap(config, "final_logit_softcapping"),
        experts=experts_from_hf(config, family),
        qkv_bias=family.qkv_bias if isinstance(family.qkv_bias, bool) else bool_of(config, family.qkv_bias, False),
        latent=latent,
        **scales,
    )


def _scales(config: Mapping[str, Any], family: Family, hidden: int, head_dim: int) -> dict[str, Any]:
    """Constant factors of the network; `_refuse_unsupported` has refused those of other families."""
    scalar = float_of(config, "query_pre_attn_scalar", head_dim, above=0)
    embedding = float(hidden**0.5) if family.scaled_embedding else 1.0
    return {
        "attention_scale": float_of(config, "attention_multiplier", float(scalar**-0.5)),
        "embedding_scale": float_of(config, "embedding_multiplier", embedding),
        "residual_scale": float_of(config, "residual_multiplier", 1.0),
        "logit_scale": float_of(config, "logit_scale", 1.0) / float_of(config, "logits_scaling", 1.0, above=0),
    }


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
    keys = READ | IGNORED | family.hf_defaults.keys()
    keys |= {"attention_bias"} if family.qkv_bias is True else set()
    keys |= HF_KEYS if family.experts else set()
    keys |= {"num_mtp_layers"} if "num_nextn_predict_layers" in family.hf_defaults else set()
    if not family.has_window and config.get("use_sliding_window") is False:
        keys |= {"sliding_window"}
    if config.get("sliding_window_size") == config.get("sliding_window"):  # Gemma 2 has both
        keys |= {"sliding_window_size"}
    for key, value in family.hf_required.items():
        if config.get(key) != value:
            raise ConfigError(f"{key} {short_repr(config.get(key))} is not supported; known: {value}")
    check_keys(config, keys | family.hf_required.keys(), {**NEUTRAL, **family.hf_neutral})


def _cap(config: Mapping[str, Any], key: str) -> float:
    return 0.0 if config.get(key) is None else float_of(config, key, above=0)


def _layers(config: Mapping[str, Any], family: Family, head_dim: int) -> tuple[LayerKind, ...]:
    windows, uses_rope = _windows(config, family), _uses_rope(config, family)
    if family.no_rope_period and not strings_of(config, "layer_types"):  # SmolLM3: only layers without RoPE
        windows = [0 if is_rotary else window for window, is_rotary in zip(windows, uses_rope, strict=True)]
    rope = _rope(config, _GLOBAL, family, head_dim)
    local_rope = _rope(config, _LOCAL, family, head_dim) if family.local_theta else rope
    return layer_kinds(windows, uses_rope, rope, local_rope, _query_growth(config))


def _query_growth(config: Mapping[str, Any]) -> tuple[float, int] | None:
    """Ministral 3's growth of queries with their position."""
    parameters = mapping_of(config, "rope_scaling") or mapping_of(config, "rope_parameters")
    beta = float_of(parameters, "llama_4_scaling_beta", 0.0)
    return (beta, _original(parameters)) if beta else None


def _windows(config: Mapping[str, Any], family: Family) -> list[int]:
    """The window of each layer; 0 for full attention."""
    count = layer_count(config, "num_hidden_layers")
    has_window = family.has_window and (not family.window_flag or bool_of(config, "use_sliding_window", False))
    window = int_of(config, "sliding_window", low=1) if has_window and config.get("sliding_window") is not None else 0
    first = int_of(config, "max_window_layers", 0) if "max_window_layers" in family.hf_defaults else 0
    types = [_TYPES.get(name, name) for name in strings_of(config, "layer_types")]
    if family.recurrent and not types:
        raise ConfigError("layer_types is missing: recurrent layers are not supported")
    period = family.local_period
    if period and not types and config.get("sliding_window_pattern") is not None:
        period = int_of(config, "sliding_window_pattern", low=1)
    windows = [0 if i < first or (period and (i + 1) % period == 0) else window for i in range(count)]
    if not types:
        return windows
    if len(types) != count or not set(types) <= {_GLOBAL, _LOCAL}:
        raise ConfigError(f"layer_types must be {count} of {_GLOBAL}, {_LOCAL}")
    if _LOCAL in types and not window:
        raise ConfigError(f"layer_types has {_LOCAL}, but sliding_window is missing")
    typed = [window if kind == _LOCAL else 0 for kind in types]
    if "layer_types" not in family.hf_defaults and typed != windows:
        raise ConfigError("layer_types is not supported for this architecture")
    return typed


def _uses_rope(config: Mapping[str, Any], family: Family) -> list[bool]:
    """Whether each layer applies RoPE."""
    count = layer_count(config, "num_hidden_layers")
    if family.rope_in_windows and config.get("sliding_window") is not None:
        return [window > 0 for window in _windows(config, family)]
    if not family.no_rope_period:
        return [True] * count
    flags = config.get("no_rope_layers")
    if flags is None:
        period = int_of(config, "no_rope_layer_interval", family.no_rope_period, low=1)
        return [(i + 1) % period != 0 for i in range(count)]
    if not isinstance(flags, list) or len(flags) != count or not all(flag in (0, 1) for flag in flags):
        raise ConfigError(f"no_rope_layers must be {count} of 0 and 1")
    return [bool(flag) for flag in flags]


def _rope(config: Mapping[str, Any], kind: str, family: Family, head_dim: int) -> Rope:
    """The angles of one kind of layer."""
    key, parameters = _rope_parameters(config, kind, family)
    check_keys(parameters, ROPE_READ | {*family.rope_keys}, {}, f"{key}.")
    rotated = _rotated(parameters, head_dim)
    rope = _stretched(config, key, parameters, family, rotated)
    return rope if rotated == head_dim else replace(rope, dims=rotated)


def _rotated(parameters: Mapping[str, Any], head_dim: int) -> int:
    share = float_of(parameters, "partial_rotary_factor", 1.0, above=0)
    if share == 1:
        return head_dim
    if not 2 <= int(head_dim * share) <= head_dim or int(head_dim * share) % 2:
        raise ConfigError(f"partial_rotary_factor {share} does not give an even part of head_dim {head_dim}")
    return int(head_dim * share)


def _stretched(
    config: Mapping[str, Any], key: str, parameters: Mapping[str, Any], family: Family, head_dim: int
) -> Rope:
    """The angles of `head_dim` rotated dimensions."""
    theta = float_of(parameters, "rope_theta", above=1)
    names = [parameters[name] for name in ("rope_type", "type") if name in parameters]
    names = [family.rope_aliases.get(name, name) if isinstance(name, str) else name for name in names]
    if len(names) == 2 and names[0] != names[1]:
        raise ConfigError(f"rope_type {short_repr(names[0])} and type {short_repr(names[1])} of {key} differ")
    match names[0] if names else "default":
        case "default":
            return Rope(theta)
        case "linear":
            return Rope(theta, (float_of(parameters, "factor"),) * (head_dim // 2))
        case "llama3":
            return _llama3(theta, head_dim, parameters)
        case "yarn":
            return _yarn(theta, head_dim, parameters)
        case "longrope":
            return _longrope(theta, parameters, int_of(config, "max_position_embeddings"))
        case "dynamic":
            power = head_dim / (head_dim - 2)
            if "alpha" in family.rope_keys and parameters.get("alpha"):
                return Rope(theta * float_of(parameters, "alpha", above=0) ** power)
            return Rope(theta, ntk=(factor_of(parameters, "factor"), int_of(config, "max_position_embeddings"), power))
        case type_:
            known = ", ".join(("default, linear, llama3, yarn, longrope, dynamic", *sorted(family.rope_aliases)))
            raise ConfigError(f"{key} of type {short_repr(type_)} is not supported; known: {known}")


def _rope_parameters(config: Mapping[str, Any], kind: str, family: Family) -> tuple[str, Mapping[str, Any]]:
    """The rotary parameters of a kind of layer as transformers 5 resolves them, and the key in `config`.

    Version 5 writes `rope_parameters`, per kind of layer if the family's kinds differ; older ones wrote `rope_theta`
    and `rope_scaling`, which takes precedence.
    """
    new, old = mapping_of(config, "rope_parameters"), mapping_of(config, "rope_scaling")
    theta = {"rope_theta": config.get("rope_theta", 10000.0)}
    length = {"original_max_position_embeddings": int_of(config, "max_position_embeddings")}
    if family.local_theta is None:
        key, parameters = ("rope_scaling", old) if old else ("rope_parameters", new)
        original = config.get("original_max_position_embeddings")
        fixed = {} if original is None else {"original_max_position_embeddings": original}
    else:
        check_keys(new, (_GLOBAL, _LOCAL), {}, "rope_parameters.")
        key, parameters, fixed = f"rope_parameters.{kind}", mapping_of(new, kind), {}
        if kind == _LOCAL:
            theta = {"rope_theta": config.get("rope_local_base_freq", family.local_theta)}
        elif old:
            key, parameters = "rope_scaling", {**(parameters if new else {"rope_type": "default"}), **old}
        check_keys({"truncate": parameters.get("truncate")}, (), {"truncate": True}, f"{key}.")
    nested, outer = parameters.get("partial_rotary_factor"), config.get("partial_rotary_factor")
    share = outer if nested is None else nested
    if family.partial_rotary is None:
        name = "" if nested is None else f"{key}."
        check_keys({"partial_rotary_factor": share}, (), {"partial_rotary_factor": 1}, name)
    fixed |= {"partial_rotary_factor": family.partial_rotary if share is None else share}
    return key, {**theta, **length, **parameters, **fixed}


def _original(scaling: Mapping[str, Any], low: int = 1) -> int:
    """Context length in training, in tokens."""
    return int_of(scaling, "original_max_position_embeddings", low=low)


def _llama3(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> Rope:
    low, high = float_of(scaling, "low_freq_factor", above=0), float_of(scaling, "high_freq_factor")
    if not high > low:
        raise ConfigError(f"high_freq_factor {high} is not above low_freq_factor {low}")
    factor, original = factor_of(scaling, "factor"), _original(scaling)
    return Rope(theta, ropes.llama3_divisors(theta, head_dim, factor=factor, low=low, high=high, original=original))


def _yarn(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> Rope:
    factor, original = factor_of(scaling, "factor"), _original(scaling)
    fast, slow = (
        factor_of(scaling, name, usual, low=1e-6) for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    truncate = bool_of(scaling, "truncate", True)
    divisors = ropes.yarn_divisors(
        theta, head_dim, factor=factor, fast=fast, slow=slow, original=original, truncate=truncate
    )
    share, all_share = float_of(scaling, "mscale", 0.0), float_of(scaling, "mscale_all_dim", 0.0)
    scale = ropes.yarn_scale(factor)
    if min(share, all_share) < 0:
        raise ConfigError(f"mscale {share} or mscale_all_dim {all_share} is negative")
    if share and all_share:
        scale = ropes.yarn_scale(factor, share) / ropes.yarn_scale(factor, all_share)
    yarn = (factor, original) if (fast, slow, truncate) == (32, 1, True) else None
    return Rope(theta, divisors, float_of(scaling, "attention_factor", scale), yarn=yarn)


def _longrope(theta: float, scaling: Mapping[str, Any], maximum: int) -> Rope:
    original = _original(scaling, low=2)
    factor = float_of(scaling, "factor", maximum / original)
    scale = float_of(scaling, "attention_factor", ropes.longrope_scale(factor, original))
    return Rope(theta, floats_of(scaling, "short_factor"), scale, floats_of(scaling, "long_factor"), original)
