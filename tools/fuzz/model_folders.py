"""Model folders with config.json and safetensors: tiny valid seeds and their mutations.

One input contains four files with a separator: config.json, weights, index (empty: none) and generation_config.json.
"""

import json
import struct
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.support.tiny import random_weights, tiny_configs
from tools.fuzz.byte_mutations import EDGES, mutate_bytes
from tools.fuzz.json_mutations import mutate_json, random_value, serialize

_MARK = b"\n\0file\0\n"
_SHARD = "a.safetensors"
_INDEX = json.dumps({"weight_map": {"a": _SHARD}}).encode()
_FAMILIES = ("llama", "llama3", "yarn", "qwen3", "mistral", "smollm3", "phi3_long", "gemma2", "gemma3")

_VALUES: dict[str, tuple[Any, ...]] = {
    "dtype": ("F32", "F16", "BF16", "F64", "I8", "U8", "BOOL", "I64", "F8_E4M3", "F4", "C64", "x"),
    "shape": ([], [0], [16], [16, 16], [2**31, 0], [2**62, 4], [-1], [1.5]),
    "data_offsets": ([0, 0], [0, 64], [64, 0], [0, 2**63], [-1, 4], [0]),
    "architectures": (["LlamaForCausalLM"], ["Gemma3ForCausalLM"], ["Phi3ForCausalLM"], ["BertModel"], []),
    "model_type": ("llama", "qwen3", "gemma3_text", "smollm3", []),
    "rope_scaling": ({"rope_type": "linear", "factor": 2.0}, {"type": "yarn", "factor": 4.0}, {"rope_type": []}, None),
    "rope_parameters": ({"rope_theta": 1e4}, {"full_attention": {"rope_type": "llama3"}}, {"rope_type": "longrope"}),
    "rope_type": ("default", "linear", "llama3", "yarn", "longrope", "su", "dynamic"),
    "layer_types": (["full_attention"] * 2, ["sliding_attention", "full_attention"], ["x"]),
    "hidden_act": ("silu", "gelu_pytorch_tanh", "relu"),
    "weight_map": tuple({"a": name} for name in (_SHARD, f"../{_SHARD}", "\0.safetensors", "b" * 300 + ".safetensors")),
    "eos_token_id": (2, [1, 2], -1, "x", [2.0]),
    "temperature": (0.6, -1, "x"),
    "max_new_tokens": (20, 0),
}
_NUMBERS = (0, 1, 2, 8, 16, 0.5, 1.0, 1e30, -1, None, True)
_KEYS = (
    *_VALUES,
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping", "sliding_window"),
    *("final_logit_softcapping", "use_sliding_window", "sliding_window_pattern", "max_window_layers", "factor"),
    *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("attention_factor", "short_factor", "long_factor", "no_rope_layers", "no_rope_layer_interval", "attention_bias"),
    *("mlp_bias", "tie_word_embeddings", "quantization_config", "partial_rotary_factor", "top_p", "top_k"),
)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The files of an input."""

    config: bytes
    weights: bytes
    index: bytes = b""
    generation: bytes = b"{}"

    @classmethod
    def of(cls, data: bytes) -> "ModelFolder":
        """Split any input into files."""
        return cls(*(data.split(_MARK) + [b""] * 3)[:4])

    def pack(self) -> bytes:
        """Join the files to one input."""
        return _MARK.join((self.config, self.weights, self.index, self.generation))

    def write(self, folder: Path) -> None:
        """Replace the contents of a folder by these files."""
        for file in folder.iterdir():
            file.unlink()
        (folder / "config.json").write_bytes(self.config)
        (folder / "generation_config.json").write_bytes(self.generation)
        (folder / (_SHARD if self.index else "model.safetensors")).write_bytes(self.weights)
        if self.index:
            (folder / "model.safetensors.index.json").write_bytes(self.index)


def seeds() -> list[bytes]:
    """Models of several families; one has an index, one is float16."""
    return [_seed(family, indexed=i == 0, half=i == 1).pack() for i, family in enumerate(_FAMILIES)]


def _seed(family: str, *, indexed: bool, half: bool) -> ModelFolder:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "vocab_size": 12, "num_key_value_heads": 1, "head_dim": 8}
    config = tiny_configs()[family] | sizes | {"num_attention_heads": 2}
    dtype = np.float16 if half else np.float32
    weights = {name: values.astype(dtype) for name, values in random_weights(config, 1).items()}
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, _SHARD)}).encode() if indexed else b""
    return ModelFolder(json.dumps(config).encode(), save(weights), index, b'{"temperature": 0.6, "eos_token_id": [2]}')


def mutate(data: bytes, random: Random) -> bytes:
    """Return an input after mutations of one or several files."""
    if random.random() < 0.05:
        return mutate_bytes(data, random)
    made = ModelFolder.of(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        match random.randrange(8):
            case 0 | 1 | 2:
                made = replace(made, config=_mutate_json(made.config, random))
            case 3 | 4 | 5:
                made = replace(made, weights=_mutate_weights(made.weights, random))
            case 6:
                made = replace(made, index=_mutate_json(made.index or _INDEX, random))
            case _:
                made = replace(made, generation=_mutate_json(made.generation, random))
    return made.pack()


def _mutate_weights(data: bytes, random: Random) -> bytes:
    """Mutate the header, mostly with a consistent length, or the bytes."""
    if len(data) < 8 or random.random() < 0.1:
        return mutate_bytes(data, random)
    size = struct.unpack("<Q", data[:8])[0]
    header, values = _mutate_json(data[8 : 8 + size], random), data[8 + size :]
    length = random.choice(EDGES) if random.random() < 0.1 else len(header)
    made = struct.pack("<Q", length) + header + values
    return made[: random.randrange(len(made) + 1)] if random.random() < 0.05 else made


def _mutate_json(text: bytes, random: Random) -> bytes:
    try:
        value = json.loads(text)
        if not isinstance(value, dict) or random.random() < 0.1:
            return mutate_bytes(text, random)
        if random.random() < 0.3:
            name = random.choice(_KEYS)
            value[name] = deepcopy(_plausible_value(name, random))
        else:
            mutate_json(value, random, _plausible_value)
        return serialize(value, random)
    except (ValueError, RecursionError, OverflowError):  # no longer JSON, or too deep to serialize
        return mutate_bytes(text, random)


def _plausible_value(name: str, random: Random) -> Any:
    """Return a value that is mostly plausible for the key."""
    if name in _VALUES and random.random() < 0.7:
        return random.choice(_VALUES[name])
    return random_value(random) if random.random() < 0.4 else random.choice(_NUMBERS)
