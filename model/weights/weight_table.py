"""Reads the weights of a family's table from a checkpoint, or lists every problem."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from model.config import ModelConfig
from model.config_gguf import ROPE_TENSORS
from model.family import HEAD
from model.formats import FLOATS, FORMATS, BlockFormat
from model.layout import COLUMN_BLOCK
from model.weights.checkpoint import Checkpoint, ModelLoadError, TensorInfo
from model.weights.gguf import GgufCheckpoint
from model.weights.rows import BlockRows, Rows, all_finite, half_split, quantized
from model.weights.safetensors import SafetensorsCheckpoint
from model.weights.source import ModelSource
from model.weights.targets import Part, Target, targets_of

_RUN_VALUES = 1 << 20  # values read at once

type Put[T] = Callable[[str, Any], T]  # takes Rows, or BlockRows of stacked tensors
type Progress = Callable[[int, int], None]


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Open the files of a model and read their headers; the caller closes them.

    Raises:
        ModelLoadError: a file is missing or damaged, or the model is not supported.
    """
    return GgufCheckpoint(source.path) if source.is_gguf else SafetensorsCheckpoint(source.path)


@dataclass(frozen=True, slots=True)
class Storage:
    """How the weights of a model are stored in memory."""

    dtype: np.dtype[Any]  # of the model's activations, float32 or bfloat16
    quantization: str = "auto"  # auto: block formats as in the file; none: floats; else the format of all matrices
    packs: bool = False  # floats are packed for kernels, too
    stacks: bool = True  # stacked tensors may differ in format

    def formats(self, target: Target, stored: Mapping[str, TensorInfo]) -> tuple[BlockFormat, ...]:
        """The format of each tensor of a matrix; empty: a plain array of the dtype."""
        if target.role == "router":
            info = stored[target.parts[0].name]
            return (FORMATS[info.stored_as if info.stored_as in FLOATS else "F32"],) if self.packs else ()
        formats = tuple(self._format_of(stored[part.name], part.transposed) for part in target.parts)
        if len(target.shape) != 2 or not any(formats):
            return ()
        is_expert = target.role == "experts"
        if is_expert and target.parts[0].shape[0] % COLUMN_BLOCK:  # an expert starts inside a block
            return ()
        has_orders = is_expert and any(stored[part.name].order is not None for part in target.parts)
        if has_orders or (len(set(formats)) > 1 and (is_expert or not self.stacks)):
            return (FORMATS["F32"],) * len(formats)
        return tuple(
            self._float_format(stored[part.name]) if item is None else item
            for item, part in zip(formats, target.parts, strict=True)
        )

    def nbytes(self, shape: tuple[int, ...], block_format: BlockFormat | None) -> int:
        """Bytes of a matrix in a format, without the padding of columns; None: a plain array."""
        n, k = shape
        return n * k * self.dtype.itemsize if block_format is None else block_format.nbytes(n, k)

    def _format_of(self, info: TensorInfo, is_transposed: bool) -> BlockFormat | None:
        if self.quantization not in ("auto", "none"):
            return FORMATS[self.quantization]
        keeps_blocks = self.quantization == "auto" and (self.stacks or info.order is None) and not is_transposed
        coded = info.block_format if keeps_blocks else None
        return self._float_format(info) if coded is None and self.packs else coded

    def _float_format(self, info: TensorInfo) -> BlockFormat:
        """One that loses nothing of the tensor, or bfloat16 if that is the model's dtype."""
        if self.dtype == ml_dtypes.bfloat16:
            return FORMATS["BF16"]
        return FORMATS[info.stored_as if info.stored_as in FLOATS else "F32"]


def load_weights[T](
    checkpoint: Checkpoint, storage: Storage, put: Put[T], progress: Progress | None = None
) -> dict[str, T]:
    """Read every weight of the model's family, one at a time, each in runs of rows.

    Args:
        checkpoint: an open model.
        storage: of the matrices; norms and biases (one axis) are float32 always.
        put: called with a target path and the weight's rows: Rows, or BlockRows of tensors that are stacked.
        progress: called after each run with the bytes of the file(s) read so far and the total.

    Returns:
        What `put` returned, by target path as in `ModelConfig.weights`.

    Raises:
        ModelLoadError: lists every missing, superfluous, unsupported, damaged or non-finite tensor.
    """
    targets = check_headers(checkpoint)
    reader = _Reader(checkpoint, targets, storage.dtype, progress)
    weights: dict[str, T] = {}
    for target in targets:
        try:
            weights[target.path] = put(target.path, _rows(reader, target, storage.formats(target, checkpoint.names())))
        except _UnreadableError:
            continue  # read the others too, so that the list of problems is complete
    if reader.problems:
        problems = [f"{name}: {problem}" for name, problem in reader.problems.items()]
        raise ModelLoadError.of_problems(checkpoint.path, problems)
    return weights


def _rows(reader: "_Reader", target: Target, formats: Sequence[BlockFormat]) -> Rows | Sequence[BlockRows]:
    if not formats:
        return Rows(target.shape, reader.dtype_of(target), _prefetch(reader.runs(target)))
    stacked = []
    orders = [reader.order_of(part, block_format) for part, block_format in zip(target.parts, formats, strict=True)]
    keys = [(item, b"" if order is None else order.tobytes()) for item, order in zip(formats, orders, strict=True)]
    for (block_format, _), group in groupby(zip(keys, target.parts, orders, strict=True), key=itemgetter(0)):
        _, parts, columns = zip(*group, strict=True)
        shape = (sum(part.shape[0] for part in parts), target.shape[1])
        stacked.append(BlockRows(shape, block_format, _prefetch(reader.block_runs(parts, block_format)), columns[0]))
    return stacked


