"""One row per architecture: its traits, and the checkpoint tensors of each of our weights.

A new family is a new row here; only a new kind of layer needs new code. Names of Hugging Face tensors follow
`transformers` (its modeling files), those of GGUF its specification ("standardized tensor names").
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a checkpoint: its two names and its shape, in letters of `ModelConfig.dims()`."""

    hf: str
    gguf: str
    shape: tuple[str, ...]
    heads: str | None = None  # "H" or "K" if the rows are rotary heads, which some GGUF files store interleaved

    @property
    def is_norm(self) -> bool:
        return self.hf.endswith("norm.weight")


@dataclass(frozen=True, slots=True)
class WeightRow:
    """One of our weights: a path into the Transformer ("{i}" is the layer) and the pieces stacked along axis 0."""

    target: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Traits and weight table of one architecture."""

    name: str
    hf_architecture: str
    hf_model_type: str | None = None  # None: the family's name
    in_gguf: bool = True  # GGUF files have an architecture of the family's name
    weights: tuple[WeightRow, ...]
    gguf_interleaved_rotary: bool = False  # q and k rows of GGUF files pair dimensions (0, 1), ours pair (0, E/2)
    qkv_bias: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"  # RMSNorm of q and k: per head, or over all heads
    pre_norm: bool = True  # norms of the inputs of attention and MLP
    post_norm: bool = False  # norms of their outputs
    activation: Literal["silu", "gelu"] = "silu"  # of the gate; gelu by its tanh approximation
    scaled_embedding: bool = False  # multiplied by sqrt(D)
    hf_norm_offset: float = 0.0  # added to a norm's weight by Hugging Face's modules, already included in GGUF files
    local_period: int = 0  # with a window, every n-th layer has full attention; 0 = none
    local_theta: float | None = None  # rope theta of layers with a window; None: as in other layers
    window_flag: bool = False  # config.json's window needs `use_sliding_window`
    no_rope_period: int = 0  # every n-th layer has no rope; 0 = none
    # Defaults of transformers for keys that config.json lacks.
    hf_defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()  # checkpoint tensors that are not needed

    @property
    def activation_names(self) -> tuple[str, ...]:
        return ("silu",) if self.activation == "silu" else ("gelu_pytorch_tanh", "gelu_new")


def _piece(hf: str, gguf: str, *shape: str, heads: str | None = None, kind: str = "weight") -> Piece:
    return Piece(f"model.layers.{{i}}.{hf}.{kind}", f"blk.{{i}}.{gguf}.{kind}", shape, heads)


_EMBED = WeightRow("embed.weight", (Piece("model.embed_tokens.weight", "token_embd.weight", ("V", "D")),))
_FINAL_NORM = WeightRow("norm.weight", (Piece("model.norm.weight", "output_norm.weight", ("D",)),))
HEAD = WeightRow("head.weight", (Piece("lm_head.weight", "output.weight", ("V", "D")),))


def _row(target: str, *pieces: Piece) -> WeightRow:
    return WeightRow(f"layers.{{i}}.{target}", pieces)


_QKV = _row(
    "attention.qkv.weight",
    _piece("self_attn.q_proj", "attn_q", "Q", "D", heads="H"),
    _piece("self_attn.k_proj", "attn_k", "KV", "D", heads="K"),
    _piece("self_attn.v_proj", "attn_v", "KV", "D"),
)
_GATE_UP = _row(
    "mlp.gate_up.weight",
    _piece("mlp.gate_proj", "ffn_gate", "F", "D"),
    _piece("mlp.up_proj", "ffn_up", "F", "D"),
)
_OUT = _row("attention.out.weight", _piece("self_attn.o_proj", "attn_output", "D", "Q"))
_DOWN = _row("mlp.down.weight", _piece("mlp.down_proj", "ffn_down", "D", "F"))
_NORMS = (
    _row("attention_norm.weight", _piece("input_layernorm", "attn_norm", "D")),
    _row("mlp_norm.weight", _piece("post_attention_layernorm", "ffn_norm", "D")),
)
_POST_NORMS = (
    _row("attention_post_norm.weight", _piece("post_attention_layernorm", "post_attention_norm", "D")),
    _row("mlp_post_norm.weight", _piece("post_feedforward_layernorm", "post_ffw_norm", "D")),
)
_FOUR_NORMS = (
    _row("attention_norm.weight", _piece("input_layernorm", "attn_norm", "D")),
    _row("mlp_norm.weight", _piece("pre_feedforward_layernorm", "ffn_norm", "D")),
    *_POST_NORMS,
)


def _qk_norms(q: str, k: str) -> tuple[WeightRow, ...]:
    """Norms of queries and keys; `q` and `k` are the letters of their sizes."""
    return (
        _row("attention.q_norm.weight", _piece("self_attn.q_norm", "attn_q_norm", q)),
        _row("attention.k_norm.weight", _piece("self_attn.k_norm", "attn_k_norm", k)),
    )


_MATRICES = (_QKV, _OUT, _GATE_UP, _DOWN)
_FUSED = (  # three and two matrices in one tensor
    _row("attention.qkv.weight", _piece("self_attn.qkv_proj", "attn_qkv", "QKV", "D")),
    _OUT,
    _row("mlp.gate_up.weight", _piece("mlp.gate_up_proj", "ffn_up", "FF", "D")),
    _DOWN,
)
_QKV_BIAS = _row(
    "attention.qkv.bias",
    _piece("self_attn.q_proj", "attn_q", "Q", heads="H", kind="bias"),
    _piece("self_attn.k_proj", "attn_k", "KV", heads="K", kind="bias"),
    _piece("self_attn.v_proj", "attn_v", "KV", kind="bias"),
)


_GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
# Old checkpoints carry the rotary frequencies, which follow from rope_theta.
_IGNORED = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)


def _model(*layer: WeightRow) -> tuple[WeightRow, ...]:
    return (_EMBED, *layer, _FINAL_NORM, HEAD)


FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        Family(
            name="llama",
            hf_architecture="LlamaForCausalLM",
            gguf_interleaved_rotary=True,
            weights=_model(*_NORMS, *_MATRICES),
            ignored=_IGNORED,
        ),
        Family(  # its GGUF files are of architecture "llama" and have no window
            name="mistral",
            hf_architecture="MistralForCausalLM",
            in_gguf=False,
            weights=_model(*_NORMS, *_MATRICES),
            hf_defaults={"sliding_window": 4096, "max_position_embeddings": 4096 * 32},
            ignored=_IGNORED,
        ),
        Family(
            name="qwen2",
            hf_architecture="Qwen2ForCausalLM",
            qkv_bias=True,
            window_flag=True,
            weights=_model(*_NORMS, *_MATRICES, _QKV_BIAS),
            hf_defaults={"sliding_window": 4096, "max_window_layers": 28},
            ignored=_IGNORED,
        ),
        Family(
            name="qwen3",
            hf_architecture="Qwen3ForCausalLM",
            qk_norm="head",
            window_flag=True,
            weights=_model(*_NORMS, *_MATRICES, *_qk_norms("E", "E")),
            hf_defaults={"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
        ),
        Family(
            name="smollm3",
            hf_architecture="SmolLM3ForCausalLM",
            gguf_interleaved_rotary=True,
            window_flag=True,
            no_rope_period=4,
            weights=_model(*_NORMS, *_MATRICES),
            hf_defaults={"tie_word_embeddings": True, "rope_theta": 2e6, "max_position_embeddings": 32768},
        ),
        Family(
            name="olmo2",
            hf_architecture="Olmo2ForCausalLM",
            qk_norm="whole",
            pre_norm=False,
            post_norm=True,
            weights=_model(*_POST_NORMS, *_MATRICES, *_qk_norms("Q", "KV")),
            hf_defaults={"rms_norm_eps": 1e-5},
        ),
        Family(
            name="phi3",
            hf_architecture="Phi3ForCausalLM",
            weights=_model(*_NORMS, *_FUSED),
            hf_defaults={"rms_norm_eps": 1e-5},
        ),
        Family(
            name="gemma2",
            hf_architecture="Gemma2ForCausalLM",
            post_norm=True,
            activation="gelu",
            scaled_embedding=True,
            hf_norm_offset=1.0,
            local_period=2,
            weights=_model(*_FOUR_NORMS, *_MATRICES),
            hf_defaults={
                **_GEMMA,
                "max_position_embeddings": 8192,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
        ),
        Family(
            name="gemma3",
            hf_architecture="Gemma3ForCausalLM",
            hf_model_type="gemma3_text",
            qk_norm="head",
            post_norm=True,
            activation="gelu",
            scaled_embedding=True,
            hf_norm_offset=1.0,
            local_period=6,
            local_theta=10000.0,
            weights=_model(*_FOUR_NORMS, *_MATRICES, *_qk_norms("E", "E")),
            hf_defaults={**_GEMMA, "max_position_embeddings": 131072, "rope_theta": 1e6},
        ),
    )
}
