"""Grammars as the engine sees them: what a request's output may contain, one token mask at a time."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Matcher(Protocol):
    """A grammar's state in one request's output. One thread at a time uses it."""

    @property
    def error(self) -> str | None:
        """Why the grammar cannot continue, for clients to see; checked after every call."""

    @property
    def is_finished(self) -> bool:
        """True if the text is complete and nothing but its end may follow."""

    def fill(self, words: NDArray[np.uint32]) -> None:
        """Write the mask [W] of the next token, in the layout of `SamplingArrays.mask`.

        It contains the model's EOS ids when the text may end.
        """

    def advance(self, token: int) -> None:
        """Append a token that the mask allowed."""


class Grammar(Protocol):
    """A compiled grammar. Immutable, and used by several threads."""

    def matcher(self) -> Matcher:
        """A new matcher at the start of the text."""
