"""No key of a model's file that may change the arithmetic is ignored."""

import math
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from model.config import ConfigError, ModelConfig
from model.config_hf import config_from_hf
from model.families import FAMILIES
from model.rope import Rope, yarn_divisors
from tests.support.configs import GGUF, HF, config_from_gguf, ropes, windows

_LINEAR = {"rope_type": "linear", "factor": 4.0}
_OPTIONS: dict[str, Any] = {"fast": 32, "slow": 1, "original": 512, "truncate": True}


def renamed(architecture: str, **keys: Any) -> ModelConfig:
    """Of a GGUF file of another architecture, with more of its keys; "__" stands for a dot."""
    metadata = {key.replace("llama.", f"{architecture}."): value for key, value in GGUF.items()}
    more = {f"{architecture}.{key.replace('__', '.')}": value for key, value in keys.items()}
    return config_from_gguf(metadata | {"general.architecture": architecture} | more, has_output=True)


def gguf(change: dict[str, Any], **tensors: tuple[float, ...]) -> ModelConfig:
    change = {f"llama.{key}": value for key, value in change.items()}
    return config_from_gguf(GGUF | change, has_output=True, **tensors)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_hf_takes_all_keys_that_transformers_writes(family: Any) -> None:
    keys = {**family.hf_required, **({"num_experts_per_tok": 6} if family.name == "deepseek2" else {})}
    if family.recurrent:
        keys["layer_types"] = ["full_attention"] * 32
    written = CONFIG_MAPPING[family.hf_model_type or family.name](architectures=[family.hf_architecture], **keys)
    assert config_from_hf(written.to_dict()) == config_from_hf(written.to_diff_dict())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"residual_multiplier": 0.5}, "residual_multiplier 0.5"),
        ({"text_config": {"hidden_size": 8}}, "text_config"),
        ({"sliding_window": 64}, "sliding_window 64"),
        ({"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"model_type": "mistral"}, "model_type 'mistral' is not that of LlamaForCausalLM"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.75}}, "rope_scaling.partial_rotary_"),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1]}}, r"rope_parameters.mrope_section \[1\]"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention"),
        ({"rope_scaling": _LINEAR | {"type": "yarn"}}, "rope_type 'linear' and type 'yarn' of rope_scaling differ"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_hf_refuses_keys_by_name(change: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        config_from_hf(HF | change)


def test_hf_phi3_with_a_nested_partial_rotary_factor() -> None:
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    phi3 = HF | {"architectures": ["Phi3ForCausalLM"]}
    assert ropes(config_from_hf(phi3 | {"rope_parameters": parameters})) == [Rope(10000.0)] * 3
    partial = config_from_hf(phi3 | {"rope_parameters": parameters | {"partial_rotary_factor": 0.75}})
    assert ropes(partial) == [Rope(10000.0, dims=6)] * 3
    with pytest.raises(ConfigError, match=r"partial_rotary_factor 0.4 does not give an even part of head_dim 8"):
        config_from_hf(phi3 | {"partial_rotary_factor": 0.4})


def test_hf_rope_scaling_takes_precedence_as_in_transformers() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    config = config_from_hf(HF | {"rope_parameters": parameters, "rope_scaling": yarn})
    divisors = yarn_divisors(5e5, 8, factor=4.0, **_OPTIONS)
    assert ropes(config) == [Rope(5e5, divisors, 0.1 * math.log(4) + 1)] * 3


@pytest.mark.parametrize(
    "keys",
    [
        {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1},
        {"layer_types": ["full_attention"] * 3},
        {"attention_bias": False, "pretraining_tp": 2, "temperature": 0.1, "unknown": None},
        {"rope_scaling": {"rope_type": "default", "factor": 4.0, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {}, "rope_scaling": None},
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},  # SmolLM2
    ],
)
def test_hf_takes_keys_without_effect(keys: dict[str, Any]) -> None:
    assert config_from_hf(HF | keys) == config_from_hf(HF)


def test_hf_gemma2_with_both_names_of_its_window() -> None:
    gemma2 = HF | {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 64}
    assert config_from_hf(gemma2 | {"sliding_window_size": 64}) == config_from_hf(gemma2)
    with pytest.raises(ConfigError, match="sliding_window_size 32"):
        config_from_hf(gemma2 | {"sliding_window_size": 32})


# llama.cpp: scaling is linear unless the file says otherwise, and the old key counts if the new one is missing.
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope.scale_linear": 4.0}, Rope(5e5, (4.0,) * 4)),
        ({"rope.scaling.factor": 4.0}, Rope(5e5, (4.0,) * 4)),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, Rope(5e5, (4.0,) * 4)),
        ({"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}, Rope(5e5)),
        ({"rope.scaling.attn_factor": 1.25}, Rope(5e5, (), 1.25)),
        ({"rope.scale_linear": 4.0, "rope.scaling.attn_factor": 1.25}, Rope(5e5, (4.0,) * 4, 1.25)),
    ],
)
def test_gguf_scaling_by_the_rules_of_llama_cpp(change: dict[str, Any], expected: Rope) -> None:
    assert ropes(gguf(change)) == [expected] * 3


def test_gguf_factors_of_frequencies_multiply_those_of_the_scaling_type() -> None:
    factors = (1.0, 1.5, 2.0, 8.0)
    assert ropes(gguf({"rope.scale_linear": 4.0}, rope_freqs=factors))[0] == Rope(5e5, (4.0, 6.0, 8.0, 32.0))
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.25}
    divisors = yarn_divisors(5e5, 8, factor=4.0, **_OPTIONS)
    expected = Rope(5e5, tuple(a * b for a, b in zip(divisors, factors, strict=True)), 1.25 * (0.1 * math.log(4) + 1))
    assert ropes(gguf(yarn, rope_freqs=factors))[0] == expected
    long = gguf({"rope.scaling.attn_factor": 1.25, "rope.scale_linear": 2.0}, rope_factors_long=factors)
    assert ropes(long)[0] == Rope(5e5, (2.0,) * 4, 1.25, (2.0, 3.0, 4.0, 16.0), 512)


def test_gguf_yarn_stretches_as_llama_cpp_if_the_range_of_pairs_is_empty() -> None:
    # Bounds by hand: floor(8 ln(1e7 / 64 pi) / (2 ln 10)) = 18 and min(ceil(24.8), 7), so (pair - 18) / 0.001 < 0.
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.freq_base": 10.0}
    (rope,) = set(ropes(gguf(yarn | {"rope.scaling.original_context_length": 10**7})))
    assert rope is not None
    assert rope.divisors == (1.0,) * 4


def test_gguf_gemma_defaults_are_those_of_llama_cpp() -> None:
    gemma2 = renamed("gemma2")
    assert (windows(gemma2), gemma2.attention_cap, gemma2.logit_cap) == ([4096, 0, 4096], 50.0, 30.0)
    gemma3 = renamed("gemma3", attention__sliding_window=64, rope__scaling__attn_factor=1.25, rope__scale_linear=8.0)
    assert set(ropes(gemma3)) == {Rope(10000.0, scale=1.25)}  # of windows: every sixth layer is global
    gemma3 = renamed("gemma3", attention__sliding_window=64, rope__freq_base_swa=777.0, block_count=6)
    assert set(ropes(gemma3)) == {Rope(777.0), Rope(5e5)}
    assert windows(renamed("gemma3")) == [0] * 3


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"expert_count": 8}, "llama.expert_used_count is missing"),
        ({"attention.scale": 0.5}, "llama.attention.scale"),
        ({"attention.sliding_window_pattern": 2}, "llama.attention.sliding_window_pattern 2"),
        ({"attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping"),
        ({"attention.causal": False}, "llama.attention.causal"),
        ({"rope.freq_base_swa": 5e5}, "llama.rope.freq_base_swa"),
        ({"rope.dimension_sections": [1, 2]}, "llama.rope.dimension_sections"),
        ({"rope.scaling.yarn_beta_fast": 16.0}, "llama.rope.scaling.yarn_beta_fast 16.0"),
        ({"rope.scaling.alpha": 2.0}, "llama.rope.scaling.alpha"),
        ({"attention.value_length_swa": 4}, "llama.attention.value_length_swa differs from the head size 8"),
        ({"future_key": 1}, "llama.future_key 1"),
    ],
)
def test_gguf_refuses_keys_by_name(change: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        gguf(change)


def test_gguf_long_factors_need_their_scale() -> None:
    with pytest.raises(ConfigError, match=r"llama\.rope.scaling.attn_factor is missing"):
        gguf({}, rope_factors_long=(1.0,) * 4)


def test_gguf_takes_keys_without_effect() -> None:
    keys = {"expert_count": 0, "rope.scaling.finetuned": True, "attention.causal": True, "pooling_type": 3}
    other = {"qwen2.rope.scale_linear": 4.0}  # of another architecture
    assert gguf(keys | {"attention.sliding_window": 0}) == gguf({})
    assert config_from_gguf(GGUF | other, has_output=True) == gguf({})
