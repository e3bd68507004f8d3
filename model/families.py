"""One row of traits per architecture: a new family is a new row here; only a new kind of layer needs new code."""

from model.family import Family
from model.latent_families import LATENT_FAMILIES
from model.newer_families import NEWER_FAMILIES
from model.weight_specs import ExpertTraits

_QWEN = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA = {
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": None,
}
_GEMMA2_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GPT_OSS = {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "max_position_embeddings": 131072,
    "sliding_window": 128,
    "layer_types": None,
    "attention_bias": True,
    "num_experts_per_tok": 4,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    # Copies of other values, which transformers does not read.
    "experts_per_token": None,
    "initial_context_length": None,
}
# Old checkpoints carry the rotary frequencies, which follow from rope_theta.
_IGNORED = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="llama",
            hf_architecture="LlamaForCausalLM",
            gguf_interleaved_rotary=True,
            ignored=_IGNORED,
        ),
        Family(  # its GGUF files are of architecture "llama" and have no window
            name="mistral",
            hf_architecture="MistralForCausalLM",
            in_gguf=False,
            hf_defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 4096 * 32},
            ignored=_IGNORED,
        ),
        Family(
            name="qwen2",
            hf_architecture="Qwen2ForCausalLM",
            qkv_bias=True,
            hf_defaults=_QWEN,
            ignored=_IGNORED,
        ),
        Family(
            name="qwen3",
            hf_architecture="Qwen3ForCausalLM",
            qk_norm=("E", "E"),
            hf_defaults={**_QWEN, "head_dim": 128},
        ),
        Family(
            name="smollm3",
            hf_architecture="SmolLM3ForCausalLM",
            gguf_interleaved_rotary=True,
            no_rope_period=4,
            hf_defaults={
                "num_key_value_heads": 4,
                "tie_word_embeddings": True,
                "rope_theta": 2e6,
                "max_position_embeddings": 32768,
                "use_sliding_window": False,
                "sliding_window": None,
                "layer_types": None,
                "no_rope_layers": None,
                "no_rope_layer_interval": 4,
            },
        ),
        Family(
            name="olmo2",
            hf_architecture="Olmo2ForCausalLM",
            qk_norm=("Q", "KV"),
            pre_norm=False,
            post_norm=True,
            hf_defaults={"rms_norm_eps": 1e-5},
        ),
        Family(
            name="phi3",
            hf_architecture="Phi3ForCausalLM",
            fused=("qkv", "gate_up"),
            partial_rotary=1.0,
            rope_aliases={"su": "longrope", "yarn": "longrope"},
            hf_defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, "sliding_window": None},
        ),
        Family(
            name="gemma2",
            hf_architecture="Gemma2ForCausalLM",
            post_norm=True,
            activation="gelu",
            scaled_embedding=True,
            hf_norm_offset=1.0,
            local_period=2,
            hf_defaults={**_GEMMA, **_GEMMA2_CAPS, "max_position_embeddings": 8192},
            gguf_defaults={**_GEMMA2_CAPS, "attention.sliding_window": 4096},
        ),
        Family(
            name="gemma3",
            hf_architecture="Gemma3ForCausalLM",
            hf_model_type="gemma3_text",
            qk_norm=("E", "E"),
            post_norm=True,
            activation="gelu",
            scaled_embedding=True,
            hf_norm_offset=1.0,
            local_period=6,
            local_theta=10000.0,
            hf_defaults={
                **_GEMMA,
                "max_position_embeddings": 131072,
                "rope_theta": 1e6,
                "rope_local_base_freq": 10000.0,
                "sliding_window_pattern": 6,
            },
        ),
        Family(
            name="qwen3moe",
            hf_architecture="Qwen3MoeForCausalLM",
            hf_model_type="qwen3_moe",
            qk_norm=("E", "E"),
            hf_defaults={
                "num_key_value_heads": 4,
                "use_sliding_window": False,
                "sliding_window": 4096,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
                "mlp_only_layers": None,
                "decoder_sparse_step": 1,
            },
            experts=ExpertTraits(hf_size="moe_intermediate_size"),
        ),
        Family(  # its GGUF files are of architecture "llama" and have no window
            name="mixtral",
            hf_architecture="MixtralForCausalLM",
            in_gguf=False,
            gguf_interleaved_rotary=True,
            hf_defaults={
                "num_key_value_heads": 8,
                "sliding_window": None,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "max_position_embeddings": 4096 * 32,
                "num_experts_per_tok": 2,
            },
            ignored=_IGNORED,
            experts=ExpertTraits(hf_block="block_sparse_moe", hf_names=("w1", "w3", "w2"), gguf_architecture="llama"),
        ),
        Family(
            name="granitemoe",
            hf_architecture="GraniteMoeForCausalLM",
            gguf_interleaved_rotary=True,
            hf_defaults={
                **dict.fromkeys(
                    ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"), 1.0
                ),
                "num_experts_per_tok": 2,
            },
            experts=ExpertTraits(
                hf_block="block_sparse_moe",
                hf_router="router.layer",
                hf_fused=("input_linear.weight", "output_linear.weight"),
            ),
        ),
        Family(
            name="olmoe",
            hf_architecture="OlmoeForCausalLM",
            qk_norm=("Q", "KV"),
            hf_defaults={"rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "norm_topk_prob": False},
            experts=ExpertTraits(gguf_normalized=False),
        ),
        Family(
            name="gpt-oss",
            hf_architecture="GptOssForCausalLM",
            hf_model_type="gpt_oss",
            activation="clamped_silu",
            qkv_bias="attention_bias",
            out_bias=True,
            sinks=True,
            local_period=2,
            gguf_yarn_truncate=False,
            norm_names={"mlp_norm": ("post_attention_layernorm", "post_attention_norm")},
            hf_defaults=_GPT_OSS,
            hf_neutral={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
            experts=ExpertTraits(
                hf_router="router",
                hf_fused=("experts.gate_up_proj", "experts.down_proj"),
                hf_interleaved=True,
                hf_transposed=True,
                bias=True,
            ),
        ),
        *NEWER_FAMILIES,
        *LATENT_FAMILIES,
    )
}
