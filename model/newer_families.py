"""Rows of `families.py`: dense families of 2025."""

from typing import Any

from model.family import Family

# Read by the code of the first release only.
_COHERE2_FLAGS = ("use_embedding_sharing", "use_gated_activation", "use_parallel_block", "use_parallel_embedding")
_COHERE2: dict[str, Any] = dict.fromkeys(_COHERE2_FLAGS, True) | {"layer_switch": 4, "use_qk_norm": False}
_COHERE2 |= {"order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj", "rotary_pct": 1}
_GRANITE: dict[str, Any] = dict.fromkeys(
    ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"), 1.0
)
# Of layers that dense models without recurrent layers do not have.
_UNUSED = ("num_experts_per_tok", "intermediate_size", "normalization_function", "init_method", "time_step_limit")
_MAMBA = ("n_heads", "n_groups", "d_state", "d_head", "d_conv", "expand", "chunk_size", "conv_bias", "proj_bias")
_GRANITE4 = _GRANITE | dict.fromkeys((*_UNUSED, *(f"mamba_{name}" for name in _MAMBA)))
_GRANITE4 |= {"shared_intermediate_size": 1024, "max_position_embeddings": 2048}

NEWER_FAMILIES = (
    Family(  # GGUF files are of architecture "olmo2" and have a window
        name="olmo3",
        hf_architecture="Olmo3ForCausalLM",
        in_gguf=False,
        qk_norm=("Q", "KV"),
        pre_norm=False,
        post_norm=True,
        local_period=4,
        local_theta=5e5,
        hf_defaults={"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096, "layer_types": None},
    ),
    Family(
        name="mistral3",
        hf_architecture="Ministral3ForCausalLM",
        hf_model_type="ministral3",
        gguf_interleaved_rotary=True,
        rope_keys=("llama_4_scaling_beta", "max_position_embeddings"),
        hf_defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 262144,
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    Family(
        name="granite",
        hf_architecture="GraniteForCausalLM",
        gguf_interleaved_rotary=True,
        hf_defaults=_GRANITE,
    ),
    Family(  # its dense models without recurrent layers, whose GGUF files are of architecture "granite"
        name="granite4",
        hf_architecture="GraniteMoeHybridForCausalLM",
        hf_model_type="granitemoehybrid",
        in_gguf=False,
        fused=("gate_up",),
        mlp_names=("shared_mlp.input_linear", "shared_mlp.output_linear"),
        hf_defaults=_GRANITE4,
        hf_required={"num_local_experts": 0, "position_embedding_type": "rope"},
        recurrent=True,
    ),
    Family(
        name="seed_oss",
        hf_architecture="SeedOssForCausalLM",
        qkv_bias="attention_bias",
        norm_names={"mlp_norm": ("post_attention_layernorm", "post_attention_norm")},
        hf_defaults={"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True, "residual_dropout": None},
        hf_neutral={"attention_out_bias": False},
    ),
    Family(
        name="glm4",
        hf_architecture="Glm4ForCausalLM",
        interleaved_rotary=True,
        fused=("gate_up",),
        qkv_bias="attention_bias",
        post_norm=True,
        partial_rotary=0.5,
        norm_names={
            "attention_post_norm": ("post_self_attn_layernorm", "post_attention_norm"),
            "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
            "mlp_post_norm": ("post_mlp_layernorm", "post_ffw_norm"),
        },
        hf_defaults={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 0.00000015625,
            "max_position_embeddings": 131072,
            "attention_bias": True,
        },
    ),
    Family(
        name="exaone4",
        hf_architecture="Exaone4ForCausalLM",
        qk_norm=("E", "E"),
        pre_norm=False,
        post_norm=True,
        local_period=4,
        rope_in_windows=True,
        hf_defaults={
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
        },
    ),
    Family(
        name="ernie4_5",
        hf_architecture="Ernie4_5ForCausalLM",
        interleaved_rotary=True,
        hf_defaults={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "tie_word_embeddings": True,
            "max_position_embeddings": 131072,
        },
        hf_neutral={"use_bias": False},
    ),
    Family(
        name="hunyuan-dense",
        hf_architecture="HunYuanDenseV1ForCausalLM",
        hf_model_type="hunyuan_v1_dense",
        qk_norm=("E", "E"),
        qk_norm_after_rope=True,
        norm_names={"q_norm": ("query_layernorm", "attn_q_norm"), "k_norm": ("key_layernorm", "attn_k_norm")},
        rope_keys=("alpha",),
        hf_defaults={"rms_norm_eps": 1e-5, "eod_token_id": None},
        hf_neutral={"use_qk_norm": True, "use_cla": False, "norm_type": "rms", "use_rotary_pos_emb": True},
    ),
    Family(
        name="cohere2",
        hf_architecture="Cohere2ForCausalLM",
        interleaved_rotary=True,
        norm="layer",
        parallel_block=True,
        local_period=4,
        rope_in_windows=True,
        hf_defaults={
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.0625,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
        },
        hf_neutral=_COHERE2,
    ),
    Family(
        name="stablelm",
        hf_architecture="StableLmForCausalLM",
        norm="layer",
        norm_bias=True,
        qkv_bias="use_qkv_bias",
        partial_rotary=0.25,
        hf_defaults={
            "num_key_value_heads": 32,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "use_qkv_bias": False,
            "hidden_dropout": None,
        },
        hf_neutral={"use_parallel_residual": False, "qk_layernorm": False},
    ),
    Family(
        name="apertus",
        hf_architecture="ApertusForCausalLM",
        in_gguf=False,
        activation="xielu",
        gated=False,
        qk_norm=("E", "E"),
        norm_names={
            "attention_norm": ("attention_layernorm", "attn_norm"),
            "mlp_norm": ("feedforward_layernorm", "ffn_norm"),
        },
        hf_defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 65536,
            "rope_theta": 12e6,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 12e6,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
        hf_neutral={"qk_norm": True, "post_norm": False},
    ),
    Family(
        name="arcee",
        hf_architecture="ArceeForCausalLM",
        gguf_interleaved_rotary=True,
        activation="relu2",
        gated=False,
        hf_defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    ),
    Family(
        name="helium",
        hf_architecture="HeliumForCausalLM",
        in_gguf=False,
        interleaved_rotary=True,
        hf_defaults={
            "num_key_value_heads": 20,
            "head_dim": 128,
            "rms_norm_eps": 1e-8,
            "max_position_embeddings": 4096,
            "rope_theta": 1e5,
        },
    ),
)
