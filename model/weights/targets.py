"""Our weights and the parts of a checkpoint's tensors that they consist of."""

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model.weight_specs import ExpertSlice, HeadSlice, TensorSpec
from model.weights.checkpoint import Checkpoint, TensorInfo


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the checkpoint, or an expert's rows of one, and its expected properties."""

    name: str
    shape: tuple[int, ...]
    # Heads with 2 e rows that are stored as [e, 2], 2 e, and the first of these rows; 0 heads if stored as ours.
    interleaved: tuple[int, int, int]
    offset: float  # added to the values
    stored: tuple[int, ...]  # shape of the full tensor
    first: int = 0  # its first row in the tensor, of all axes but the last one together
    step: int = 1  # rows of the tensor from one of its rows to the next
    transposed: bool = False  # its rows are columns of the tensor

    def nbytes(self, stored: Mapping[str, TensorInfo]) -> float:
        """Bytes of the part in the file(s)."""
        return stored[self.name].nbytes * math.prod(self.shape) / max(1, math.prod(self.stored))

    def read(self, read: Callable[[str, int, int, int], NDArray[Any]], start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop-1, from a method that reads rows of a tensor."""
        if self.transposed:
            columns = read(self.name, self.first, self.first + self.shape[1], 1)
            return np.ascontiguousarray(columns.T[start:stop])
        first, last = self.first + start * self.step, self.first + (stop - 1) * self.step
        if len(self.stored) > len(self.shape) == 1:  # a vector inside a row
            row, first = divmod(first, self.stored[-1])
            values = read(self.name, row, row + 1, 1).reshape(-1)
            return np.ascontiguousarray(values[first : first + (stop - start - 1) * self.step + 1 : self.step])
        return read(self.name, first, last + 1, self.step)


@dataclass(frozen=True, slots=True)
class Target:
    """One of our weights and the tensors that are stacked along axis 0."""

    path: str
    parts: tuple[Part, ...]
    role: Literal["plain", "router", "experts"] = "plain"  # as in WeightSpec

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])


def targets_of(checkpoint: Checkpoint) -> list[Target]:
    """The weights of a model's family."""
    weights = checkpoint.config.weights().items()
    dims, names = checkpoint.config.dims(), checkpoint.names()
    return [
        Target(path, tuple(_part(checkpoint, tensor, dims, names) for tensor in weight.tensors), weight.role)
        for path, weight in weights
    ]


def _part(checkpoint: Checkpoint, tensor: TensorSpec, dims: Mapping[str, int], names: Container[str]) -> Part:
    config, is_gguf = checkpoint.config, checkpoint.naming == "gguf"
    if is_gguf and tensor.gguf_else is not None and tensor.gguf not in names and tensor.gguf_else.gguf in names:
        tensor = tensor.gguf_else
    shape = tuple(dims[letter] for letter in tensor.shape)
    place = tensor.gguf_slice if is_gguf else tensor.hf_slice
    stored, first, step = _place(place, shape, dims)
    traits, heads = config.traits, 0
    if tensor.heads is not None and config.traits.has_interleaved_rotary(is_gguf):
        heads = dims[tensor.heads]
    rotated = config.rotated_dims  # the last rows of a head in latent attention
    return Part(
        tensor.gguf if is_gguf else tensor.hf,
        shape,
        (heads, rotated, shape[0] // heads - rotated if heads and config.latent else 0),
        0.0 if is_gguf or not tensor.is_norm else traits.hf_norm_offset,
        stored,
        first,
        step,
        isinstance(place, HeadSlice) and place.transposed,
    )


def _place(
    place: ExpertSlice | HeadSlice | None, shape: tuple[int, ...], dims: Mapping[str, int]
) -> tuple[tuple[int, ...], int, int]:
    """Shape of the full tensor, and first row and step of a part in it."""
    if place is None:
        return shape, 0, 1
    if isinstance(place, HeadSlice):
        rows = [dims[letter] for letter in place.rows]
        columns = shape[0] if place.transposed else shape[1]
        return (dims["H"] * sum(rows), columns), place.head * sum(rows) + sum(rows[: place.part]), 1
    stored = (dims[place.count], place.parts * shape[0], *shape[1:])
    first = place.expert * place.parts * shape[0]
    return (
        (stored, first + place.part, place.parts) if place.interleaved else (stored, first + place.part * shape[0], 1)
    )
