"""Our weights and the parts of a checkpoint's tensors that they consist of."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model.weight_specs import TensorSpec
from model.weights.checkpoint import Checkpoint, TensorInfo


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the checkpoint, or an expert's rows of one, and its expected properties."""

    name: str
    shape: tuple[int, ...]
    interleaved: tuple[int, int]  # heads whose first 2 e rows are stored as [e, 2], and 2 e; 0 heads if stored as ours
    offset: float  # added to the values
    stored: tuple[int, ...]  # shape of the full tensor
    first: int = 0  # its first row in the tensor, of all axes but the last one together
    step: int = 1  # rows of the tensor from one of its rows to the next

    def nbytes(self, stored: Mapping[str, TensorInfo]) -> float:
        """Bytes of the part in the file(s)."""
        return stored[self.name].nbytes * math.prod(self.shape) / max(1, math.prod(self.stored))

    def read(self, read: Callable[[str, int, int], NDArray[Any]], start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop-1, from a method that reads rows of a tensor."""
        first, last = self.first + start * self.step, self.first + (stop - 1) * self.step
        if len(self.stored) > len(self.shape) == 1:  # a vector inside a row
            row, first = divmod(first, self.stored[-1])
            values = read(self.name, row, row + 1).reshape(-1)[first : first + (stop - start - 1) * self.step + 1]
        else:
            values = read(self.name, first, last + 1)
        return values if self.step == 1 else np.ascontiguousarray(values[:: self.step])


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
    dims = checkpoint.config.dims()
    return [
        Target(path, tuple(_part(checkpoint, tensor, dims) for tensor in weight.tensors), weight.role)
        for path, weight in weights
    ]


def _part(checkpoint: Checkpoint, tensor: TensorSpec, dims: Mapping[str, int]) -> Part:
    config, is_gguf = checkpoint.config, checkpoint.naming == "gguf"
    shape = tuple(dims[letter] for letter in tensor.shape)
    place, stored, first, step = tensor.gguf_slice if is_gguf else tensor.hf_slice, shape, 0, 1
    if place is not None:
        stored = (dims["X"], place.parts * shape[0], *shape[1:])
        first = (place.expert * place.parts + (0 if place.interleaved else place.part)) * shape[0]
        first, step = (first + place.part, place.parts) if place.interleaved else (first, 1)
    traits, interleaved = config.traits, config.traits.has_interleaved_rotary(is_gguf)
    return Part(
        tensor.gguf if is_gguf else tensor.hf,
        shape,
        (dims[tensor.heads] if interleaved and tensor.heads is not None else 0, config.rotated_dims),
        0.0 if is_gguf or not tensor.is_norm else traits.hf_norm_offset,
        stored,
        first,
        step,
    )
