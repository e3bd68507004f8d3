"""Tiny random models, written as Hugging Face directories and as GGUF files with the same values."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from model.weights.quantize import quantize

type Tensors = dict[str, NDArray[Any]]

VOCAB, HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 48, 64, 96, 2, 4, 2, 16
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass
class TinyModel:
    """A configuration and float32 weights under Hugging Face names."""

    family: str = "llama"
    tied: bool = True
    tensors: Tensors = field(default_factory=dict)
    width: int = 1  # factor of all sizes but those of a head and the vocabulary; 8: for blocks of 256

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Hidden and MLP size, heads, heads of keys."""
        return HIDDEN * self.width, MLP * self.width, HEADS * self.width, KV_HEADS * self.width

    def __post_init__(self) -> None:
        random = np.random.default_rng(7)
        for name, shape in self.shapes().items():
            self.tensors[name] = random.standard_normal(shape, np.float32)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape."""
        hidden, mlp, heads, kv_heads = self.sizes
        q, kv = heads * HEAD_DIM, kv_heads * HEAD_DIM
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (mlp, hidden),
            "mlp.up_proj.weight": (mlp, hidden),
            "mlp.down_proj.weight": (hidden, mlp),
        }
        if self.family == "qwen2":
            layer |= {f"self_attn.{n}_proj.bias": (size,) for n, size in (("q", q), ("k", kv), ("v", kv))}
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (VOCAB, hidden),
            "model.norm.weight": (hidden,),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
        return shapes if self.tied else shapes | {"lm_head.weight": (VOCAB, hidden)}

    def hf_config(self) -> dict[str, Any]:
        """Return the contents of config.json."""
        hidden, mlp, heads, kv_heads = self.sizes
        return {
            "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[self.family]],
            "vocab_size": VOCAB,
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rope_theta": 10000.0,
            "rms_norm_eps": 0.0009765625,  # a power of two, exact in GGUF's float32
            "max_position_embeddings": 128,
            "tie_word_embeddings": self.tied,
        }

    def write_hf(self, folder: Path, dtype: Any = np.float32, shards: int = 1) -> Path:
        """Write config.json and one safetensors file, or `shards` files with an index."""
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.hf_config()))
        tensors = {name: values.astype(dtype) for name, values in self.tensors.items()}
        if shards == 1:
            save_file(tensors, folder / "model.safetensors")
            return folder
        weight_map: dict[str, str] = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in list(tensors)[i::shards]}
            save_file(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    def write_gguf(
        self,
        path: Path,
        kind: str = "F32",
        raw: Mapping[str, tuple[NDArray[np.uint8], str]] | None = None,
        ids: Mapping[str, int] | None = None,
        kinds: Mapping[str, str] = MappingProxyType({}),
    ) -> Path:
        """Write a GGUF file: matrices as `kind`, the rest as F32, and `raw` tensors (bytes, type) unchanged.

        `ids` are those of special tokens, such as "eos"; `kinds` those of single matrices, such as "v_proj".
        """
        hidden, mlp, heads, kv_heads = self.sizes
        writer = gguf.GGUFWriter(path, self.family)
        writer.add_context_length(128)
        writer.add_embedding_length(hidden)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(mlp)
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(0.0009765625)
        writer.add_token_list([f"t{i}" for i in range(VOCAB)])
        for name, index in (ids or {}).items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
        for name, values in self.tensors.items():
            values = self.gguf_order(name, values)
            if values.ndim == 1:
                writer.add_tensor(gguf_name(name), values.astype(np.float32))
            else:
                own = kinds.get(name.split(".")[-2], kind)
                writer.add_tensor(gguf_name(name), _quantized(values, own), raw_dtype=gguf.GGMLQuantizationType[own])
        for name, (data, raw_kind) in (raw or {}).items():
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[raw_kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def gguf_order(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """Permute Llama's q and k rows to GGUF order: dimension j next to dimension j + E/2 of the same head."""
        heads = {"q_proj": self.sizes[2], "k_proj": self.sizes[3]}.get(name.split(".")[-2])
        if self.family != "llama" or heads is None:
            return values
        half = HEAD_DIM // 2
        order = [head * HEAD_DIM + part * half + j for head in range(heads) for j in range(half) for part in range(2)]
        return np.ascontiguousarray(values[order])

    def rounded(self, kind: str, kinds: Mapping[str, str] = MappingProxyType({})) -> "TinyModel":
        """Return the model with weights quantized to GGUF types, as in `write_gguf`, and back."""
        copy = TinyModel(self.family, self.tied, width=self.width)
        for name, values in self.tensors.items():
            if values.ndim > 1:
                own = kinds.get(name.split(".")[-2], kind)
                copy.tensors[name] = gguf.quants.dequantize(_quantized(values, own), gguf.GGMLQuantizationType[own])
        return copy

    def expected(self, dtype: Any = np.float32) -> Tensors:
        """Return target path -> array, as the loader must return it."""
        arrays = {
            "embed.weight": self.tensors["model.embed_tokens.weight"],
            "norm.weight": self.tensors["model.norm.weight"],
        }
        for i in range(LAYERS):
            arrays |= self._layer(i)
        if not self.tied:
            arrays["head.weight"] = self.tensors["lm_head.weight"]
        return {path: values.astype(dtype if values.ndim > 1 else np.float32) for path, values in arrays.items()}

    def _layer(self, i: int) -> Tensors:
        def stack(*names: str) -> NDArray[Any]:
            return np.concatenate([self.tensors[f"model.layers.{i}.{name}"] for name in names])

        arrays = {
            f"layers.{i}.attention_norm.weight": stack("input_layernorm.weight"),
            f"layers.{i}.attention.qkv.weight": stack(*(f"self_attn.{n}_proj.weight" for n in "qkv")),
            f"layers.{i}.attention.out.weight": stack("self_attn.o_proj.weight"),
            f"layers.{i}.mlp_norm.weight": stack("post_attention_layernorm.weight"),
            f"layers.{i}.mlp.gate_up.weight": stack("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            f"layers.{i}.mlp.down.weight": stack("mlp.down_proj.weight"),
        }
        if self.family == "qwen2":
            arrays[f"layers.{i}.attention.qkv.bias"] = stack(*(f"self_attn.{n}_proj.bias" for n in "qkv"))
        return arrays


def _quantized(values: NDArray[Any], kind: str) -> NDArray[Any]:
    """By the gguf package, or by our own rounding for what it cannot do."""
    if kind.endswith("_K"):
        return quantize(values, kind)
    return np.asarray(gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]))


def gguf_name(name: str) -> str:
    """Return the GGUF name of a Hugging Face tensor."""
    if name in GGUF_OUTER_NAMES:
        return GGUF_OUTER_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[stem]}.{kind}"


BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
