"""Tiny models with quantized matrices in safetensors, written by the definitions of their layouts, and their values."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.support.tiny_checkpoints import BF16, Tensors, TinyModel

type Written = tuple[Tensors, NDArray[np.float32]]  # tensors without the name of the module, and the values [N, K]
type Random = np.random.Generator

F16 = np.dtype(np.float16)


@dataclass(frozen=True)
class Layout:
    """How the linear maps of a model are stored."""

    write: Callable[[int, int, Random], Written]  # a matrix [N, K]
    config: Mapping[str, Any]  # quantization_config
    format: str  # in memory
    width: int = 1  # as in TinyModel


def write_quantized(folder: Path, layout: Layout, family: str = "llama", changes: Tensors | None = None) -> TinyModel:
    """Write a model whose linear maps are quantized, and return it with their values; `changes` replace tensors."""
    tiny, random = TinyModel(family, tied=False, width=layout.width), np.random.default_rng(3)
    tensors: Tensors = {}
    for name, values in tiny.tensors.items():
        if "_proj.weight" not in name:
            size = values.shape[-1] if values.ndim == 2 else 1  # as of a trained model
            tensors[name] = tiny.tensors[name] = (values / np.sqrt(size)).astype(BF16)
            continue
        parts, tiny.tensors[name] = layout.write(values.shape[0], values.shape[1], random)
        tensors |= {f"{name.removesuffix('weight')}{part}": stored for part, stored in parts.items()}
    tiny.tensors = {name: values.astype(np.float32) for name, values in tiny.tensors.items()}
    folder.mkdir(exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(values) for name, values in {**tensors, **(changes or {})}.items() if values.size},
        folder / "model.safetensors",
    )
    config = tiny.hf_config() | {"quantization_config": dict(layout.config)}
    (folder / "config.json").write_text(json.dumps(config))
    return tiny


def words_of(codes: NDArray[Any], bits: int, axis: int, order: Sequence[int] = tuple(range(8))) -> NDArray[np.int32]:
    """Codes along an axis packed into int32 words; `order` lists the elements of a word from its lowest bits on."""
    size = 32 // bits
    padding = [(0, 0)] * codes.ndim
    padding[axis] = (0, -codes.shape[axis] % size)
    elements = np.moveaxis(np.pad(codes, padding), axis, -1).astype(np.uint64)
    elements = elements.reshape(*elements.shape[:-1], -1, size)
    words = sum(elements[..., order[i]] << np.uint64(bits * i) for i in range(size))
    return np.moveaxis(np.asarray(words).astype(np.uint32).view(np.int32), -1, axis)


def scales_of(random: Random, *shape: int, dtype: Any = F16) -> NDArray[Any]:
    return (random.standard_normal(shape) * 0.02).astype(dtype)


def _dequantized(codes: Any, zeros: Any, scales: Any, groups: Any) -> NDArray[np.float32]:
    """Of codes [N, K], zero points and scales [N, G]."""
    steps = codes.astype(np.float64) - zeros.astype(np.float64)[:, groups]
    return np.asarray((steps * scales.astype(np.float64)[:, groups]).astype(np.float32))


def _parts(random: Random, n: int, k: int, bits: int, group: int, dtype: Any) -> tuple[Any, Any, Any, Any]:
    """Codes [N, K], zero points from 1 on and scales [N, G], and the group of each column."""
    group = k if group < 0 else group
    count = -(-k // group)
    zeros = random.integers(1, 1 << bits, (n, count))
    return random.integers(0, 1 << bits, (n, k)), zeros, scales_of(random, n, count, dtype=dtype), np.arange(k) // group


def gptq(group: int = 32, *, bits: int = 4, version: int = 1, is_ordered: bool = False, dtype: Any = F16) -> Layout:
    def write(n: int, k: int, random: Random) -> Written:
        codes, zeros, scales, groups = _parts(random, n, k, bits, group, dtype)
        if is_ordered:
            groups = random.permutation(groups)
        tensors = {"qweight": words_of(codes.T, bits, 0), "scales": scales.T, "g_idx": groups.astype(np.int32)}
        tensors["qzeros"] = words_of(zeros.T - (version == 1), bits, 1)
        return tensors, _dequantized(codes, zeros, scales, groups)

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": is_ordered, "sym": False}
    config |= {"checkpoint_format": "gptq" if version == 1 else "gptq_v2", "damp_percent": 0.01}
    width = 4 if group == 128 else 2
    return Layout(write, config, f"INT{bits}_{128 if group < 0 else group}", width)


def awq(group: int = 32) -> Layout:
    def write(n: int, k: int, random: Random) -> Written:
        codes, zeros, scales, groups = _parts(random, n, k, 4, group, F16)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {"qweight": words_of(codes.T, 4, 1, order), "qzeros": words_of(zeros.T, 4, 1, order)}
        return tensors | {"scales": scales.T}, _dequantized(codes, zeros, scales, groups)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Layout(write, config | {"modules_to_not_convert": None}, f"INT4_{group}", 4 if group == 128 else 2)


def _ct(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A quantization_config of compressed-tensors as llm-compressor writes it."""
    arguments: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "observer": "minmax",
    }
    arguments |= {"observer_kwargs": {}, "strategy": "channel", "symmetric": True, "type": "int", **weights}
    group = {"input_activations": inputs, "output_activations": None, "targets": ["Linear"], "weights": arguments}
    config = {"config_groups": {"group_0": group}, "format": "pack-quantized", "global_compression_ratio": 1.5}
    config |= {"ignore": ["lm_head"], "kv_cache_scheme": None, "quant_method": "compressed-tensors"}
    return config | {
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.11",
    }


