"""ModelConfig from GGUF metadata (key names: the GGUF specification, `docs/gguf.md` of the ggml project)."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from model import rope as ropes
from model.config import (
    ConfigError,
    LayerKind,
    ModelConfig,
    check_keys,
    factor_of,
    float_of,
    head_dim_of,
    int_of,
    layer_count,
    layer_kinds,
    short_repr,
)
from model.config_experts import (
    GGUF_KEYS,
    GGUF_NEUTRAL,
    GGUF_SHARED_KEYS,
    experts_from_gguf,
    is_sigmoid_in_gguf,
)
from model.config_latent import GGUF_KEYS as LATENT_KEYS
from model.config_latent import latent_from_gguf, score_scale_from_gguf
from model.families import FAMILIES
from model.family import Family
from model.rope import Rope

type Tensor = Callable[[str], tuple[float, ...]]

# Tensors with the divisors of rotary frequencies.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_DIVISORS, _LONG, _SHORT = ROPE_TENSORS
# The largest models of their families scale scores by hidden size over heads, not by head size. Files do not say so.
_SCALED_BY_HIDDEN = {("gemma2", 46), ("gemma3", 62)}

# Keys of an architecture, without its name, by their effect on the arithmetic. All others are refused.
_HEAD_SIZES = (
    *("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"),
    *("rope.dimension_count", "rope.dimension_count_swa"),
)
_READ = frozenset(
    (
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
        *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scale_linear", "rope.scaling.attn_factor"),
        *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.type", *_HEAD_SIZES),
        "attention.layer_norm_epsilon",
    )
)
_WINDOWS = ("attention.sliding_window", "attention.sliding_window_pattern")
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_LOCAL_BASE = "rope.freq_base_swa"
_SCALES = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
# Keys of single families.
_OWN = {
    "granite": _SCALES,
    "granitemoe": _SCALES,
    "cohere2": ("logit_scale",),
    "mistral3": ("attention.temperature_scale", "rope.scaling.yarn_log_multiplier"),
}
# Architectures of multimodal models whose text is that of a family, and keys that concern the other half.
_TEXT_HALVES = {"qwen2vl": "qwen2", "qwen3vl": "qwen3"}
_AXES = {"rope.dimension_sections", "n_deepstack_layers"}
_IGNORED = frozenset(
    ("pooling_type", "rope.scaling.finetuned", "tensor_data_layout"),
)
# Values at which keys that are not supported have no effect.
_NEUTRAL = {
    **dict.fromkeys((*_WINDOWS, *_CAPS, "attention.clamp_kqv", "attention.max_alibi_bias"), 0),
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_shared_count", "nextn_predict_layers"), 0),
    "attention.causal": True,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_beta_fast": 32,
    "rope.scaling.yarn_beta_slow": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "use_parallel_residual": False,
}


def config_from_gguf(
    metadata: Mapping[str, Any], tensor: Tensor, *, has_output: bool, has_qkv_bias: bool = False
) -> ModelConfig:
    """Read the metadata of a file.

    Args:
        metadata: key -> Python value; `tokenizer.ggml.tokens` gives the vocabulary size if no key does.
        tensor: returns the values of one of ROPE_TENSORS, empty if the file lacks it.
        has_output: whether the file has `output.weight`; without it the head is the embedding.
        has_qkv_bias: whether it has biases of q, k and v, in families that may have them.

    Raises:
        ConfigError: names the key that is missing or not supported.
    """
    arch, family = _family(metadata)
    key = f"{arch}.".__add__
    metadata = {**{key(name): value for name, value in family.gguf_defaults.items()}, **metadata}
    _refuse_unsupported(metadata, family, f"{arch}.")
    heads, hidden = int_of(metadata, key("attention.head_count")), int_of(metadata, key("embedding_length"))
    latent = latent_from_gguf(metadata, key, heads) if family.latent else None
    head_dim = latent.cached if latent else head_dim_of(metadata, key("attention.key_length"), hidden, heads)
    is_partial = family.partial_rotary is not None
    for name in () if latent else _HEAD_SIZES[:3] if is_partial else _HEAD_SIZES:
        if int_of(metadata, key(name), head_dim) != head_dim:
            raise ConfigError(f"{key(name)} differs from the head size {head_dim}: not supported")
    rotated = int_of(metadata, key("rope.dimension_count"), head_dim, low=2, high=head_dim)
    layers, experts = _layers(metadata, family, key, tensor, rotated), experts_from_gguf(metadata, key, family)
    if experts is not None:
        first = int_of(metadata, key("leading_dense_block_count"), 0, low=0)
        layers = tuple(replace(kind, is_sparse=i >= first) for i, kind in enumerate(layers))
    if rotated != head_dim:
        layers = tuple(replace(kind, rope=kind.rope and replace(kind.rope, dims=rotated)) for kind in layers)
    epsilon = "attention.layer_norm_rms_epsilon" if family.norm == "rms" else "attention.layer_norm_epsilon"
    by_hidden = (family.name, len(layers)) in _SCALED_BY_HIDDEN
    scales = _scales(metadata, key, family, hidden, hidden / heads if by_hidden else head_dim)
    if latent:
        scales["attention_scale"] = score_scale_from_gguf(latent, metadata, key)
    return ModelConfig(
        family=family.name,
        vocab_size=_vocab_size(metadata, key("vocab_size")),
        hidden_size=hidden,
        intermediate_size=int_of(metadata, key("feed_forward_length")),
        num_heads=heads,
        num_kv_heads=1 if latent else int_of(metadata, key("attention.head_count_kv"), heads),
        head_dim=head_dim,
        layers=layers,
        # Stored as float32: 9.99999974738e-06 is read as 1e-5.
        rms_norm_eps=float(f"{float_of(metadata, key(epsilon)):.6g}"),
        max_position_embeddings=int_of(metadata, key("context_length")),
        tie_word_embeddings=not has_output,
        attention_cap=float_of(metadata, key("attn_logit_softcapping"), 0.0),
        logit_cap=float_of(metadata, key("final_logit_softcapping"), 0.0),
        experts=experts,
        qkv_bias=has_qkv_bias if isinstance(family.qkv_bias, str) else family.qkv_bias,
        latent=latent,
        **scales,
    )


def _family(metadata: Mapping[str, Any]) -> tuple[str, Family]:
    """The architecture of a file, and its family."""
    arch = metadata.get("general.architecture")
    in_gguf = {name: row for name, row in FAMILIES.items() if row.in_gguf}
    in_gguf |= {name: FAMILIES[family] for name, family in _TEXT_HALVES.items()}
    family = in_gguf.get(arch) if isinstance(arch, str) else None
    if arch == "clip":
        raise ConfigError("general.architecture 'clip' is the part for images or audio; name the language model's file")
    if metadata.get(f"{arch}.expert_count"):
        family = _sparse_family(arch) or family
    if family is None:
        known = ", ".join(sorted(in_gguf))
        raise ConfigError(f"general.architecture {short_repr(arch)} is not known; known: {known}")
    if arch == "deepseek2":
        family = FAMILIES["deepseek3" if is_sigmoid_in_gguf(metadata, arch) else "deepseek2"]
    if family.name == "olmo2" and metadata.get(f"{arch}.{_WINDOWS[0]}"):
        family = FAMILIES["olmo3"]
    return str(arch), family


def _sparse_family(arch: Any) -> Family | None:
    """The family with experts whose files have the architecture of another family, which has none."""
    return next((row for row in FAMILIES.values() if row.experts and row.experts.gguf_architecture == arch), None)


def _vocab_size(metadata: Mapping[str, Any], name: str) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    if not isinstance(tokens, list):
        raise ConfigError("tokenizer.ggml.tokens must be a list")
    return len(tokens) or int_of(metadata, name)


def _scales(
    metadata: Mapping[str, Any], key: Callable[[str], str], family: Family, hidden: int, query_size: float
) -> dict[str, Any]:
    logit_scale = _scale(metadata, key("logit_scale"), 1.0)
    return {
        "attention_scale": _scale(metadata, key("attention.scale"), query_size**-0.5),
        "embedding_scale": _scale(metadata, key("embedding_scale"), hidden**0.5 if family.scaled_embedding else 1.0),
        "residual_scale": _scale(metadata, key("residual_scale"), 1.0),
        "logit_scale": 1 / logit_scale if family.name in ("granite", "granitemoe") else logit_scale,
    }


def _scale(metadata: Mapping[str, Any], name: str, default: float) -> float:
    """A factor, rounded to six digits, since it is stored as float32; 0 is off, as in llama.cpp."""
    value = float_of(metadata, name, 0.0)
    return float(f"{value:.6g}") if value else float(default)


def _refuse_unsupported(metadata: Mapping[str, Any], family: Family, prefix: str) -> None:
    known = _READ | _IGNORED
    known |= _AXES if prefix.removesuffix(".") in _TEXT_HALVES else set()
    if family.has_window and not family.window_flag:  # llama.cpp has no windows for the families with a flag
        known |= {*_WINDOWS}
    # Of Mistral; llama.cpp has no windows here.
    known |= {_WINDOWS[0]} if family.name == "llama" else {*_OWN.get(family.name, ())}
    known |= {name for name in _CAPS if name in family.hf_defaults}
    known |= {_LOCAL_BASE} if family.local_theta else set()
    neutral = _NEUTRAL
    if family.experts:
        known, neutral = known | GGUF_KEYS, _NEUTRAL | GGUF_NEUTRAL
    if family.latent:
        known |= GGUF_SHARED_KEYS | LATENT_KEYS
    values = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    check_keys(values, known, neutral, prefix)


def _layers(
    metadata: Mapping[str, Any], family: Family, key: Callable[[str], str], tensor: Tensor, head_dim: int
) -> tuple[LayerKind, ...]:
    rope = _rope(metadata, key, tensor, head_dim, family)
    local = rope
    if family.local_theta is not None:  # stretched in none of its ways, but scaled
        scale = float_of(metadata, key("rope.scaling.attn_factor"), 1.0)
        theta = rope.theta if family.name == "olmo3" else family.local_theta
        scale = 1.0 if family.name == "olmo3" else scale
        local = Rope(float_of(metadata, key(_LOCAL_BASE), theta, above=1), scale=scale)
    windows = _windows(metadata, family, key)
    period = family.no_rope_period
    uses_rope = [not period or (i + 1) % period != 0 for i in range(len(windows))]
    if family.rope_in_windows and any(windows):
        uses_rope = [window > 0 for window in windows]
    beta = _scale(metadata, key("attention.temperature_scale"), 0.0)
    growth = (beta, int_of(metadata, key("rope.scaling.original_context_length"), low=1)) if beta else None
    return layer_kinds(windows, uses_rope, rope, local, growth)


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


def _rope(
    metadata: Mapping[str, Any], key: Callable[[str], str], tensor: Tensor, head_dim: int, family: Family
) -> Rope:
    """The angles of global layers, by llama.cpp's rules."""
    theta = float_of(metadata, key("rope.freq_base"), 10000.0, above=1)
    length, long = int_of(metadata, key("context_length")), tensor(_LONG)
    original = int_of(metadata, key("rope.scaling.original_context_length"), length, low=2 if long else 1)
    # llama.cpp takes 1 if this is missing, which is wrong for every model with long factors.
    scale = float_of(metadata, key("rope.scaling.attn_factor"), None if long else 1.0)
    old_name, name = "rope.scale_linear", "rope.scaling.factor"
    factor = factor_of(metadata, key(old_name if metadata.get(key(name)) is None else name), 1.0)
    stretch: tuple[float, ...] = ()
    match metadata.get(key("rope.scaling.type"), "linear"):
        case "none":
            pass
        case "yarn":
            multiplier = float_of(metadata, key("rope.scaling.yarn_log_multiplier"), 0.0)
            if not family.latent:  # there it is part of the scores' factor
                scale *= ropes.yarn_scale(factor) / (ropes.yarn_scale(factor, multiplier) if multiplier else 1)
            truncate = family.gguf_yarn_truncate
            stretch = ropes.yarn_divisors(
                theta, head_dim, factor=factor, fast=32, slow=1, original=original, truncate=truncate, min_width=0.001
            )
        case type_ if type_ == "linear" or (type_ == "longrope" and long):
            stretch = (factor,) * (head_dim // 2) if factor != 1 else ()
        case type_:
            known = "none, linear, yarn, longrope with factors"
            raise ConfigError(f"{key('rope.scaling.type')} {short_repr(type_)} is not supported; known: {known}")
    if long:
        return Rope(theta, _product(tensor(_SHORT), stretch), scale, _product(long, stretch), original)
    return Rope(theta, _product(tensor(_DIVISORS), stretch), scale)


def _product(divisors: tuple[float, ...], stretch: tuple[float, ...]) -> tuple[float, ...]:
    if not divisors or not stretch:
        return divisors or stretch
    return tuple(a * b for a, b in zip(divisors, stretch, strict=True)) if len(divisors) == len(stretch) else divisors
