"""The `quantization_config` of config.json: its settings by allow-list."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.config import ConfigError, check_keys, int_of, mapping_of, short_repr

_KEY = "quantization_config"
_PREFIX = f"{_KEY}."
_METHODS = ("awq", "compressed-tensors", "fp8", "gptq", "mxfp4")
# Settings of the program that quantized the model or of a kernel, and lists of modules, which follow from the tensors.
_IGNORED = {
    "awq": (
        *("backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse", "modules_to_not_convert"),
        *("model_path", "name_or_path"),
    ),
    "compressed-tensors": ("global_compression_ratio", "ignore", "quantization_status", "run_compressed", "version"),
    "fp8": ("dequantize", "ignored_layers", "modules_to_convert", "modules_to_not_convert"),
    "gptq": (
        *("act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_percent"),
        *("damp_auto_increment", "dataset", "disable_exllama", "exllama_config", "lm_head", "max_input_length", "meta"),
        *("model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block", "mse"),
        *("modules_in_block_to_quantize", "pack_dtype", "pad_token_id", "static_groups", "tokenizer"),
        *("true_sequential", "use_cuda_fp16", "use_exllama"),
    ),
    "mxfp4": ("dequantize", "modules_to_not_convert"),
}


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the quantized matrices of a checkpoint are stored."""

    method: str  # one of quant_method
    bits: int = 8
    group_size: int = -1  # columns that share a scale; -1: all
    zero_offset: int = 0  # added to stored zero points
    block: tuple[int, int] | None = None  # rows and columns that share a scale of FP8; None: follows from the tensors
    quantizes_activations: bool = False


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """Read the `quantization_config` of a config.json; None if it has none.

    Raises:
        ConfigError: names the key that is not supported.
    """
    settings = mapping_of(config, _KEY) or mapping_of(mapping_of(config, "text_config"), _KEY)
    if not settings:
        return None
    method = settings.get("quant_method")
    if method == "bitsandbytes" or settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        hint = "load the original model with --quantization q4_k or int8, or a GGUF, GPTQ or AWQ version of it"
        raise ConfigError(f"{_PREFIX}quant_method bitsandbytes is not supported: {hint}")
    match method:
        case "gptq":
            return _gptq(settings)
        case "awq":
            return _awq(settings)
        case "fp8":
            return _fp8(settings)
        case "compressed-tensors":
            return _compressed_tensors(settings)
        case "mxfp4":
            _check(settings, "mxfp4")
            return Quantization("mxfp4", bits=4, group_size=32)
    raise ConfigError(f"{_PREFIX}quant_method {short_repr(method)} is not supported; known: {', '.join(_METHODS)}")


def _check(settings: Mapping[str, Any], method: str, *known: str, neutral: Mapping[str, Any] | None = None) -> None:
    check_keys(settings, {"quant_method", *known, *_IGNORED[method]}, neutral or {}, _PREFIX)


def _one_of(settings: Mapping[str, Any], key: str, *known: Any, prefix: str = _PREFIX) -> Any:
    """The value of a key, which must be one of `known`; the first one if it is missing."""
    value = settings.get(key)
    if value is None and None not in known:
        return known[0]
    # True is not 1 here.
    if not any(value is item or (value == item and type(value) is type(item)) for item in known):
        names = ", ".join(str(item) for item in known if item is not None)
        raise ConfigError(f"{prefix}{key} {short_repr(value)} is not supported; known: {names}")
    return value


def _group_size(settings: Mapping[str, Any]) -> int:
    size = int_of(settings, "group_size", 128, low=-1)
    if size == 0:
        raise ConfigError(f"{_PREFIX}group_size must be positive or -1, got 0")
    return size


def _gptq(settings: Mapping[str, Any]) -> Quantization:
    _check(
        *(settings, "gptq", "bits", "group_size", "desc_act", "sym", "checkpoint_format", "format"),
        neutral={"is_marlin_format": False, "dynamic": {}, "use_marlin": False},
    )
    formats = {
        _one_of(settings, key, "gptq", "gptq_v2") for key in ("checkpoint_format", "format") if settings.get(key)
    }
    if len(formats) > 1:
        raise ConfigError(f"{_PREFIX}checkpoint_format and format differ")
    for key in ("desc_act", "sym"):  # what they change follows from the tensors
        _one_of(settings, key, False, True)
    offset = 0 if formats == {"gptq_v2"} else 1
    return Quantization("gptq", _one_of(settings, "bits", 4, 8), _group_size(settings), offset)


