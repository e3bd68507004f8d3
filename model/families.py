"""One row of traits per architecture, and the checkpoint tensors of our weights.

A new family is a new row here; only a new kind of layer or tensor needs new code. Names of Hugging Face tensors follow
`transformers` (its modeling files), those of GGUF its specification ("standardized tensor names").
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from model.weight_specs import ExpertTraits, TensorSpec, WeightSpec, expert_weights, layer_weight, tensor_spec

_EMBED = WeightSpec("embed.weight", (TensorSpec("model.embed_tokens.weight", "token_embd.weight", ("V", "D")),))
_FINAL_NORM = WeightSpec("norm.weight", (TensorSpec("model.norm.weight", "output_norm.weight", ("D",)),))
HEAD = WeightSpec("head.weight", (TensorSpec("lm_head.weight", "output.weight", ("V", "D")),))

_QKV = layer_weight(
    "attention.qkv.weight",
    tensor_spec("self_attn.q_proj", "attn_q", "Q", "D", heads="H"),
    tensor_spec("self_attn.k_proj", "attn_k", "KV", "D", heads="K"),
    tensor_spec("self_attn.v_proj", "attn_v", "KV", "D"),
)
_GATE_UP = layer_weight(
    "mlp.gate_up.weight",
    tensor_spec("mlp.gate_proj", "ffn_gate", "F", "D"),
    tensor_spec("mlp.up_proj", "ffn_up", "F", "D"),
)
_FUSED_QKV = layer_weight("attention.qkv.weight", tensor_spec("self_attn.qkv_proj", "attn_qkv", "QKV", "D"))
_FUSED_GATE_UP = layer_weight("mlp.gate_up.weight", tensor_spec("mlp.gate_up_proj", "ffn_up", "FF", "D"))
_OUT = layer_weight("attention.out.weight", tensor_spec("self_attn.o_proj", "attn_output", "D", "Q"))
_DOWN = layer_weight("mlp.down.weight", tensor_spec("mlp.down_proj", "ffn_down", "D", "F"))
_QKV_BIAS = layer_weight(
    "attention.qkv.bias",
    tensor_spec("self_attn.q_proj", "attn_q", "Q", heads="H", kind="bias"),
    tensor_spec("self_attn.k_proj", "attn_k", "KV", heads="K", kind="bias"),
    tensor_spec("self_attn.v_proj", "attn_v", "KV", kind="bias"),
)
_ATTENTION_NORM = layer_weight("attention_norm.weight", tensor_spec("input_layernorm", "attn_norm", "D"))
_POST_NORMS = (
    layer_weight("attention_post_norm.weight", tensor_spec("post_attention_layernorm", "post_attention_norm", "D")),
    layer_weight("mlp_post_norm.weight", tensor_spec("post_feedforward_layernorm", "post_ffw_norm", "D")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Traits of one architecture; they determine its weight table."""

    name: str
    hf_architecture: str
    hf_model_type: str | None = None  # None: the family's name
    in_gguf: bool = True  # GGUF files have an architecture of the family's name
    gguf_interleaved_rotary: bool = False  # q and k rows of GGUF files pair dimensions (0, 1), ours pair (0, E/2)
    fused_tensors: bool = False  # checkpoints store q, k and v in one tensor, gate and up in another
    qkv_bias: bool = False
    qk_norm: tuple[str, str] | None = None  # RMSNorm of q and k: letters of the axes, one head or all
    pre_norm: bool = True  # norms of the inputs of attention and MLP
    post_norm: bool = False  # norms of their outputs
    activation: Literal["silu", "gelu"] = "silu"  # of the gate; gelu by its tanh approximation
    scaled_embedding: bool = False  # multiplied by sqrt(D)
    hf_norm_offset: float = 0.0  # added to a norm's weight by Hugging Face's modules, already included in GGUF files
    local_period: int = 0  # with a window, every n-th layer has full attention; 0 = none
    local_theta: float | None = None  # rope theta of layers with a window; None: as in other layers
    no_rope_period: int = 0  # every n-th layer has no rope; 0 = none
    rope_aliases: Mapping[str, str] = field(default_factory=dict)  # other names of rotary scaling in config.json
    # Keys of config.json that only some families have, and defaults of transformers for keys that it lacks.
    hf_defaults: Mapping[str, Any] = field(default_factory=dict)
    gguf_defaults: Mapping[str, Any] = field(default_factory=dict)  # defaults of llama.cpp, without the architecture
    ignored: tuple[str, ...] = ()  # checkpoint tensors that are not needed
    experts: ExpertTraits | None = None  # of a family whose layers may have a mixture of experts as MLP

    @property
    def has_window(self) -> bool:
        return "sliding_window" in self.hf_defaults

    @property
    def window_flag(self) -> bool:
        """Whether config.json's window needs `use_sliding_window`."""
        return "use_sliding_window" in self.hf_defaults

    @property
    def activation_names(self) -> tuple[str, ...]:
        return ("silu",) if self.activation == "silu" else ("gelu_pytorch_tanh", "gelu_new")

    def weights(self, experts: int = 0) -> tuple[WeightSpec, ...]:
        """The weight table with layers that have a dense MLP or that many experts; each is in it once."""
        weights = [_EMBED]
        if self.pre_norm:
            mlp_norm = "pre_feedforward_layernorm" if self.post_norm else "post_attention_layernorm"
            weights += [_ATTENTION_NORM, layer_weight("mlp_norm.weight", tensor_spec(mlp_norm, "ffn_norm", "D"))]
        weights += _POST_NORMS if self.post_norm else ()
        qkv, gate_up = (_FUSED_QKV, _FUSED_GATE_UP) if self.fused_tensors else (_QKV, _GATE_UP)
        mlp = (gate_up, _DOWN) if not (experts and self.experts) else expert_weights(self.experts, experts)
        weights += [qkv, _OUT, *mlp]
        weights += [_QKV_BIAS] if self.qkv_bias else ()
        for name, letter in zip("qk", self.qk_norm or (), strict=False):
            tensor = tensor_spec(f"self_attn.{name}_norm", f"attn_{name}_norm", letter)
            weights.append(layer_weight(f"attention.{name}_norm.weight", tensor))
        return (*weights, _FINAL_NORM, HEAD)


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
            fused_tensors=True,
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
            name="olmoe",
            hf_architecture="OlmoeForCausalLM",
            qk_norm=("Q", "KV"),
            hf_defaults={"rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "norm_topk_prob": False},
            experts=ExpertTraits(gguf_normalized=False),
        ),
    )
}
