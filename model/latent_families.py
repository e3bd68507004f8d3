"""Rows of `families.py`: mixtures of experts with multi-head latent attention."""

from typing import Any

from model.family import Family
from model.weight_specs import ExpertTraits

# Of training, of parallelism, or computed from other keys.
_UNUSED: dict[str, Any] = dict.fromkeys(("aux_loss_alpha", "seq_aux", "ep_size", "qk_head_dim"))
_SIZES = {
    **_UNUSED,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_NEUTRAL = {"moe_layer_freq": 1, "rope_interleave": True}
_SIGMOID = {**_NEUTRAL, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
_V3 = ExpertTraits(hf_size="moe_intermediate_size", gguf_architecture="deepseek2", shared=True, choice_bias=True)
_V2 = ExpertTraits(hf_size="moe_intermediate_size", gguf_normalized=False, shared=True)
# Not read: GGUF files that have keys and values by head may hold both together, too.
_IGNORED = ("blk.{i}.attn_kv_b.weight",)

LATENT_FAMILIES = (
    Family(
        name="deepseek2",
        hf_architecture="DeepseekV2ForCausalLM",
        hf_model_type="deepseek_v2",
        interleaved_rotary=True,
        latent=True,
        hf_defaults={
            **_SIZES,
            "max_position_embeddings": 2048,
            "first_k_dense_replace": 0,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": None,
            "n_group": None,
            "topk_group": None,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "moe_intermediate_size": 1407,
        },
        hf_neutral={**_NEUTRAL, "scoring_func": "softmax"},
        ignored=_IGNORED,
        experts=_V2,
    ),
    Family(
        name="deepseek3",
        hf_architecture="DeepseekV3ForCausalLM",
        hf_model_type="deepseek_v3",
        in_gguf=False,
        interleaved_rotary=True,
        latent=True,
        hf_defaults={
            **_SIZES,
            "max_position_embeddings": 4096,
            "first_k_dense_replace": 3,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "moe_intermediate_size": 2048,
            "num_nextn_predict_layers": 1,
        },
        hf_neutral=_SIGMOID,
        ignored=_IGNORED,
        experts=_V3,
    ),
    Family(
        name="glm4_moe_lite",
        hf_architecture="Glm4MoeLiteForCausalLM",
        in_gguf=False,
        interleaved_rotary=True,
        latent=True,
        hf_defaults={
            **_SIZES,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 202752,
            "mlp_layer_types": None,
            "n_routed_experts": 64,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.8,
            "moe_intermediate_size": 1536,
            "num_nextn_predict_layers": 0,
        },
        hf_neutral={**_SIGMOID, "first_k_dense_replace": 1},
        ignored=_IGNORED,
        experts=_V3,
    ),
)
