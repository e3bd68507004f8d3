"""ModelConfig from config.json and from GGUF metadata."""

import math
from typing import Any

import pytest

from model.config import ConfigError, LayerKind, ModelConfig
from model.config_hf import config_from_hf
from model.rope import Rope
from tests.support.configs import GGUF, HF, config_from_gguf, ropes, windows

YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0}
EXPECTED = ModelConfig(
    family="llama",
    vocab_size=100,
    hidden_size=48,
    intermediate_size=96,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerKind(Rope(500000.0)),) * 3,
    rms_norm_eps=1e-5,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    attention_scale=8**-0.5,
)


def without(source: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in source.items() if name != key}


def test_config_is_the_same_from_both_formats() -> None:
    assert config_from_hf(HF) == EXPECTED
    assert config_from_gguf(GGUF, has_output=False) == EXPECTED
    assert len({config_from_hf(HF), config_from_gguf(GGUF, has_output=False)}) == 1


def test_dims_has_the_axes_of_the_weight_table() -> None:
    assert EXPECTED.dims() == {
        "V": 100,
        "D": 48,
        "F": 96,
        "Q": 48,
        "KV": 16,
        "QKV": 80,
        "FF": 192,
        "E": 8,
        "H": 6,
        "K": 2,
        "1": 1,
    }


def test_hf_defaults() -> None:
    config = config_from_hf(without(without(without(HF, "num_key_value_heads"), "rope_theta"), "tie_word_embeddings"))
    assert (config.num_kv_heads, config.tie_word_embeddings) == (6, False)
    assert ropes(config) == [Rope(10000.0)] * 3


def test_hf_head_dim_overrides_the_default() -> None:
    assert config_from_hf(HF | {"head_dim": 32}).dims()["Q"] == 192
    assert (
        config_from_hf(HF | {"head_dim": 32, "hidden_size": 50}).dims()["Q"] == 192
    )  # not a multiple of the number of heads


def test_hf_rope_parameters_override_rope_theta() -> None:
    config = config_from_hf(HF | {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}})
    assert ropes(config) == [Rope(7.0)] * 3


