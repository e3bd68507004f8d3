"""Reads a GGUF file: configuration, tokenizer metadata and tensors, as values or as blocks."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from model.config import ConfigError, ModelConfig
from model.config_gguf import config_from_gguf
from model.formats import WIDER_FORMATS
from model.weights.checkpoint import ModelLoadError, TensorInfo
from model.weights.gguf_header import GgufHeader, GgufTensor, read_parts
from model.weights.hub import OTHER_HALF
from model.weights.quantize import k_blocks

_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_QUANTIZED = frozenset(
    (
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
        *("TQ1_0", "TQ2_0", "MXFP4"),
    )
)
_RUN_VALUES = 1 << 18  # values dequantized at once; a multiple of every block size


class GgufCheckpoint:
    """A GGUF model in one or more files. Headers are read immediately, tensors on demand."""

    naming: Literal["gguf"] = "gguf"
    quantizes_activations = False

    def __init__(self, path: Path) -> None:
        """Read the headers; `path` is any file of a model in several files.

        Raises:
            ModelLoadError: a file is missing, truncated or not GGUF, or the model is not supported.
        """
        parts = read_parts(path)
        self.path = str(path)
        # llama.cpp's files of the parts for images and audio.
        self.skipped = {file.name: file.stat().st_size for file in sorted(path.parent.glob(f"*{OTHER_HALF}*.gguf"))}
        self.metadata: dict[str, Any] = parts[0][1].metadata  # str, int, float, bool, or a list of these
        self._tensors: dict[str, GgufTensor] = {}
        self._file_of: dict[str, BinaryIO] = {}
        self._open_files = ExitStack()
        try:
            for part, header in parts:
                self._add(part, header)
            self.config = self._read_config()
        except BaseException:
            self.close()
            raise

    def names(self) -> Mapping[str, TensorInfo]:
        supported = _PLAIN.keys() | _QUANTIZED
        return {
            name: TensorInfo(tensor.shape, tensor.type_name, tensor.type_name in supported, tensor.nbytes)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None, step: int = 1) -> NDArray[Any]:
        tensor = self._tensors[name]
        values = self._read_rows(name, start, stop)
        if tensor.type_name in _QUANTIZED:
            values = _dequantize(values, GGMLQuantizationType(tensor.type_number))
        elif tensor.type_name == "F16":
            values = values.astype(np.float32)
        return values.reshape(_rows_of(tensor, start, stop), *tensor.shape[1:][-1:])[::step]

    def read_blocks(self, name: str, start: int, stop: int, step: int = 1) -> NDArray[np.uint8]:
        tensor = self._tensors[name]
        blocks = self._read_rows(name, start, stop)
        if tensor.type_name in WIDER_FORMATS:
            blocks = _recoded(blocks, GGMLQuantizationType(tensor.type_number))
        return blocks.reshape(_rows_of(tensor, start, stop), -1)[::step]

    def _read_rows(self, name: str, start: int, stop: int | None) -> NDArray[Any]:
        """Stored values of a tensor's rows, flat. A row consists of full blocks, except in a tensor of one axis."""
        tensor, file = self._tensors[name], self._file_of[name]
        dtype = _PLAIN.get(tensor.type_name, np.dtype(np.uint8))
        count, rows = _rows_of(tensor, 0, None), _rows_of(tensor, start, stop)
        row = tensor.nbytes // count if count else 0
        size = tensor.nbytes if rows == count else rows * row
        try:
            file.seek(tensor.offset + start * row)
            values = np.fromfile(file, dtype, size // dtype.itemsize)
        except OSError as error:
            raise ModelLoadError(f"cannot be read: {error.strerror}") from error
        if values.nbytes != size:
            raise ModelLoadError(f"cannot be read: the file has {values.nbytes} of {size} bytes")
        return values

    def close(self) -> None:
        self._open_files.close()

    def _add(self, path: Path, header: GgufHeader) -> None:
        file = self._open_files.enter_context(path.open("rb"))
        for name, tensor in header.tensors.items():
            if name in self._tensors:
                raise ModelLoadError(f"{path}: {name} is in another part too")
            self._tensors[name], self._file_of[name] = tensor, file

    def _read_config(self) -> ModelConfig:
        try:
            present = {"has_output": "output.weight", "has_qkv_bias": "blk.0.attn_q.bias"}
            flags = {flag: name in self._tensors for flag, name in present.items()}
            return config_from_gguf(self.metadata, self._numbers, **flags)
        except (ConfigError, ModelLoadError) as error:
            raise ModelLoadError(f"{self.path}: {error}") from error

    def _numbers(self, name: str) -> tuple[float, ...]:
        """A tensor's values, flat; empty if the tensor is missing."""
        if name not in self._tensors:
            return ()
        if self._tensors[name].type_name not in _PLAIN:
            raise ModelLoadError(f"{name}: stored as {self._tensors[name].type_name}, which is not supported")
        return tuple(float(value) for value in self.read(name).reshape(-1))


def _rows_of(tensor: GgufTensor, start: int, stop: int | None) -> int:
    """Number of rows from `start` up to `stop`; a tensor with one axis has its size, one without axes has one."""
    count = math.prod(tensor.shape[:-1] or tensor.shape)
    return (count if stop is None else min(stop, count)) - start


def _dequantize(raw: NDArray[np.uint8], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """Bytes [N] -> float32 values, flat. In small runs: the library's temporaries take 3 times the result's memory."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    values = np.empty(raw.size // block_bytes * block, np.float32)
    run = _RUN_VALUES // block
    # A damaged scale is infinite or NaN; the loader reports it, with the tensor's name.
    with np.errstate(all="ignore"):
        for start in range(0, raw.size // block_bytes, run):
            blocks = raw[start * block_bytes : (start + run) * block_bytes]
            values[start * block : (start + run) * block] = quants.dequantize(blocks, kind)
    return values


def _recoded(raw: NDArray[np.uint8], kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """Bytes of blocks in a format of `WIDER_FORMATS` as blocks of the wider one, with the same values."""
    blocks = raw.reshape(-1, GGML_QUANT_SIZES[kind][1]).copy()
    place = slice(0, 2) if kind is GGMLQuantizationType.IQ3_S else slice(-2, None)
    d = blocks[:, place].copy()
    blocks[:, place] = np.array([1], "<f2").view(np.uint8)
    integers = _dequantize(blocks.reshape(-1), kind)
    if kind is not GGMLQuantizationType.IQ3_S:  # d * (code - 1) = (d * 1) * code - d * 1
        codes = (integers + 1).astype(np.uint8).reshape(len(blocks), 2, 4, 32)  # of each 32 bytes the lowest bits first
        packed = np.bitwise_or.reduce(codes << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=2).reshape(-1, 64)
        return np.concatenate([np.full((len(blocks), 16), 0x11, np.uint8), packed, d, d], axis=1)
    # d * scale * odd, with -15 <= odd <= 15, = (d * scale) * (odd + 16) - (8 d) * (2 scale)
    scales = (blocks[:, -4:, None] >> np.array([0, 4], np.uint8) & 15).reshape(-1, 8) * 2 + 1
    codes = (integers.reshape(-1, 8, 32) / scales[..., None] + 16).astype(np.uint8)
    with np.errstate(over="ignore"):  # the loader refuses what becomes infinite
        steps = [step.view("<f2")[:, 0] for step in (d, (d.view("<f2") * np.float16(8)).view(np.uint8))]
    return k_blocks(steps, [scales.T, 2 * scales.T], codes.transpose(1, 2, 0), 5)
