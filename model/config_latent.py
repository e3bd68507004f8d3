"""Sizes of latent attention from `config.json` and GGUF metadata."""

from collections.abc import Callable, Mapping
from typing import Any

from model import rope as ropes
from model.config import ConfigError, factor_of, float_of, int_of, short_repr
from model.latent import Latent

_MAX_SIZE = 1 << 16
GGUF_KEYS = frozenset(
    (
        *("attention.q_lora_rank", "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla"),
        *("rope.scaling.yarn_log_multiplier", "leading_dense_block_count"),
    )
)


def latent_from_hf(config: Mapping[str, Any], heads: int) -> Latent:
    """The sizes in `config.json`.

    Raises:
        ConfigError: names the key that is missing or contradicts another; also raised by the other functions.
    """
    query_rank = 0 if config.get("q_lora_rank") is None else int_of(config, "q_lora_rank", low=1, high=_MAX_SIZE)
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    rank, rope, nope, value = (int_of(config, name, low=1, high=_MAX_SIZE) for name in names)
    latent = Latent(rank, rope, nope, value, query_rank)
    for key, size in (("num_key_value_heads", heads), ("head_dim", latent.rope), ("qk_head_dim", latent.query)):
        if int_of(config, key, size) != size:
            raise ConfigError(f"{key} {short_repr(config[key])} is not supported; latent attention needs {size}")
    return latent


def score_scale_from_hf(latent: Latent, parameters: Mapping[str, Any]) -> float:
    """The factor of scores: with YaRN that of the angles, by `mscale_all_dim`, is part of it."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    share = float_of(parameters, "mscale_all_dim", 0.0)
    growth = ropes.yarn_scale(factor_of(parameters, "factor"), share) if share and kind != "default" else 1.0
    return float(growth**2 * latent.query**-0.5)


def latent_from_gguf(metadata: Mapping[str, Any], key: Callable[[str], str], heads: int) -> Latent:
    """The sizes in GGUF metadata: older files have those of a head under the usual keys."""
    rank = int_of(metadata, key("attention.kv_lora_rank"), low=1, high=_MAX_SIZE)
    rope = int_of(metadata, key("rope.dimension_count"), low=2, high=_MAX_SIZE)
    is_split = metadata.get(key("attention.key_length_mla")) is not None
    suffix = "_mla" if is_split else ""
    query, value = (
        int_of(metadata, key(f"attention.{name}_length{suffix}"), low=1, high=_MAX_SIZE) for name in ("key", "value")
    )
    if query <= rope:
        raise ConfigError(f"{key('rope.dimension_count')} {rope} leaves nothing of queries of {query} elements")
    sizes = {"attention.key_length": rank + rope, "attention.value_length": rank} if is_split else {}
    for name, size in {**sizes, "attention.head_count_kv": 1 if is_split else heads}.items():
        if int_of(metadata, key(name), size) != size:
            raise ConfigError(f"{key(name)} is not {size}: not supported")
    return Latent(rank, rope, query - rope, value, int_of(metadata, key("attention.q_lora_rank"), 0, low=0))


def score_scale_from_gguf(latent: Latent, metadata: Mapping[str, Any], key: Callable[[str], str]) -> float:
    """As `score_scale_from_hf`; the key is a tenth of `mscale_all_dim`, rounded to float32."""
    growth = 1.0
    if metadata.get(key("rope.scaling.type")) == "yarn":
        multiplier = float_of(metadata, key("rope.scaling.yarn_log_multiplier"))
        share = float(f"{10 * multiplier:.6g}")
        growth = ropes.yarn_scale(factor_of(metadata, key("rope.scaling.factor")), share)
    return float(growth**2 * latent.query**-0.5)