def check_headers(checkpoint: Checkpoint) -> Sequence[Target]:
    """The targets of a model's weights, which its headers are checked against.

    Raises:
        ModelLoadError: lists every missing, superfluous or unsupported tensor.
    """
    targets = targets_of(checkpoint)
    if problems := _problems(checkpoint, targets, checkpoint.names()):
        raise ModelLoadError.of_problems(checkpoint.path, problems)
    return targets


class _UnreadableError(Exception):
    """A part cannot be read; the problem is already recorded."""


class _Reader:
    """Reads targets in runs of rows, counts bytes and collects problems."""

    def __init__(
        self, checkpoint: Checkpoint, targets: Sequence[Target], dtype: np.dtype[Any], progress: Progress | None
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._progress = progress
        self._stored = checkpoint.names()
        self._total = round(sum(part.nbytes(self._stored) for target in targets for part in target.parts))
        self._bytes_read = 0.0
        self.problems: dict[str, str] = {}  # by the part's name

    def dtype_of(self, target: Target) -> np.dtype[Any]:
        """The model's dtype for a matrix that is not a router's, else float32."""
        return self._dtype if len(target.shape) > 1 and target.role != "router" else np.dtype(np.float32)

    def runs(self, target: Target) -> Iterator[NDArray[Any]]:
        """The rows of a target, converted to its dtype."""
        dtype = self.dtype_of(target)
        for part in target.parts:
            for start, stop in _runs_of(part):
                values = self._read(part, self._checkpoint.read, start, stop)
                run = half_split(values, *part.interleaved).astype(dtype, copy=False)
                run = run + np.float32(part.offset) if part.offset else run
                self._check(part, run)
                yield run

    def block_runs(self, parts: Sequence[Part], block_format: BlockFormat) -> Iterator[NDArray[np.uint8]]:
        """The rows of stacked parts in a format: the stored blocks, or rounded to it."""
        for part in parts:
            for start, stop in _runs_of(part):
                if self._stored[part.name].block_format == block_format and not part.transposed:
                    blocks = self._read(part, self._checkpoint.read_blocks, start, stop)
                else:
                    values = self._read(part, self._checkpoint.read, start, stop)
                    self._check(part, values)
                    try:
                        blocks = quantized(values, block_format)
                    except ValueError as error:
                        self.problems[part.name] = str(error)
                        raise _UnreadableError from error
                if block_format.name in FLOATS:  # rounding to a narrower one may overflow
                    self._check(part, blocks.view(FLOATS[block_format.name]))
                self._check_blocks(part, blocks, block_format)
                yield half_split(blocks, *part.interleaved)

    def order_of(self, part: Part, block_format: BlockFormat) -> NDArray[np.int32] | None:
        """The order of a matrix's columns in `block_runs`."""
        info = self._stored[part.name]
        return info.order if info.block_format == block_format else None

    def _read(
        self, part: Part, read: Callable[[str, int, int, int], NDArray[Any]], start: int, stop: int
    ) -> NDArray[Any]:
        try:
            run = part.read(read, start, stop)
        except ModelLoadError as error:
            self.problems[part.name] = str(error)
            raise _UnreadableError from error
        self._bytes_read += (stop - start) / part.shape[0] * part.nbytes(self._stored)
        if self._progress is not None:
            self._progress(round(self._bytes_read), self._total)
        return run

    def _check(self, part: Part, values: NDArray[Any]) -> None:
        if not all_finite(values):
            self.problems[part.name] = "holds values that are not finite"

    def _check_blocks(self, part: Part, blocks: NDArray[np.uint8], block_format: BlockFormat) -> None:
        if not block_format.has_finite_scales(blocks):
            self.problems[part.name] = f"holds scales that are not finite, or values too large for {block_format.name}"


def _prefetch[T](items: Iterator[T]) -> Iterator[T]:
    """The items, each computed in another thread while the previous one is in use."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, items, None)
        while (item := future.result()) is not None:
            future = thread.submit(next, items, None)
            yield item


def _runs_of(part: Part) -> Iterator[tuple[int, int]]:
    """Start and stop of each run of rows. Rows that are reordered are one run."""
    count = part.shape[0]
    size = max(1, _RUN_VALUES // max(1, math.prod(part.shape[1:])))
    size = count if part.interleaved[0] or part.transposed or len(part.shape) == 1 else size
    for start in range(0, count, size):
        yield start, min(count, start + size)


def _problems(checkpoint: Checkpoint, targets: list[Target], stored: Mapping[str, TensorInfo]) -> list[str]:
    """Every problem that the headers show."""
    expected = {part.name: part for target in targets for part in target.parts}
    problems = []
    for part in expected.values():
        info = stored.get(part.name)
        if info is None:
            problems.append(f"{part.name}: missing")
            continue
        if info.shape != part.stored:
            problems.append(f"{part.name}: has shape {list(info.shape)}, must be {list(part.stored)}")
        if not info.supported:
            problems.append(f"{part.name}: stored as {info.stored_as}, which is not supported")
    known = expected.keys() | set(_ignored(checkpoint.config))
    return problems + [f"{name}: unexpected" for name in stored if name not in known]


def _ignored(config: ModelConfig) -> Iterator[str]:
    yield from ROPE_TENSORS  # part of the configuration
    for name in config.traits.ignored:
        for layer in range(config.num_layers):
            yield name.format(i=layer)
    if config.tie_word_embeddings:  # a copy of the embedding
        for tensor in HEAD.tensors:
            yield from (tensor.hf, tensor.gguf)
