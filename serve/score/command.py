"""The command line."""

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    raise NotImplementedError(arguments)
