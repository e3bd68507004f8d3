"""Family: the traits of an architecture, and the checkpoint tensors of our weights that follow from them.

Names of Hugging Face tensors follow `transformers` (its modeling files), those of GGUF its specification ("standardized
tensor names").
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from model.weight_specs import ExpertTraits, TensorSpec, WeightSpec, expert_weights, layer_weight, tensor_spec

_EMBED = WeightSpec("embed.weight", (TensorSpec("model.embed_tokens.weight", "token_embd.weight", ("V", "D")),))
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
_UP = layer_weight("mlp.gate_up.weight", tensor_spec("mlp.up_proj", "ffn_up", "F", "D"))
_XIELU = layer_weight(
    "mlp.coefficients",
    *(
        TensorSpec(f"model.layers.{{i}}.mlp.act_fn.{name}", f"blk.{{i}}.xielu.{name}", ("1",))
        for name in ("alpha_p", "alpha_n", "beta", "eps")
    ),
)
_FUSED_QKV = layer_weight("attention.qkv.weight", tensor_spec("self_attn.qkv_proj", "attn_qkv", "QKV", "D"))
_OUT = layer_weight("attention.out.weight", tensor_spec("self_attn.o_proj", "attn_output", "D", "Q"))
QKV_BIAS = layer_weight(
    "attention.qkv.bias",
    tensor_spec("self_attn.q_proj", "attn_q", "Q", heads="H", kind="bias"),
    tensor_spec("self_attn.k_proj", "attn_k", "KV", heads="K", kind="bias"),
    tensor_spec("self_attn.v_proj", "attn_v", "KV", kind="bias"),
)
OUT_BIAS = layer_weight("attention.out.bias", tensor_spec("self_attn.o_proj", "attn_output", "D", kind="bias"))
_SINKS = layer_weight(
    "attention.sinks", TensorSpec("model.layers.{i}.self_attn.sinks", "blk.{i}.attn_sinks.weight", ("H",))
)
_ACTIVATIONS = {"gelu": ("gelu_pytorch_tanh", "gelu_new"), "clamped_silu": ("silu",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Traits of one architecture; they determine its weight table."""

    name: str
    hf_architecture: str
    hf_model_type: str | None = None  # None: the family's name
    in_gguf: bool = True  # GGUF files have an architecture of the family's name
    gguf_interleaved_rotary: bool = False  # q and k rows of GGUF files pair dimensions (0, 1), ours pair (0, E/2)
    interleaved_rotary: bool = False  # so do all their checkpoints
    fused: tuple[str, ...] = ()  # "qkv": q, k and v are one tensor; "gate_up": gate and up are
    qkv_bias: bool | str = False  # a name: the key of config.json that turns them on
    out_bias: bool = False  # attention's output has a bias, too, if q, k and v have one
    latent: bool = False  # multi-head latent attention
    sinks: bool = False  # each head of attention has a further score, whose value is zero
    qk_norm: tuple[str, str] | None = None  # RMSNorm of q and k: letters of the axes, one head or all
    qk_norm_after_rope: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    parallel_block: bool = False  # attention and MLP read the same normed input, and both are added to it
    pre_norm: bool = True  # norms of the inputs of attention and MLP
    post_norm: bool = False  # norms of their outputs
    # gelu by its tanh approximation; clamped_silu is that of `clamped_swiglu_in_xla`
    activation: Literal["silu", "gelu", "relu2", "xielu", "clamped_silu"] = "silu"
    gated: bool = True  # the MLP multiplies the activation of a gate; else it is that of `up`
    scaled_embedding: bool = False  # multiplied by sqrt(D)
    hf_norm_offset: float = 0.0  # added to a norm's weight by Hugging Face's modules, already included in GGUF files
    local_period: int = 0  # with a window, every n-th layer has full attention; 0 = none
    local_theta: float | None = None  # rope theta of layers with a window; None: as in other layers
    no_rope_period: int = 0  # every n-th layer has no rope; 0 = none
    rope_in_windows: bool = False  # layers with full attention have no rope, if others have a window
    partial_rotary: float | None = None  # default share of a head that is rotated, of families with a key for it
    rope_keys: tuple[str, ...] = ()  # of rotary parameters that only this family has
    rope_aliases: Mapping[str, str] = field(default_factory=dict)  # other names of rotary scaling in config.json
    # Keys of config.json that only some families have, and defaults of transformers for keys that it lacks.
    hf_defaults: Mapping[str, Any] = field(default_factory=dict)
    gguf_yarn_truncate: bool = True  # YaRN's `truncate`, which GGUF files do not have
    gguf_defaults: Mapping[str, Any] = field(default_factory=dict)  # defaults of llama.cpp, without the architecture
    hf_neutral: Mapping[str, Any] = field(default_factory=dict)  # values at which other keys have no effect
    hf_required: Mapping[str, Any] = field(default_factory=dict)  # the only supported values of other keys
    recurrent: bool = False  # without `layer_types` all layers are recurrent
    ignored: tuple[str, ...] = ()  # checkpoint tensors that are not needed
    experts: ExpertTraits | None = None  # of a family whose layers may have a mixture of experts as MLP
    mlp_names: tuple[str, str] = ("mlp.gate_up_proj", "mlp.down_proj")  # modules of a fused MLP in safetensors
    # Names of the modules of a norm in both formats, if they are not the usual ones.
    norm_names: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def has_window(self) -> bool:
        return "sliding_window" in self.hf_defaults

    @property
    def window_flag(self) -> bool:
        """Whether config.json's window needs `use_sliding_window`."""
        return "use_sliding_window" in self.hf_defaults

    @property
    def activation_names(self) -> tuple[str, ...]:
        return _ACTIVATIONS.get(self.activation, (self.activation,))

    @property
    def mlp_size(self) -> str:
        """The key of the MLP's size in config.json."""
        key = "shared_intermediate_size"
        return key if key in self.hf_defaults else "intermediate_size"

    @property
    def norm_eps(self) -> str:
        """The key of the epsilon in config.json."""
        return "rms_norm_eps" if self.norm == "rms" else "layer_norm_eps"

    def has_interleaved_rotary(self, is_gguf: bool) -> bool:
        return self.interleaved_rotary or (is_gguf and self.gguf_interleaved_rotary)

    def weights(self, experts: int = 0, attention: tuple[WeightSpec, ...] = ()) -> tuple[WeightSpec, ...]:
        """The weight table with layers that have a dense MLP or that many experts; each is in it once.

        `attention` are the weights of latent attention, of families that have it.
        """
        weights = [_EMBED]
        for path, (hf, gguf) in self._norms().items():
            weights += [
                layer_weight(f"{path}.{kind}", tensor_spec(hf, gguf, "D", kind=kind)) for kind in self._norm_kinds
            ]
        fused, down = self.mlp_names
        gate_up = _GATE_UP if self.gated else _UP
        if "gate_up" in self.fused:
            gate_up = layer_weight("mlp.gate_up.weight", tensor_spec(fused, "ffn_up", "FF", "D"))
        down_weight = layer_weight("mlp.down.weight", tensor_spec(down, "ffn_down", "D", "F"))
        mlp = (gate_up, down_weight) if not (experts and self.experts) else expert_weights(self.experts, experts)
        weights += [*(attention or (_FUSED_QKV if "qkv" in self.fused else _QKV, _OUT)), *mlp]
        weights += [QKV_BIAS] if self.qkv_bias else []
        weights += [OUT_BIAS] if self.out_bias else []
        weights += [_SINKS] if self.sinks else []
        weights += [_XIELU] if self.activation == "xielu" else []
        for name, letter in zip("qk", self.qk_norm or (), strict=False):
            path = f"{name}_norm"
            hf, gguf = self.norm_names.get(path, (path, f"attn_{path}"))
            weights.append(layer_weight(f"attention.{path}.weight", tensor_spec(f"self_attn.{hf}", gguf, letter)))
        for kind in self._norm_kinds:
            final = TensorSpec(f"model.norm.{kind}", f"output_norm.{kind}", ("D",))
            weights.append(WeightSpec(f"norm.{kind}", (final,)))
        return (*weights, HEAD)

    @property
    def _norm_kinds(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.norm_bias else ("weight",)

    def _norms(self) -> dict[str, tuple[str, str]]:
        """Our norms of a layer's input and outputs, and their modules."""
        before_mlp = "pre_feedforward_layernorm" if self.post_norm else "post_attention_layernorm"
        norms = {"attention_norm": ("input_layernorm", "attn_norm")} if self.pre_norm else {}
        norms |= {"mlp_norm": (before_mlp, "ffn_norm")} if self.pre_norm and not self.parallel_block else {}
        if self.post_norm:
            norms["attention_post_norm"] = ("post_attention_layernorm", "post_attention_norm")
            norms["mlp_post_norm"] = ("post_feedforward_layernorm", "post_ffw_norm")
        return {path: self.norm_names.get(path, names) for path, names in norms.items()}
