"""TokenLogprobs: the log-probs, ranks and alternatives of a run of tokens, from the kernels to the API.

Imports no jax: the API uses it too. `model.kernels.cpu.operations` registers it as a pytree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

type Array = Any  # jax.Array on a device, numpy.ndarray on the host

NO_ID = int(np.iinfo(np.int32).max)  # pads a row of requested ids
MIN_LOGPROB = -9999.0  # written for probability 0, as OpenAI does: JSON has no infinity


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Columns with one row per token: its log-prob and rank, and those of its alternatives.

    A step returns the K best tokens and the requested ids. A request gets one of the two as its `top_*`, with
    `top_ranks` and without `requested_*` (`serve.engine.logprob_store`).

    Taken from the raw distribution (temperature 1, nothing masked) unless a decode row asks for the one that its token
    was drawn from (`SamplingArrays.processed`).
    """

    logprob: Array  # [R] float32, natural log
    rank: Array  # [R] int32, 1 = most likely, unique: ties go to the lower id
    top_ids: Array  # [R, K] int32, best first, ties by ascending id; requested ids in their order
    top_logprobs: Array  # [R, K] float32
    requested_logprobs: Array = None  # [R, B] float32; undefined for NO_ID
    requested_ranks: Array = None  # [R, B] int32
    top_ranks: Array = None  # [R, K] int32; None: 1 .. K

    def __getitem__(self, rows: slice) -> "TokenLogprobs":
        return self.map(lambda column: column[rows])

    def map(self, function: Callable[[Array], Array]) -> "TokenLogprobs":
        """Apply `function` to every column."""
        columns = (getattr(self, name) for name in self.__slots__)
        return TokenLogprobs(*(None if column is None else function(column) for column in columns))

    @classmethod
    def concatenate(cls, parts: Sequence["TokenLogprobs"]) -> "TokenLogprobs":
        """The rows of at least one part, on the host."""
        columns = ([getattr(part, name) for part in parts] for name in cls.__slots__)
        return parts[0] if len(parts) == 1 else cls(*(None if c[0] is None else np.concatenate(c) for c in columns))


def empty_logprobs(rows: int, alternatives: int, first: int = 0) -> TokenLogprobs:
    """Columns to fill, on the host. Log-probs start as NaN, so that a row left unfilled is detected.

    Rows before `first` will not be filled: they are undefined, and take no memory.
    """
    logprob, top_logprobs = np.empty(rows, np.float32), np.empty((rows, alternatives), np.float32)
    logprob[first:] = top_logprobs[first:] = np.nan
    return TokenLogprobs(
        logprob=logprob,
        rank=np.zeros(rows, np.int32),
        top_ids=np.zeros((rows, alternatives), np.int32),
        top_logprobs=top_logprobs,
        top_ranks=np.zeros((rows, alternatives), np.int32),
    )


def clamp_logprobs(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probs with -inf replaced by MIN_LOGPROB."""
    return np.maximum(values, np.float32(MIN_LOGPROB))
