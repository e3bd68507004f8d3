"""Writes a model as a GGUF file whose matrices are rounded to block formats, with llama.cpp's choice of formats."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType
from numpy.typing import NDArray

from model.config import ConfigError, ModelConfig
from model.config_gguf import ROPE_TENSORS, config_from_gguf
from model.importance import Importance
from model.rope import Rope, yarn_scale
from model.weight_specs import TensorSpec
from model.weights.checkpoint import Checkpoint, ModelLoadError
from model.weights.gguf_header import read_parts
from model.weights.quantize import quantize

_RUN_VALUES = 1 << 24  # values read at once
_QUANTIZATION_VERSION = 2  # of ggml's block formats
_PLAIN: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
# Formats of rows that are no multiple of 256 values.
_SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_SENSITIVE = re.compile(r"blk\.(\d+)\.(attn_v|attn_qkv|ffn_down)\.weight")
_REPLACED = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
_DIVISORS, _LONG, _SHORT = ROPE_TENSORS


@dataclass(frozen=True, slots=True)
class QuantizedType:
    """A value of --type."""

    matrices: str  # ggml's format of most matrices
    head: str  # of the head, and of the embedding if the two are tied
    sensitive: str  # of attn_v and ffn_down in some layers
    file_type: LlamaFileType


TYPES = {
    "q4_k": QuantizedType("Q4_K", "Q6_K", "Q6_K", LlamaFileType.MOSTLY_Q4_K_M),
    "q5_k": QuantizedType("Q5_K", "Q6_K", "Q6_K", LlamaFileType.MOSTLY_Q5_K_M),
    "q6_k": QuantizedType("Q6_K", "Q6_K", "Q6_K", LlamaFileType.MOSTLY_Q6_K),
    "q8_0": QuantizedType("Q8_0", "Q8_0", "Q8_0", LlamaFileType.MOSTLY_Q8_0),
    "mxfp4": QuantizedType("MXFP4", "Q8_0", "MXFP4", LlamaFileType.MOSTLY_MXFP4_MOE),
}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    name: str  # GGUF's
    shape: tuple[int, ...]
    weight: str  # path of our weight; "" for tensors of the configuration
    runs: Callable[[], Iterator[NDArray[Any]]]  # rows in order, as they are in a GGUF file


@dataclass(frozen=True, slots=True)
class OutputModel:
    """What is written, besides formats."""

    config: ModelConfig
    architecture: str
    metadata: dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]]  # value, type, type of items
    tensors: list[OutputTensor]


def output_of_gguf(checkpoint: Checkpoint) -> OutputModel:
    """The model in an open GGUF file, with all metadata of the file but what says how it was rounded.

    Raises:
        ModelLoadError: it has experts.
    """
    _refuse_unwritable(checkpoint)
    path = read_parts(Path(checkpoint.path))[0][0]
    metadata = {}
    for field in GGUFReader(path).fields.values():
        value, item = field.contents(), field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        is_kept = not field.name.startswith(("GGUF.", "split.", "quantize.")) and field.name not in _REPLACED
        if is_kept and value != []:  # the library writes no empty arrays, which have no effect
            metadata[field.name] = (value, field.types[0], item)
    paths = {tensor.gguf: path for path, spec in checkpoint.config.weights().items() for tensor in spec.tensors}
    tensors = [
        OutputTensor(name, info.shape, paths.get(name, ""), _reader(checkpoint, name, info.shape))
        for name, info in checkpoint.names().items()
    ]
    return OutputModel(checkpoint.config, checkpoint.config.family, metadata, tensors)


def output_of_folder(checkpoint: Checkpoint, tokenizer: Mapping[str, Any]) -> OutputModel:
    """The model in an open folder of safetensors; `tokenizer` holds the tokenizer's keys of GGUF.

    Raises:
        ModelLoadError: GGUF has no keys for a part of the configuration.
    """
    _refuse_unwritable(checkpoint)
    config = checkpoint.config
    architecture = config.family if config.traits.in_gguf else "llama"
    metadata, extra = _metadata(config, architecture)
    metadata |= {"general.name": Path(checkpoint.path).resolve().name, **tokenizer}
    keys = {"general.architecture": architecture, **metadata}
    problem = f"{checkpoint.path}: a GGUF file of {architecture} cannot express its config.json"
    try:
        present = {"has_output": not config.tie_word_embeddings, "has_qkv_bias": config.qkv_bias}
        found = config_from_gguf(keys, lambda name: extra.get(name, ()), **present)
    except ConfigError as error:
        raise ModelLoadError(f"{problem}: {error}") from error
    expected = replace(config, family=architecture, rms_norm_eps=found.rms_norm_eps)  # which is read with six digits
    if _with_float32_scales(found) != _with_float32_scales(expected) or not _has_known_rope(config):
        raise ModelLoadError(f"{problem}, such as its rotary scaling or its kinds of layers")
    tensors = [OutputTensor(name, (len(values),), "", partial(_single_run, values)) for name, values in extra.items()]
    dims = config.dims()
    for path, weight in config.weights().items():
        for tensor in weight.tensors:
            shape = tuple(dims[letter] for letter in tensor.shape)
            tensors.append(OutputTensor(tensor.gguf, shape, path, _converter(checkpoint, tensor, shape)))
    return OutputModel(config, architecture, {key: _typed(value) for key, value in metadata.items()}, tensors)


def _refuse_unwritable(checkpoint: Checkpoint) -> None:
    if (config := checkpoint.config).experts is not None or not (config.traits.in_gguf or config.family == "mistral"):
        kind = config.family if config.experts is None else "mixtures of experts"
        raise ModelLoadError(f"{checkpoint.path}: {kind} cannot be rounded to a GGUF file")


def _single_run(values: Sequence[float]) -> Iterator[NDArray[Any]]:
    yield np.array(values, np.float32)


def _with_float32_scales(config: ModelConfig) -> ModelConfig:
    """The scales of cosines and sines as in a file, which holds them as float32."""
    layers = [
        kind if kind.rope is None else replace(kind, rope=replace(kind.rope, scale=float(np.float32(kind.rope.scale))))
        for kind in config.layers
    ]
    return replace(config, layers=tuple(layers))


def _has_known_rope(config: ModelConfig) -> bool:
    """False for rotary divisors that llama.cpp does not read for this family."""
    rope = config.layers[0].rope
    return (
        rope is None
        or not rope.divisors
        or rope.yarn is not None
        or len({*rope.divisors}) == 1
        or config.family in ("llama", "mistral", "phi3")
    )


def _metadata(config: ModelConfig, architecture: str) -> tuple[dict[str, Any], dict[str, tuple[float, ...]]]:
    """Keys of the architecture, and tensors of rotary divisors."""
    windows = [kind.window for kind in config.layers]
    window = max(windows)
    values: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.rotated_dims,
        "vocab_size": config.vocab_size,
    }
    values |= {"attention.sliding_window": window} if window else {}
    values |= {"attn_logit_softcapping": config.attention_cap} if config.attention_cap else {}
    values |= {"final_logit_softcapping": config.logit_cap} if config.logit_cap else {}
    # The rope of layers with full attention; that of others follows from it.
    ropes = [kind.rope for kind in config.layers if kind.rope and (not kind.window or min(windows) > 0)]
    tensors: dict[str, tuple[float, ...]] = {}
    if ropes:
        more, tensors = _rope_metadata(ropes[0])
        values |= more
    return {f"{architecture}.{name}": value for name, value in values.items()}, tensors


def _rope_metadata(rope: Rope) -> tuple[dict[str, Any], dict[str, tuple[float, ...]]]:
    values: dict[str, Any] = {"rope.freq_base": rope.theta}
    scale = rope.scale / (yarn_scale(rope.yarn[0]) if rope.yarn else 1)  # its readers multiply by the latter
    values |= {"rope.scaling.attn_factor": scale} if scale != 1 else {}
    if rope.yarn:
        factor, length = rope.yarn
        values |= {"rope.scaling.type": "yarn", "rope.scaling.factor": factor}
        return values | {"rope.scaling.original_context_length": length}, {}
    if rope.long_divisors:
        values |= {"rope.scaling.original_context_length": rope.short_length}
        return values, {_LONG: rope.long_divisors, _SHORT: rope.divisors}
    if len({*rope.divisors}) == 1:
        return values | {"rope.scaling.type": "linear", "rope.scaling.factor": rope.divisors[0]}, {}
    return values, {_DIVISORS: rope.divisors} if rope.divisors else {}


def _typed(value: Any) -> tuple[Any, GGUFValueType, GGUFValueType | None]:
    """A value with the type that llama.cpp expects."""
    if isinstance(value, list):
        item = GGUFValueType.INT32 if isinstance(value[0], int) else _typed(value[0])[1]
        return value, GGUFValueType.ARRAY, item
    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    return value, kinds[type(value)], None


def _reader(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Callable[[], Iterator[NDArray[Any]]]:
    rows = shape[0] if shape else 1
    size = max(1, _RUN_VALUES * rows // max(1, int(np.prod(shape)))) if len(shape) > 1 else rows

    def runs() -> Iterator[NDArray[Any]]:
        for start in range(0, rows, size):
            yield checkpoint.read(name, start, min(rows, start + size))

    return runs


def _converter(
    checkpoint: Checkpoint, tensor: TensorSpec, shape: tuple[int, ...]
) -> Callable[[], Iterator[NDArray[Any]]]:
    """Rows of a safetensors tensor as they are in a GGUF file of the family."""
    traits, dims = checkpoint.config.traits, checkpoint.config.dims()
    offset = np.float32(traits.hf_norm_offset if tensor.is_norm else 0)
    architecture_is_llama = traits.gguf_interleaved_rotary or not traits.in_gguf
    if not (architecture_is_llama and tensor.heads):
        read = _reader(checkpoint, tensor.hf, shape)
        return lambda: (run.astype(np.float32) + offset if offset else run for run in read())

    def interleaved() -> Iterator[NDArray[Any]]:
        values = checkpoint.read(tensor.hf)
        halves = values.reshape(dims[str(tensor.heads)], 2, -1, *shape[1:])
        yield halves.swapaxes(1, 2).reshape(shape)

    return interleaved


def format_of(tensor: OutputTensor, config: ModelConfig, kind: QuantizedType) -> str:
    """ggml's format of a tensor: llama.cpp's choice for a file of this type."""
    if len(tensor.shape) != 2:
        return "F32"
    match = _SENSITIVE.fullmatch(tensor.name)
    if tensor.weight == "head.weight" or (tensor.weight == "embed.weight" and config.tie_word_embeddings):
        name = kind.head
    elif tensor.weight == "embed.weight" and kind.matrices == "MXFP4":
        name = "Q8_0"
    elif match and _has_more_bits(int(match[1]), config.num_layers):
        name = kind.sensitive
    else:
        name = kind.matrices
    columns = tensor.shape[1]
    if columns % _block(name):
        name = _SMALLER_BLOCKS.get(name, name)
    return "F16" if columns % _block(name) else name


def _block(name: str) -> int:
    return int(GGML_QUANT_SIZES[GGMLQuantizationType[name]][0])


def _has_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def write_gguf(
    path: Path,
    model: OutputModel,
    kind: QuantizedType,
    importance: Importance,
    on_tensor: Callable[[str, str], None] = lambda *_: None,
) -> None:
    """Write a file; `on_tensor` is called with the name and format of each tensor before it is rounded.

    Raises:
        ModelLoadError: a tensor cannot be read, or holds values that are not finite.
        OSError: the file cannot be written.
    """
    writer = GGUFWriter(path, model.architecture)
    try:
        for key, (value, type_, item) in model.metadata.items():
            writer.add_key_value(key, value, type_, item)
        writer.add_file_type(kind.file_type)
        writer.add_quantization_version(_QUANTIZATION_VERSION)
        formats = [format_of(tensor, model.config, kind) for tensor in model.tensors]
        for tensor, name in zip(model.tensors, formats, strict=True):
            form = GGMLQuantizationType[name]
            block, size = GGML_QUANT_SIZES[form]
            shape = tensor.shape if name in _PLAIN else (*tensor.shape[:-1], tensor.shape[-1] // block * size)
            bytes_ = int(np.prod(tensor.shape)) // block * size
            writer.add_tensor_info(tensor.name, shape, _PLAIN.get(name, np.dtype(np.uint8)), bytes_, form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, name in zip(model.tensors, formats, strict=True):
            on_tensor(tensor.name, name)
            try:
                parts = [_rounded(run, name, importance.get(tensor.weight)) for run in tensor.runs()]
            except (ModelLoadError, ValueError) as error:
                raise ModelLoadError(f"{tensor.name}: {error}") from error
            writer.write_tensor_data(np.concatenate(parts))
    finally:
        writer.close()


def _rounded(values: NDArray[Any], name: str, importance: NDArray[np.float32] | None) -> NDArray[Any]:
    values = values.astype(np.float32, copy=False)
    if name not in _PLAIN:
        return quantize(values, name, importance)
    with np.errstate(over="ignore"):
        values = values.astype(_PLAIN[name], copy=False)
    if not np.isfinite(values).all():
        raise ValueError(f"holds values that are not finite in {name}")
    return values
