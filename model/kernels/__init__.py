"""Optional kernels, one package or module per platform. Without them XLA's own code runs."""

from typing import NamedTuple


class ScoreOptions(NamedTuple):
    """How attention computes its scores."""

    scale: float  # factor of a score
    window: int = 0  # tokens that a query attends to, itself included; 0 = all before it
    cap: float = 0.0  # replaces a score by cap * tanh(score / cap); 0 = off