def _awq(settings: Mapping[str, Any]) -> Quantization:
    _check(settings, "awq", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format")
    _one_of(settings, "zero_point", True)
    for key in ("version", "format"):
        _one_of({key: str(settings[key]).lower()} if settings.get(key) else {}, key, "gemm")
    for key in ("bits", "w_bit"):
        _one_of(settings, key, 4)
    if settings.get("q_group_size") is not None:
        settings = {"group_size": settings["q_group_size"], **settings}
    return Quantization("awq", 4, _group_size(settings))


def _fp8(settings: Mapping[str, Any]) -> Quantization:
    keys = ("activation_scheme", "fmt", "scale_fmt", "weight_block_size")
    _check(settings, "fp8", *keys, neutral={"expert_dtype": "fp8"})
    _one_of(settings, "fmt", "e4m3", "float8_e4m3fn")
    _one_of(settings, "scale_fmt", "float", "ue8m0")  # powers of two are floats, too
    _one_of(settings, "activation_scheme", "dynamic", "static")
    return Quantization("fp8", block=_block(settings, "weight_block_size", _PREFIX), quantizes_activations=True)


def _block(settings: Mapping[str, Any], key: str, prefix: str) -> tuple[int, int] | None:
    value = settings.get(key)
    if value is None:
        return None
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(type(size) is int and size > 0 for size in value)
    ):
        raise ConfigError(f"{prefix}{key} must be two positive integers, got {short_repr(value)}")
    return value[0], value[1]


_CODES = {("int", 4): "pack-quantized", ("int", 8): "int-quantized", ("float", 8): "float-quantized"}


def _compressed_tensors(settings: Mapping[str, Any]) -> Quantization:
    neutral: dict[str, Any] = {"sparsity_config": {}, "transform_config": {}}
    known = ("config_groups", "format", "kv_cache_scheme")
    _check(
        {key: value for key, value in settings.items() if value != {}}, "compressed-tensors", *known, neutral=neutral
    )
    formats = (None, "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
    _one_of(settings, "format", *formats)
    groups, blocks, has_inputs = mapping_of(settings, "config_groups"), set(), bool(settings.get("kv_cache_scheme"))
    if not groups:
        raise ConfigError(f"{_PREFIX}config_groups is missing or empty")
    for name, group in groups.items():
        prefix = f"{_PREFIX}config_groups.{name}."
        if not isinstance(group, Mapping):
            raise ConfigError(f"{prefix.rstrip('.')} must be an object")
        check_keys(group, ("targets", "weights", "input_activations", "output_activations", "format"), {}, prefix)
        _one_of(group, "format", *formats, prefix=prefix)
        has_inputs |= bool(group.get("input_activations") or group.get("output_activations"))
        weights = mapping_of(group, "weights")
        if weights:
            blocks.add(_check_weights(weights, f"{prefix}weights."))
    if len(blocks) != 1:
        problem = "quantizes no weights" if not blocks else "must have one block_structure of weights"
        raise ConfigError(f"{_PREFIX}config_groups {problem}")
    return Quantization("compressed-tensors", block=blocks.pop(), quantizes_activations=has_inputs)


def _check_weights(weights: Mapping[str, Any], prefix: str) -> tuple[int, int] | None:
    known = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "actorder", "scale_dtype")
    check_keys(weights, (*known, "observer", "observer_kwargs", "zp_dtype"), {"dynamic": False}, prefix)
    kind, bits = (
        _one_of(weights, "type", "int", "float", prefix=prefix),
        _one_of(weights, "num_bits", 8, 4, prefix=prefix),
    )
    if (kind, bits) not in _CODES:
        raise ConfigError(f"{prefix}num_bits {bits} of type {kind} is not supported; known: 4 and 8 of int, 8 of float")
    _one_of(weights, "symmetric", True, False, prefix=prefix)
    _one_of(weights, "strategy", None, "tensor", "channel", "group", "block", prefix=prefix)
    _one_of(weights, "actorder", None, "group", "weight", "dynamic", "static", True, False, prefix=prefix)
    return _block(weights, "block_structure", prefix)
