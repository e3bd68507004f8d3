"""Fills the weight table of a family from a checkpoint, or lists everything that is wrong with it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from model.config import ModelConfig
from model.config_gguf import ROPE_TENSORS
from model.families import HEAD, Piece, WeightRow
from model.weights.checkpoint import Checkpoint, TensorInfo
from model.weights.errors import ModelLoadError
from model.weights.gguf import GgufCheckpoint
from model.weights.int8 import Int8Array, quantise
from model.weights.safetensors import SafetensorsCheckpoint
from model.weights.source import ModelSource

_CHECK_VALUES = 1 << 20  # values looked at together, so that a check needs little memory
_BF16_EXPONENT = np.uint16(0x7F80)  # all ones: infinite or NaN

type Put[T] = Callable[[str, NDArray[Any]], T]
type PutInt8[T] = Callable[[Int8Array], T]
type Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor of the checkpoint and what it must look like."""

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int  # heads whose rows are stored as [E/2, 2]; 0 where they lie as ours do
    offset: float  # to be added to the values


@dataclass(frozen=True, slots=True)
class _Target:
    """One of our weights and the parts that are stacked along axis 0 to make it."""

    path: str
    parts: tuple[_Part, ...]


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Opens the files of a model and reads their headers; close it when the weights are loaded.

    Raises:
        ModelLoadError: a file is missing, damaged or of a model that is not supported.
    """
    return GgufCheckpoint(source.path) if source.is_gguf else SafetensorsCheckpoint(source.path)


def load_weights[T](
    checkpoint: Checkpoint,
    dtype: np.dtype[Any],
    put: Put[T],
    progress: Progress | None = None,
    *,
    put_int8: PutInt8[T] | None = None,
) -> dict[str, T]:
    """Reads every weight of the model's family, one of ours at a time.

    Args:
        checkpoint: an open model.
        dtype: of the matrices, float32 or bfloat16; norms and biases (one axis) are float32 always.
        put: given a target path and its host array, which is not used again here, returns what to keep.
        progress: called after each weight with the bytes of the file(s) read so far, and those to read in all.
        put_int8: where it is given, matrices are made int8 with scales (as they are stored where they are stored so,
            else rounded) and go to it instead of `put`.

    Returns:
        Target path, such as "layers.0.attention.qkv.weight", -> what `put` returned.

    Raises:
        ModelLoadError: lists every problem, one a line, under the checkpoint's own names. What the headers show is
            found before any weight is read.
    """
    targets = _plan(checkpoint)
    stored = checkpoint.names()
    problems = _problems(checkpoint, targets, stored)
    if problems:
        raise ModelLoadError.of_problems(checkpoint.path, problems)
    total = sum(stored[part.name].nbytes for target in targets for part in target.parts)
    done = 0
    weights: dict[str, T] = {}
    for target in targets:
        # Once a problem is found only the list of problems matters.
        if put_int8 is not None and len(target.parts[0].shape) == 2:
            matrix = _read_int8(checkpoint, target, problems)
            if not problems:
                weights[target.path] = put_int8(matrix)
        else:
            array = _read(checkpoint, target, dtype, problems)
            if not problems:
                weights[target.path] = put(target.path, array)
        done += sum(stored[part.name].nbytes for part in target.parts)
        if progress is not None:
            progress(done, total)
    if problems:
        raise ModelLoadError.of_problems(checkpoint.path, problems)
    return weights


def _plan(checkpoint: Checkpoint) -> list[_Target]:
    """The family's rows, once for each layer where they name one."""
    config = checkpoint.config
    rows = [row for row in config.traits.weights if not (config.tie_word_embeddings and row == HEAD)]
    return [
        _Target(row.target.format(i=layer), tuple(_part(checkpoint, piece, layer) for piece in row.pieces))
        for row in rows
        for layer in _layers(config, row)
    ]


def _layers(config: ModelConfig, row: WeightRow) -> range:
    return range(config.num_layers if "{i}" in row.target else 1)


