"""The interface of a file format, and the error that all of them raise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from model.config import ModelConfig
from model.formats import FLOATS, FORMATS, WIDER_FORMATS, BlockFormat


class ModelLoadError(Exception):
    """A model cannot be found, read or fitted to its architecture. The message is for the user."""

    @classmethod
    def of_problems(cls, what: str, problems: Sequence[str]) -> Self:
        """An error with one problem per line."""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        return cls("\n".join([f"{what}: {count} with the weights", *(f"  {problem}" for problem in problems)]))


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor's description from the header."""

    shape: tuple[int, ...]  # numpy's order, slowest axis first
    stored_as: str  # the format's name of the type, such as "BF16" or "Q4_1"
    supported: bool  # whether `Checkpoint.read` can decode this type
    nbytes: int  # in the file; 0 if the type is not supported
    # Columns [K] as `Checkpoint.read_blocks` has them; None: in their own order.
    order: NDArray[np.int32] | None = field(default=None, compare=False)

    @property
    def block_format(self) -> BlockFormat | None:
        """The format for kernels that holds exactly a matrix's values; None for floats, and without such a format."""
        is_coded = len(self.shape) >= 2 and self.stored_as not in FLOATS
        return FORMATS.get(WIDER_FORMATS.get(self.stored_as, self.stored_as)) if is_coded else None


class Checkpoint(Protocol):
    """An open model: its configuration and its tensors under the names of its own format."""

    @property
    def path(self) -> str:
        """The file or directory, for messages."""

    @property
    def naming(self) -> Literal["hf", "gguf"]:
        """Which names of the weight table its tensors have."""

    @property
    def config(self) -> ModelConfig:
        """Sizes of the network."""

    @property
    def skipped(self) -> Mapping[str, int]:
        """Bytes of what is not read, by the name of the tensor or file: the parts for images and audio."""

    def names(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the language model."""

    def read(self, name: str, start: int = 0, stop: int | None = None, step: int = 1) -> NDArray[Any]:
        """A fresh array of rows start, start + step, ... below stop: bfloat16 if stored as bfloat16, else float32.

        Rows are along axis 0. Of a tensor with more than two axes they are those of all axes but the last one
        together, and the result has two axes; they are of one index of axis 0.

        Raises:
            ModelLoadError: the bytes cannot be read or decoded; the message does not repeat the name.
            KeyError: no such tensor.
        """

    def read_blocks(self, name: str, start: int, stop: int, step: int = 1) -> NDArray[np.uint8]:
        """The rows of `read` of a matrix in its `TensorInfo.block_format`: [R, bytes of a row]; raises as `read`."""

    @property
    def quantizes_activations(self) -> bool:
        """Whether the configuration asks for quantized activations, which are not imitated."""

    def close(self) -> None:
        """Close the files. Arrays already read stay valid."""