def packed(
    group: int = 32, *, bits: int = 4, is_ordered: bool = False, has_zeros: bool = False, dtype: Any = BF16
) -> Layout:
    """compressed-tensors, `pack-quantized`; a group of -1 is a row."""

    def write(n: int, k: int, random: Random) -> Written:
        codes, zeros, scales, groups = _parts(random, n, k, bits, group, dtype)
        groups = random.permutation(groups) if is_ordered else groups
        tensors = {"weight_packed": words_of(codes, bits, 1), "weight_scale": scales, "weight_shape": np.array([n, k])}
        if has_zeros:
            tensors["weight_zero_point"] = words_of(zeros, bits, 0)
        else:
            zeros = np.full_like(zeros, 1 << (bits - 1))
        if is_ordered:
            tensors["weight_g_idx"] = groups.astype(np.int32)
        return tensors, _dequantized(codes, zeros, scales, groups)

    weights = {"num_bits": bits, "symmetric": not has_zeros, "actorder": "group" if is_ordered else None}
    weights |= {"strategy": "group", "group_size": group} if group > 0 else {"strategy": "channel"}
    width = 4 if group == 128 else 2
    return Layout(write, _ct(weights), f"INT{bits}_{128 if group < 0 else group}", width)


def int8(shape: str = "row", *, has_zeros: bool = False, dtype: Any = BF16) -> Layout:
    """compressed-tensors, `int-quantized`, with scales per row or one for the tensor, and int8 activations."""

    def write(n: int, k: int, random: Random) -> Written:
        codes, zeros, scales, groups = _parts(random, n, k, 8, -1, dtype)
        if shape == "tensor":
            zeros, scales = zeros[:1], scales[:1]
        tensors = {
            "weight": (codes - 128).astype(np.int8),
            "weight_scale": scales.reshape(-1) if shape == "tensor" else scales,
        }
        if has_zeros:
            tensors["weight_zero_point"] = (zeros - 128).astype(np.int8).reshape(tensors["weight_scale"].shape)
        else:
            zeros = np.full_like(zeros, 128)
        tensors |= {"input_scale": scales_of(random, 1, dtype=BF16)} if shape == "tensor" else {}
        both = np.broadcast_to(zeros, (n, 1)), np.broadcast_to(scales, (n, 1))
        return tensors, _dequantized(codes, *both, groups)

    inputs = {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True, "type": "int"}
    weights = {"num_bits": 8, "strategy": "channel" if shape == "row" else "tensor", "symmetric": not has_zeros}
    return Layout(write, _ct(weights, inputs) | {"format": "int-quantized"}, "INT8_128")


def fp8(shape: str, *, is_ct: bool = False, dtype: Any = np.float32) -> Layout:
    """FP8 with scales per block of 128 x 128 (DeepSeek, Qwen), row (compressed-tensors) or tensor."""

    def write(n: int, k: int, random: Random) -> Written:
        codes = random.integers(0, 256, (n, k), np.uint8)
        codes[codes & 0x7F == 0x7F] = 1
        sizes = {"block": (-(-n // 128), -(-k // 128)), "row": (n, 1), "tensor": ()}[shape]
        scales = scales_of(random, *sizes, dtype=dtype)
        weight = codes.view(ml_dtypes.float8_e4m3fn)
        full = {"block": lambda: scales.repeat(128, 0).repeat(128, 1)[:n, :k]}.get(shape, lambda: scales)()
        values = weight.astype(np.float32) * full.astype(np.float32)
        name = "weight_scale" if is_ct or shape == "tensor" else "weight_scale_inv"
        tensors = {"weight": weight, name: scales}
        return tensors | ({"input_scale": scales_of(random, 1)} if shape == "tensor" else {}), values

    if is_ct:
        weights = {"num_bits": 8, "type": "float", "strategy": {"row": "channel"}.get(shape, shape)}
        weights |= {"block_structure": [128, 128]} if shape == "block" else {}
        inputs = {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True, "type": "float"}
        return Layout(write, _ct(weights, inputs) | {"format": "float-quantized"}, "FP8_128", 4)
    config: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    if shape == "tensor":
        config |= {"activation_scheme": "static", "weight_block_size": None, "ignored_layers": ["lm_head"]}
    return Layout(write, config, "FP8_128", 4)