def _part(checkpoint: Checkpoint, piece: Piece, layer: int) -> _Part:
    dims = checkpoint.config.dims()
    is_gguf = checkpoint.naming == "gguf"
    interleaved = is_gguf and checkpoint.config.traits.gguf_interleaved_rotary and piece.heads is not None
    return _Part(
        (piece.gguf if is_gguf else piece.hf).format(i=layer),
        tuple(dims[letter] for letter in piece.shape),
        dims[piece.heads] if interleaved and piece.heads is not None else 0,
        0.0 if is_gguf or not piece.is_norm else checkpoint.config.traits.hf_norm_offset,
    )


def _problems(checkpoint: Checkpoint, targets: list[_Target], stored: Mapping[str, TensorInfo]) -> list[str]:
    """Everything that the headers show to be wrong."""
    wanted = {part.name: part for target in targets for part in target.parts}
    found = []
    for part in wanted.values():
        info = stored.get(part.name)
        if info is None:
            found.append(f"{part.name}: missing")
            continue
        if info.shape != part.shape:
            found.append(f"{part.name}: has shape {list(info.shape)}, must be {list(part.shape)}")
        if not info.supported:
            found.append(f"{part.name}: stored as {info.stored_as}, which is not supported")
    known = wanted.keys() | set(_ignored(checkpoint.config))
    found += [f"{name}: unexpected" for name in stored if name not in known]
    return found


def _ignored(config: ModelConfig) -> Iterator[str]:
    yield from ROPE_TENSORS  # the configuration has read them
    for name in config.traits.ignored:
        for layer in range(config.num_layers):
            yield name.format(i=layer)
    if config.tie_word_embeddings:  # a copy of the embedding
        for piece in HEAD.pieces:
            yield from (piece.hf, piece.gguf)


def _read(checkpoint: Checkpoint, target: _Target, dtype: np.dtype[Any], problems: list[str]) -> NDArray[Any]:
    """The parts of a target, stacked and cast; what is wrong with their values is added to `problems`."""
    shape = (sum(part.shape[0] for part in target.parts), *target.parts[0].shape[1:])
    stacked = np.empty(shape, dtype if len(shape) > 1 else np.float32)
    row = 0
    for part in target.parts:
        rows = stacked[row : row + part.shape[0]]
        row += part.shape[0]
        try:
            values = checkpoint.read(part.name)
        except ModelLoadError as error:
            problems.append(f"{part.name}: {error}")
            continue
        np.copyto(rows, _half_split(values, part.interleaved_heads), casting="same_kind")
        if part.offset:
            rows += np.float32(part.offset)
        if not _all_finite(rows):
            problems.append(f"{part.name}: holds values that are not finite")
    return stacked


def _read_int8(checkpoint: Checkpoint, target: _Target, problems: list[str]) -> Int8Array:
    """The parts of a matrix, stacked, as int8; what is wrong with their values is added to `problems`."""
    parts = []
    for part in target.parts:
        try:
            stored = checkpoint.read_int8(part.name)
            if stored is None:
                stored = quantise(checkpoint.read(part.name))
        except ModelLoadError as error:
            problems.append(f"{part.name}: {error}")
            continue
        if not _all_finite(stored.scales):
            problems.append(f"{part.name}: holds values that are not finite, or too large for int8 with float16 scales")
        parts.append([_half_split(array, part.interleaved_heads) for array in (stored.values, stored.scales)])
    if problems:
        return Int8Array(np.empty((0, 0), np.int8), np.empty((0, 0), np.float16))
    values, scales = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Int8Array(values, scales)


def _half_split(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorders rows [heads, E/2, 2], as GGUF files of the Llama family pair them, to [heads, 2, E/2]."""
    if not heads:
        return values
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _all_finite(values: NDArray[Any]) -> bool:
    flat = values.reshape(-1)
    is_bf16 = values.dtype == ml_dtypes.bfloat16
    for start in range(0, flat.size, _CHECK_VALUES):
        some = flat[start : start + _CHECK_VALUES]
        # ml_dtypes' own isfinite is many times slower than looking at the bits.
        finite = (some.view(np.uint16) & _BF16_EXPONENT) != _BF16_EXPONENT if is_bf16 else np.isfinite(some)
        if not finite.all():
            return False
    return True
