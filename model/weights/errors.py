"""The exception of this package."""

from collections.abc import Sequence
from typing import Self


class ModelLoadError(Exception):
    """A model cannot be found, read or fitted to its architecture. The message is for the user."""

    @classmethod
    def of_problems(cls, what: str, problems: Sequence[str]) -> Self:
        """An error with one problem per line."""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        return cls("\n".join([f"{what}: {count} with the weights", *(f"  {problem}" for problem in problems)]))
