"""Experts of a network, and which of its layers have them, from `config.json` and GGUF metadata."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from model.config import ConfigError, Experts, LayerKind, bool_of, int_of, short_repr
from model.family import Family

_MAX_EXPERTS = 1 << 14
HF_KEYS = frozenset(("num_experts", "num_local_experts"))  # of families with experts, besides their `hf_defaults`
GGUF_KEYS = frozenset(("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_weights_norm"))
# Values of further keys at which they have no effect: a softmax over all experts, whose weights are not scaled.
GGUF_NEUTRAL = {"expert_gating_func": 1, "expert_weights_scale": 1, "expert_shared_count": 0, "expert_group_count": 0}


def experts_from_hf(config: Mapping[str, Any], family: Family) -> Experts | None:
    """The experts that `config.json` describes; None if the family has none.

    Raises:
        ConfigError: names the key that is missing or contradicts another.
    """
    if family.experts is None:
        return None
    count, same = (config.get(key) for key in ("num_experts", "num_local_experts"))
    if count is not None and same is not None and count != same:
        raise ConfigError(f"num_experts {short_repr(count)} and num_local_experts {short_repr(same)} differ")
    return Experts(
        count=int_of(config, "num_experts" if same is None else "num_local_experts", low=1, high=_MAX_EXPERTS),
        per_token=int_of(config, "num_experts_per_tok", low=1),
        size=int_of(config, family.experts.hf_size, low=1),
        normalized=bool_of(config, "norm_topk_prob", True),
    )


def sparse_layers(config: Mapping[str, Any], family: Family, layers: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The layers of `config.json`, with those marked that have experts: all, unless the family has keys for it.

    Raises:
        ConfigError: names a key that is not valid.
    """
    if family.experts is None:
        return tuple(layers)
    period = int_of(config, "decoder_sparse_step", 1, low=1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise ConfigError("mlp_only_layers must be a list of integers")
    return tuple(replace(kind, is_sparse=(i + 1) % period == 0 and i not in dense) for i, kind in enumerate(layers))


def experts_from_gguf(metadata: Mapping[str, Any], key: Callable[[str], str], family: Family) -> Experts | None:
    """The experts of a GGUF file; None if the family has none.

    Raises:
        ConfigError: names the key that is missing or not valid.
    """
    if family.experts is None:
        return None
    is_normalized = metadata.get(key("expert_weights_norm"))
    return Experts(
        count=int_of(metadata, key("expert_count"), low=1, high=_MAX_EXPERTS),
        per_token=int_of(metadata, key("expert_used_count"), low=1),
        size=int_of(metadata, key("expert_feed_forward_length"), int_of(metadata, key("feed_forward_length")), low=1),
        normalized=family.experts.gguf_normalized if is_normalized is None else bool(is_normalized),
    )
