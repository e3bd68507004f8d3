"""One row per architecture: its traits, and where each of our weights is found in a checkpoint.

A new family is a row here; a new file only where a new kind of layer is needed. Names of Hugging Face tensors follow
`transformers` (modeling_llama, modeling_qwen2), those of GGUF its specification ("standardized tensor names").
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a checkpoint: its two names and its shape, in letters of `ModelConfig.dims()`."""

    hf: str
    gguf: str
    shape: tuple[str, ...]
    heads: str | None = None  # "H" or "K" where the rows are rotary heads, which some GGUF files store interleaved


@dataclass(frozen=True, slots=True)
class WeightRow:
    """One of our weights: a path into the Transformer ("{i}" is the layer) and the pieces stacked along axis 0."""

    target: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """Traits and weight table of one architecture."""

    name: str
    hf_architectures: tuple[str, ...]
    hf_model_types: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    qkv_bias: bool
    gguf_interleaved_rotary: bool  # q and k rows of GGUF files pair dimensions (0, 1), ours pair (0, E/2)
    weights: tuple[WeightRow, ...]
    ignored: tuple[str, ...]  # checkpoint names that hold nothing we need


def _piece(hf: str, gguf: str, *shape: str, heads: str | None = None, kind: str = "weight") -> Piece:
    return Piece(f"model.layers.{{i}}.{hf}.{kind}", f"blk.{{i}}.{gguf}.{kind}", shape, heads)


_EMBED = WeightRow("embed.weight", (Piece("model.embed_tokens.weight", "token_embd.weight", ("V", "D")),))
_FINAL_NORM = WeightRow("norm.weight", (Piece("model.norm.weight", "output_norm.weight", ("D",)),))
HEAD = WeightRow("head.weight", (Piece("lm_head.weight", "output.weight", ("V", "D")),))

_LAYER = (
    WeightRow("layers.{i}.attention_norm.weight", (_piece("input_layernorm", "attn_norm", "D"),)),
    WeightRow(
        "layers.{i}.attention.qkv.weight",
        (
            _piece("self_attn.q_proj", "attn_q", "Q", "D", heads="H"),
            _piece("self_attn.k_proj", "attn_k", "KV", "D", heads="K"),
            _piece("self_attn.v_proj", "attn_v", "KV", "D"),
        ),
    ),
    WeightRow("layers.{i}.attention.out.weight", (_piece("self_attn.o_proj", "attn_output", "D", "Q"),)),
    WeightRow("layers.{i}.mlp_norm.weight", (_piece("post_attention_layernorm", "ffn_norm", "D"),)),
    WeightRow(
        "layers.{i}.mlp.gate_up.weight",
        (_piece("mlp.gate_proj", "ffn_gate", "F", "D"), _piece("mlp.up_proj", "ffn_up", "F", "D")),
    ),
    WeightRow("layers.{i}.mlp.down.weight", (_piece("mlp.down_proj", "ffn_down", "D", "F"),)),
)
_QKV_BIAS = WeightRow(
    "layers.{i}.attention.qkv.bias",
    (
        _piece("self_attn.q_proj", "attn_q", "Q", heads="H", kind="bias"),
        _piece("self_attn.k_proj", "attn_k", "KV", heads="K", kind="bias"),
        _piece("self_attn.v_proj", "attn_v", "KV", kind="bias"),
    ),
)
# Old checkpoints carry the rotary frequencies, which follow from rope_theta.
_IGNORED = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)

FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        Family(
            name="llama",
            hf_architectures=("LlamaForCausalLM",),
            hf_model_types=("llama",),
            gguf_architectures=("llama",),
            qkv_bias=False,
            gguf_interleaved_rotary=True,
            weights=(_EMBED, *_LAYER, _FINAL_NORM, HEAD),
            ignored=_IGNORED,
        ),
        Family(
            name="qwen2",
            hf_architectures=("Qwen2ForCausalLM",),
            hf_model_types=("qwen2",),
            gguf_architectures=("qwen2",),
            qkv_bias=True,
            gguf_interleaved_rotary=False,
            weights=(_EMBED, *_LAYER, _QKV_BIAS, _FINAL_NORM, HEAD),
            ignored=_IGNORED,
        ),
    )
}


def family_of(
    *,
    hf_architectures: Iterable[str] = (),
    hf_model_type: str | None = None,
    gguf_architecture: str | None = None,
) -> Family | None:
    """The row whose names match, or None."""
    named = set(hf_architectures)
    for row in FAMILIES.values():
        if named & set(row.hf_architectures) or gguf_architecture in row.gguf_architectures:
            return row
        if not named and hf_model_type in row.hf_model_types:
            return row
    return None
