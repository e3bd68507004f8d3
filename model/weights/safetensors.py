"""Reads a directory of config.json and safetensors, in one file or sharded.

Formats: the safetensors README ("Format"), and the index that `transformers` writes with shards
(`{"metadata": {...}, "weight_map": {tensor name: file name}}`).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from model.config import ConfigError, ModelConfig, short_repr
from model.config_hf import config_from_hf
from model.text_half import text_half_of, text_tensor
from model.weights.checkpoint import ModelLoadError, TensorInfo
from model.weights.hf_packing import QuantizedTensor, quantized_tensors
from model.weights.hf_quantization import Quantization, quantization_of

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAPPED_BYTES = 16 << 20
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


class _Shard:
    """One file, remapped from time to time: pages of a mapping that were read count as the process's memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0
        self.file = self._open()

    def read(self, name: str, *index: slice) -> NDArray[Any]:
        """A part of a tensor, which has as many axes as slices or more; FP8 as bytes, of slices of rows only."""
        if self._read_bytes > _MAPPED_BYTES:
            self.close()
            self._read_bytes, self.file = 0, self._open()
        header = self.file.get_slice(name)
        # A view of a copy that safetensors made of the mapping.
        if header.get_dtype() == "F8_E4M3":  # numpy has no such type
            values = self._read_bytes_of(name, header.get_shape(), *index)
        else:
            values = header[index] if index and header.get_shape() else np.atleast_1d(self.file.get_tensor(name))
        self._read_bytes += values.nbytes
        return values

    def _read_bytes_of(self, name: str, shape: Sequence[int], rows: slice) -> NDArray[np.uint8]:
        """Rows of a tensor whose elements are bytes."""
        size = math.prod(shape[1:])
        with self._path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            first = 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]
            start, stop, _ = rows.indices(shape[0])
            file.seek(first + start * size)
            return np.fromfile(file, np.uint8, (stop - start) * size).reshape(stop - start, *shape[1:])

    def close(self) -> None:
        self.file.__exit__(None, None, None)

    def _open(self) -> Any:  # safetensors gives its methods no types
        file: Any = safe_open(self._path, framework="numpy")
        return file.__enter__()