def test_hf_model_type_without_architectures() -> None:
    assert config_from_hf(without(HF, "architectures") | {"model_type": "qwen2"}).qkv_bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertModel"]}, "BertModel"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": "100"}, "vocab_size must be an integer"),
        ({"vocab_size": True}, "vocab_size must be an integer"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a number"),
        ({"num_key_value_heads": 4}, "not a multiple of num_kv_heads"),
        ({"num_attention_heads": 7}, "not a multiple of 7 heads"),
        ({"num_attention_heads": 0}, "not a multiple of 0 heads"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rotary factor must be"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "of type 'ntk' is not supported; known: default"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor is missing"),
        ({"rope_theta": 1.0}, "rope_theta must be above 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be from 1 to"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be from 1 to 1000, got 1000000000000"),
        ({"layer_types": ["full_attention"]}, "layer_types must be 3"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types must be 3"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window is missing"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": -1}, "sliding_window must be from 1"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window must be from 1"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_size": 0}, "hidden size 0 is not a multiple"),
        ({"hidden_size": 2**31}, "hidden_size must be from -2147483647 to 2147483647"),
        ({"num_attention_heads": 0, "head_dim": 8}, "hidden size 48 is not a multiple of 0 heads$"),
        ({"head_dim": -8}, "head_dim must be from 1 to 65536, got -8"),
        ({"head_dim": 2**17}, "head_dim must be from 1 to 65536"),
        ({"rope_theta": 10**400}, "rope_theta must be finite"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps must be finite"),
        ({"rope_scaling": {"rope_type": []}}, r"of type \[\] is not supported"),
        ({"rope_scaling": YARN | {"factor": 1e16}}, "^factor must be from 1 to 1e"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "must be from 1 to 2147483647, got 0"),
        ({"rope_scaling": YARN | {"beta_fast": 0}}, "beta_fast must be from"),
        ({"rope_scaling": YARN | {"beta_slow": 1e300}}, "beta_slow must be from"),
        ({"rope_scaling": YARN | {"mscale_all_dim": -1, "mscale": 1}}, "is negative"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [10**400]}}, "short_factor must be finite"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [[], 0, 1]}, "must be 3 of 0 and 1"),
        ({"hidden_act": "x" * 10**6}, "hidden_act 'x{90,}[.]{3}x{90,}' is not supported"),
    ],
)
def test_hf_rejects(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_hf(HF | change)


def test_gguf_without_output_ties_the_head() -> None:
    assert not config_from_gguf(GGUF, has_output=True).tie_word_embeddings


def test_gguf_defaults() -> None:
    config = config_from_gguf(without(GGUF, "llama.attention.head_count_kv"), has_output=True)
    assert config.num_kv_heads == 6
    assert ropes(config_from_gguf(without(GGUF, "llama.rope.freq_base"), has_output=True)) == [Rope(10000.0)] * 3


def test_gguf_vocabulary_size_without_a_token_list() -> None:
    config = config_from_gguf(without(GGUF, "tokenizer.ggml.tokens") | {"llama.vocab_size": 90}, has_output=True)
    assert config.vocab_size == 90


def test_gguf_keys_follow_the_architecture() -> None:
    metadata = {key.replace("llama.", "qwen2."): value for key, value in GGUF.items()}
    assert config_from_gguf(metadata | {"general.architecture": "qwen2"}, has_output=False).family == "qwen2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "bert"}, "'bert' is not known"),
        ({"general.architecture": None}, "None is not known"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.attention.head_count": [6, 6, 6]}, "llama.attention.head_count must be an integer"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 0.5}, "scaling.factor must be from 1 to"),
        ({"llama.block_count": -1}, "block_count must be from 1"),
        ({"llama.attention.value_length": 16}, "differs from the head size 8"),
        ({"llama.rope.dimension_count": 4}, "differs from the head size 8"),
        ({"llama.block_count": 1001}, "block_count must be from 1 to 1000"),
        ({"llama.embedding_length": 0}, "hidden size 0 is not a multiple"),
        ({"llama.attention.key_length": 0}, "llama.attention.key_length must be from 1 to 65536, got 0"),
        ({"llama.attention.key_length": 2**30}, "llama.attention.key_length must be from 1 to 65536"),
        ({"llama.rope.freq_base": math.nan}, "rope.freq_base must be finite"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 1e30}, "must be from 1 to 1e"),
        (
            {"llama.rope.scaling.original_context_length": 0},
            "original_context_length must be from 1 to 2147483647, got 0",
        ),
        ({"llama.rope.scaling.type": ["yarn"]}, "is not supported; known: none, linear, yarn"),
    ],
)
def test_gguf_rejects(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_gguf(GGUF | change, has_output=True)


def test_gguf_long_factors_need_a_length_to_be_stretched() -> None:
    tensors = dict.fromkeys(("rope_factors_long", "rope_factors_short"), (1.0,) * 4)
    with pytest.raises(ConfigError, match="original_context_length must be from 2 to 2147483647, got 1"):
        config_from_gguf(GGUF | {"llama.rope.scaling.original_context_length": 1}, has_output=True, **tensors)


def test_windows_of_smollm3_are_on_layers_without_rope() -> None:
    smollm3 = HF | {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0, 1]}
    config = config_from_hf(smollm3 | {"use_sliding_window": True, "sliding_window": 64})
    assert windows(config) == [0, 64, 0]
    assert [rope is None for rope in ropes(config)] == [False, True, False]
    assert windows(config_from_hf(smollm3 | {"sliding_window": 64})) == [0, 0, 0]


@pytest.mark.parametrize(
    ("architecture", "change", "expected"),
    [
        ("Qwen2ForCausalLM", {"sliding_window": 64}, [0, 0, 0]),
        ("Qwen2ForCausalLM", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, [0, 64, 64]),
        ("MistralForCausalLM", {}, [4096] * 3),
        ("MistralForCausalLM", {"sliding_window": None}, [0] * 3),
        ("Gemma2ForCausalLM", {"hidden_act": "gelu_pytorch_tanh"}, [4096, 0, 4096]),
        ("Gemma3ForCausalLM", {"hidden_act": "gelu_pytorch_tanh", "sliding_window_pattern": 3}, [4096, 4096, 0]),
        ("Phi3ForCausalLM", {"sliding_window": 2047}, [2047] * 3),
        ("LlamaForCausalLM", {}, [0] * 3),
    ],
)
def test_windows_equal_transformers(architecture: str, change: dict[str, Any], expected: list[int]) -> None:
    assert windows(config_from_hf(HF | {"architectures": [architecture]} | change)) == expected
