"""Experts of a network, and which of its layers have them, from `config.json` and GGUF metadata."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from model.config import ConfigError, Experts, LayerKind, bool_of, float_of, int_of, short_repr, strings_of
from model.family import Family

_MAX_EXPERTS = 1 << 14
HF_KEYS = frozenset(("num_experts", "num_local_experts"))  # of families with experts, besides their `hf_defaults`
GGUF_KEYS = frozenset(("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_weights_norm"))
# Values of further keys at which they have no effect: a softmax over all experts, whose weights are not scaled.
GGUF_SHARED_KEYS = frozenset(
    (
        *("expert_gating_func", "expert_weights_scale", "expert_shared_count"),
        *("expert_group_count", "expert_group_used_count"),
    )
)
GGUF_NEUTRAL = {"expert_gating_func": 1, "expert_weights_scale": 1, "expert_shared_count": 0, "expert_group_count": 0}


def experts_from_hf(config: Mapping[str, Any], family: Family) -> Experts | None:
    """The experts that `config.json` describes; None if the family has none.

    Raises:
        ConfigError: names the key that is missing or contradicts another.
    """
    if family.experts is None:
        return None
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    counts = {key: config[key] for key in keys if config.get(key) is not None}
    first = next(iter(counts), "num_experts")
    for key, count in counts.items():
        if count != counts[first]:
            raise ConfigError(f"{key} {short_repr(count)} and {first} {short_repr(counts[first])} differ")
    experts = Experts(
        count=int_of(config, first, low=1, high=_MAX_EXPERTS),
        per_token=int_of(config, "num_experts_per_tok", low=1),
        size=int_of(config, family.experts.hf_size, low=1),
        normalized=bool_of(config, "norm_topk_prob", True),
    )
    return _with_shared(config, family, experts) if family.experts.shared else experts


def _with_shared(config: Mapping[str, Any], family: Family, experts: Experts) -> Experts:
    """The experts of the DeepSeek families, with the router's other values."""
    is_sigmoid = family.experts is not None and family.experts.choice_bias
    if experts.normalized and not is_sigmoid:  # transformers does not read the key
        raise ConfigError("norm_topk_prob True is not supported for this architecture")
    if not is_sigmoid and config.get("topk_method") not in ("greedy", "group_limited_greedy"):
        known = "greedy, group_limited_greedy"
        raise ConfigError(f"topk_method {short_repr(config.get('topk_method'))} is not supported; known: {known}")
    has_groups = is_sigmoid or config["topk_method"] != "greedy"
    return replace(
        experts,
        scoring="sigmoid" if is_sigmoid else "softmax",
        groups=int_of(config, "n_group", low=1) if has_groups else 1,
        open_groups=int_of(config, "topk_group", low=1) if has_groups else 1,
        scale=float_of(config, "routed_scaling_factor"),
        shared_size=experts.size * int_of(config, "n_shared_experts", low=1, high=_MAX_EXPERTS),
    )


def sparse_layers(config: Mapping[str, Any], family: Family, layers: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The layers of `config.json`, with those marked that have experts: all, unless the family has keys for it.

    Raises:
        ConfigError: names a key that is not valid.
    """
    if family.experts is None:
        return tuple(layers)
    if family.experts.shared:
        return _after_dense(config, family, layers)
    period = int_of(config, "decoder_sparse_step", 1, low=1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise ConfigError("mlp_only_layers must be a list of integers")
    return tuple(replace(kind, is_sparse=(i + 1) % period == 0 and i not in dense) for i, kind in enumerate(layers))


def _after_dense(config: Mapping[str, Any], family: Family, layers: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The layers of a DeepSeek family: the first ones are dense."""
    types = strings_of(config, "mlp_layer_types")
    if types and (len(types) != len(layers) or not set(types) <= {"dense", "sparse"}):
        raise ConfigError(f"mlp_layer_types must be {len(layers)} of dense, sparse")
    first = 1 if "mlp_layer_types" in family.hf_defaults else int_of(config, "first_k_dense_replace", 0, low=0)
    types = types or ["dense" if i < first else "sparse" for i in range(len(layers))]
    return tuple(replace(kind, is_sparse=name == "sparse") for kind, name in zip(layers, types, strict=True))


def experts_from_gguf(metadata: Mapping[str, Any], key: Callable[[str], str], family: Family) -> Experts | None:
    """The experts of a GGUF file; None if the family has none.

    Raises:
        ConfigError: names the key that is missing or not valid.
    """
    if family.experts is None:
        return None
    is_normalized = metadata.get(key("expert_weights_norm"))
    experts = Experts(
        count=int_of(metadata, key("expert_count"), low=1, high=_MAX_EXPERTS),
        per_token=int_of(metadata, key("expert_used_count"), low=1),
        size=int_of(metadata, key("expert_feed_forward_length"), int_of(metadata, key("feed_forward_length")), low=1),
        normalized=family.experts.gguf_normalized if is_normalized is None else bool(is_normalized),
    )
    return _with_shared_of_gguf(metadata, key, family, experts) if family.experts.shared else experts


def is_sigmoid_in_gguf(metadata: Mapping[str, Any], arch: str) -> bool:
    """Whether a file of `deepseek2` has a router of V3. Early ones of GLM-4.7-Flash do not say so."""
    gating = metadata.get(f"{arch}.expert_gating_func")
    tokens, blocks = metadata.get("tokenizer.ggml.tokens"), metadata.get(f"{arch}.block_count")
    return gating == 2 if gating else blocks in (47, 48) and isinstance(tokens, list) and len(tokens) == 154880


def _with_shared_of_gguf(
    metadata: Mapping[str, Any], key: Callable[[str], str], family: Family, experts: Experts
) -> Experts:
    is_sigmoid = family.experts is not None and family.experts.choice_bias
    if metadata.get(key("expert_gating_func")) not in (None, 0, 2 if is_sigmoid else 1):
        gating = short_repr(metadata[key("expert_gating_func")])
        raise ConfigError(f"{key('expert_gating_func')} {gating} is not supported")
    groups = int_of(metadata, key("expert_group_count"), 0) or 1
    if (groups > 1 or experts.normalized) and not is_sigmoid:  # llama.cpp's groups are those of V3
        name = "expert_group_count" if groups > 1 else "expert_weights_norm"
        raise ConfigError(f"{key(name)} {short_repr(metadata[key(name)])} is not supported with a softmax")
    scale = float_of(metadata, key("expert_weights_scale"), 0.0)
    return replace(
        experts,
        scoring="sigmoid" if is_sigmoid else "softmax",
        groups=groups,
        open_groups=int_of(metadata, key("expert_group_used_count"), low=1) if groups > 1 else 1,
        scale=float(f"{scale:.6g}") if scale else 1.0,
        shared_size=experts.size * int_of(metadata, key("expert_shared_count"), low=1, high=_MAX_EXPERTS),
    )
