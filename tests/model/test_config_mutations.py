"""Mutated config.json files: each gives the network of Hugging Face's modules, or is refused by a key's name.

The expected values are from golden/make_configs.py, those of experts from golden/make_expert_configs.py.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.config import ConfigError, LayerKind, ModelConfig
from model.config_hf import config_from_hf
from model.rope import Rope

FOLDER = Path(__file__).parent / "golden"
GOLDEN: dict[str, Any] = json.loads((FOLDER / "configs.json").read_text("utf-8"))
EXPERTS: dict[str, Any] = json.loads((FOLDER / "expert_configs.json").read_text("utf-8"))
# Of all cases: (accepted here, accepted by transformers).
COUNTS = {(True, True): 904, (True, False): 56, (False, True): 189, (False, False): 111}


def changed_keys(value: dict[str, Any]) -> set[str]:
    """Keys at all levels."""
    inner = [changed_keys(item) for item in value.values() if isinstance(item, dict)]
    return {*value}.union(*inner)


def read(case: dict[str, Any], bases: dict[str, Any] = GOLDEN["bases"]) -> ModelConfig | ConfigError:
    config = bases[case["base"]] | case["change"]
    try:
        return config_from_hf({key: value for key, value in config.items() if key not in case["drop"]})
    except ConfigError as error:
        return error


def check_rope(rope: Rope, head_dim: int, short: int, long: int, scale: float) -> None:
    head_dim = rope.dims or head_dim
    frequencies = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    for divisors, table in ((rope.divisors, short), (rope.long_divisors or rope.divisors, long)):
        np.testing.assert_allclose(frequencies / (divisors or 1.0), GOLDEN["tables"][table], rtol=3e-6)
    assert rope.scale == pytest.approx(scale, rel=1e-6)


def check_layer(kind: LayerKind, head_dim: int, expected: list[Any]) -> None:
    assert kind.window == expected[-1]
    assert (kind.rope is None) == (len(expected) == 1)
    if kind.rope is not None:
        check_rope(kind.rope, head_dim, *expected[:-1])


def check(config: ModelConfig, case: dict[str, Any]) -> None:
    assert config.traits.hf_architecture == f"{case['family']}ForCausalLM"
    for kind, expected in zip(config.layers, case["layers"], strict=True):
        check_layer(kind, config.head_dim, expected)
    for name in ("head_dim", "num_kv_heads", "rms_norm_eps"):
        assert getattr(config, name) == case[name]
    assert config.tie_word_embeddings == case["tied"]
    assert config.attention_scale == pytest.approx(case["scale"])
    assert [config.attention_cap, config.logit_cap] == [cap or 0.0 for cap in case["caps"]]
    assert config.traits.activation == case["activation"]
    names = "qkvo" if config.traits.out_bias else "qkv"
    biases = {f"self_attn.{name}_proj.bias" for name in names} if config.qkv_bias else set()
    biases |= {"mlp.router.bias"} if config.experts and config.traits.experts and config.traits.experts.bias else set()
    assert {name for name in case["biases"] if "norm" not in name and name != "bias"} == biases
    check_factors(config, case)


def check_factors(config: ModelConfig, case: dict[str, Any]) -> None:
    """Constants that only some families have."""
    experts = config.experts and [config.experts.count, config.experts.per_token]
    assert experts == case.get("experts")
    if "embedding_multiplier" in case:
        assert config.embedding_scale == case["embedding_multiplier"]
        assert config.residual_scale == case["residual_multiplier"]
    assert config.logit_scale == pytest.approx(case.get("logit_scale", 1.0) / case.get("logits_scaling", 1.0))
    assert {kind.query_growth for kind in config.layers} == {tuple(case["growth"]) if "growth" in case else None}


@pytest.mark.parametrize("base", GOLDEN["bases"])
def test_mutated_configurations_equal_transformers(base: str) -> None:
    for case in GOLDEN["cases"]:
        if case["base"] != base or "error" in case:
            continue
        result = read(case)
        if isinstance(result, ConfigError):
            keys = changed_keys(case["change"]) | {*case["drop"]}
            assert any(key in str(result) for key in keys), (case, str(result))
        else:
            check(result, case)


def test_most_mutations_that_transformers_takes_are_compared() -> None:
    accepted = Counter((not isinstance(read(case), ConfigError), "error" not in case) for case in GOLDEN["cases"])
    assert accepted == COUNTS


@pytest.mark.parametrize("base", EXPERTS["bases"])
def test_mutated_experts_equal_transformers(base: str) -> None:
    compared = 0
    for case in EXPERTS["cases"]:
        if case["base"] != base:
            continue
        result = read(case, EXPERTS["bases"])
        if isinstance(result, ConfigError):
            # num_experts and num_local_experts are one key.
            keys = {key.replace("_local", "") for key in (*case["change"], *case["drop"])}
            assert "error" in case or any(key in str(result).replace("_local", "") for key in keys), (case, result)
        else:
            assert experts_of(result) == case["layers"], case
            compared += 1
    assert compared > 10


def experts_of(config: ModelConfig) -> list[list[Any] | None]:
    experts = config.experts
    assert experts is not None
    sizes = [experts.count, experts.per_token, experts.size, experts.normalized]
    return [sizes if kind.is_sparse else None for kind in config.layers]