class SafetensorsCheckpoint:
    """A Hugging Face model directory. Tensors are read one by one through memory maps."""

    naming: Literal["hf"] = "hf"

    def __init__(self, folder: Path) -> None:
        """Open every shard and read the headers.

        Raises:
            ModelLoadError: a file is missing, truncated or of another format, or the model is not supported.
        """
        self.path = str(folder)
        content = _json_object(folder / "config.json")
        self.config, quantization = _config(folder / "config.json", content)
        self._is_text_half = text_half_of(content) is not None
        count = content.get("num_nextn_predict_layers") if self.config.latent else None
        # Layers that predict further tokens, as transformers skips them.
        extra = range(self.config.num_layers, self.config.num_layers + (count if isinstance(count, int) else 0))
        self._skipped_layers = tuple(f"model.layers.{i}." for i in extra[:8])
        self.skipped: dict[str, int] = {}
        self._open_files = ExitStack()
        self._file_of: dict[str, tuple[_Shard, str]] = {}  # and the name there
        self._tensors: dict[str, TensorInfo] = {}
        try:
            for path in _files(folder):
                self._add(path)
            self._quantized: Mapping[str, QuantizedTensor] = {}
            self.quantizes_activations = quantization is not None and quantization.quantizes_activations
            if quantization is not None:
                self._quantized, parts = quantized_tensors(quantization, self._tensors, self._read)
                parts |= set(self._zero_biases())
                plain = {name: info for name, info in self._tensors.items() if name not in parts}
                self._tensors = plain | {name: tensor.info for name, tensor in self._quantized.items()}
        except BaseException:
            self.close()
            raise
        if (
            self._is_text_half and "lm_head.weight" in self._tensors
        ):  # as transformers, if it differs from the embedding
            self.config = replace(self.config, tie_word_embeddings=False)

    def names(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, start: int = 0, stop: int | None = None, step: int = 1) -> NDArray[Any]:
        shape = self._tensors[name].shape
        if name in self._quantized:
            return self._quantized[name].read(start, math.prod(shape[:-1]) if stop is None else stop, step)
        if len(shape) > 2:
            first, row = divmod(start, shape[1])
            rows = slice(row, shape[1] if stop is None else row + stop - start)
            if self._is_transposed(name):
                values = np.ascontiguousarray(self._read(name, slice(first, first + 1), slice(None), rows)[0].T)
            else:
                values = self._read(name, slice(first, first + 1), rows).reshape(-1, shape[-1])
        else:
            values = self._read(name, slice(start, stop))
        values = values if step == 1 else np.ascontiguousarray(values[::step])
        return values.astype(np.float32) if values.dtype == np.float16 else values

    def read_blocks(self, name: str, start: int, stop: int, step: int = 1) -> NDArray[np.uint8]:
        return self._quantized[name].read_blocks(start, stop, step)

    def _is_transposed(self, name: str) -> bool:
        experts = self.config.traits.experts
        return experts is not None and experts.hf_transposed and name.endswith(experts.hf_fused or ())

    def _zero_biases(self) -> Iterator[str]:
        """Biases of quantized weights that the network does not have: AutoGPTQ wrote zeros for all."""
        known = {tensor.hf for weight in self.config.weights().values() for tensor in weight.tensors}
        for name in self._tensors:
            stem = name.removesuffix(".bias")
            if (
                stem != name
                and name not in known
                and f"{stem}.weight" in self._quantized
                and not self._read(name).any()
            ):
                yield name

    def _read(self, name: str, *index: slice) -> NDArray[Any]:
        try:
            shard, stored_name = self._file_of[name]
            return shard.read(stored_name, *index)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"cannot be read: {error}") from error

    def close(self) -> None:
        self._open_files.close()

    def _add(self, path: Path) -> None:
        try:
            shard = _Shard(path)
        except FileNotFoundError as error:
            raise ModelLoadError(f"{path}: listed in {_INDEX} but missing") from error
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{path}: not a complete safetensors file: {error}") from error
        self._open_files.callback(shard.close)
        for stored_name in shard.file.offset_keys():
            name = text_tensor(stored_name) if self._is_text_half else stored_name
            if name in self._tensors:
                raise ModelLoadError(f"{path}: {name} is in another shard too")
            header = shard.file.get_slice(stored_name)
            shape, stored_as = tuple(header.get_shape()) or (1,), str(header.get_dtype())
            size = _ITEM_BYTES.get(stored_as)
            nbytes = 0 if size is None else size * int(np.prod(shape, dtype=np.int64))
            if len(shape) == 3 and name is not None and self._is_transposed(name):
                shape = (shape[0], shape[2], shape[1])
            if name is None or name.startswith(self._skipped_layers):
                self.skipped[stored_name] = nbytes
                continue
            self._file_of[name] = shard, stored_name
            self._tensors[name] = TensorInfo(shape, stored_as, size is not None, nbytes)


def read_config(path: Path) -> ModelConfig:
    """The network that a config.json describes; raises ModelLoadError."""
    return _config(path, _json_object(path))[0]


def _config(path: Path, content: Mapping[str, Any]) -> tuple[ModelConfig, Quantization | None]:
    try:
        return config_from_hf(content), quantization_of(content)
    except ConfigError as error:
        raise ModelLoadError(f"{path}: {error}") from error


def _files(folder: Path) -> list[Path]:
    """The files to open, in the order in which `transformers` looks for them."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        return _indexed(folder)
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) != 1:
        raise ModelLoadError(f"{folder}: has {len(paths)} *.safetensors files, but no {_SINGLE} and no {_INDEX}")
    return paths


def _indexed(folder: Path) -> list[Path]:
    index = folder / _INDEX
    weight_map = _json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index}: weight_map is missing or not an object")
    names = set()
    for name in weight_map.values():
        # A shard is in the folder of its index: reject paths to other folders, and impossible file names.
        is_plain = isinstance(name, str) and name.isprintable() and Path(name).name == name
        if not is_plain or not name.endswith(".safetensors"):
            raise ModelLoadError(f"{index}: {short_repr(name)} is not the name of a .safetensors file")
        names.add(name)
    return [folder / name for name in sorted(names)]


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: not a JSON object")
    return value
