"""Tiny valid GGUF models with tokenizers; all weights are zero."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import numpy as np

from tools.fuzz.gguf_parts import ALIGNMENT, File, Row, Value

type _Tensor = tuple[str, tuple[int, ...], str, bytes]  # name, axes (fastest first), type, data

_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def seeds() -> list[bytes]:
    """Models with both kinds of tokenizers, several quantizations, RoPE scaling, windows, and a split file."""
    byte_level, pieces = _byte_level(), _sentencepiece()
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    long = {"llama.rope.scaling.original_context_length": 64, "llama.rope.scaling.attn_factor": 1.25}
    window = {"gemma2.attention.sliding_window": 8, "gemma2.attention.sliding_window_pattern": [True]}
    norms = [_zeros(f"blk.0.{name}", (16,), "F32") for name in ("post_attention_norm", "post_ffw_norm")]
    freqs, *long_and_short = [(name, (8,), "F32", np.linspace(1, 2, 8, dtype="<f4").tobytes()) for name in FACTORS]
    return [
        _model(byte_level),
        _model(pieces, "Q8_0", [freqs], hidden=32),
        _model(byte_level | yarn, "Q4_0", hidden=32),
        _model(byte_level | long, "F16", long_and_short),
        _model({"split.count": 2, "split.no": 0} | byte_level, "BF16"),
        _model(byte_level | window, extra=norms, arch="gemma2"),
    ]


def second_part() -> bytes:
    """The second part of the split seed."""
    return _serialize({"split.count": 2, "split.no": 1}, [])


def _byte_level() -> dict[str, Any]:
    tokens = ["a", "b", "c", "Ġ", "H", "i", "1", "ab", "Ġa", "<s>", "</s>", "<t>", "[PAD]", "é"]
    types = [1] * 9 + [3, 3, 4, 5, 1]
    return _tokenizer("gpt2", tokens, types, pre="gpt-2", merges=["a b", "Ġ a"], bos_token_id=9, eos_token_id=10)


def _sentencepiece() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", "<0x48>", "<0x0A>", "▁", "a", "b", "ab", "▁a", "  ", "<t>", "i", "H"]
    types = [2, 3, 3, 6, 6, 1, 1, 1, 1, 1, 4, 4, 1, 1]
    scores = [0.0, 0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -9.0, 0.0, -6.0, -7.0]
    return _tokenizer("llama", tokens, types, scores=scores, unknown_token_id=0, bos_token_id=1, eos_token_id=2)


def _tokenizer(model: str, tokens: list[str], types: list[int], **more: Any) -> dict[str, Any]:
    keys = {"model": model, "tokens": tokens, "token_type": types} | more
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items()} | {"tokenizer.chat_template": _TEMPLATE}


def _model(
    more: Mapping[str, Any],
    kind: str = "F32",
    extra: Sequence[_Tensor] = (),
    hidden: int = 16,
    arch: str = "llama",
) -> bytes:
    """One layer; matrices are of a kind, which may want rows of 32."""
    sizes = {
        "context_length": 128,
        "embedding_length": hidden,
        "block_count": 1,
        "feed_forward_length": hidden,
        "attention.head_count": hidden // 16,
        "attention.head_count_kv": hidden // 16,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    values = {"general.architecture": arch} | {f"{arch}.{name}": size for name, size in sizes.items()} | dict(more)
    tokens = len(more["tokenizer.ggml.tokens"])
    square = [f"attn_{name}" for name in ("q", "k", "v", "output")] + [f"ffn_{name}" for name in ("gate", "up", "down")]
    return _serialize(
        values,
        [
            _zeros("token_embd", (hidden, tokens), kind),
            *(_zeros(f"blk.0.{name}", (hidden, hidden), kind) for name in square),
            *(_zeros(name, (hidden,), "F32") for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")),
            *extra,
        ],
    )


def _zeros(name: str, dims: tuple[int, ...], kind: str) -> _Tensor:
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return f"{name}.weight", dims, kind, bytes(math.prod(dims) // block * block_bytes)


def _serialize(values: Mapping[str, Any], tensors: Sequence[_Tensor]) -> bytes:
    file = File(3, [Value.of(key, value) for key, value in values.items()], [], b"")
    for name, dims, kind, data in tensors:
        file.rows.append(Row(name.encode(), dims, int(gguf.GGMLQuantizationType[kind]), len(file.data)))
        file.data += data + bytes(-len(data) % ALIGNMENT)
    return file.pack()
