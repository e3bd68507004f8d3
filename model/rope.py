"""Rope: the angles of rotary position embedding (Su et al. 2021), and how they are stretched to longer contexts.

Each method gives divisors of the frequencies 1 / theta^(2e/E). Sources: the code published with Llama 3.1
("llama3"), Chen et al. 2023 ("linear"), Peng et al. 2023 ("yarn"), Ding et al. 2024 ("longrope"). Parameters have the
names of Hugging Face's `rope_parameters`.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class Rope:
    """Angles of one kind of layer. Hashable, so it can be a static argument."""

    theta: float
    divisors: tuple[float, ...] = ()  # of the E/2 frequencies; empty: all 1
    scale: float = 1.0  # of cosines and sines
    long_divisors: tuple[float, ...] = ()  # used instead if requests may be longer than `short_length` tokens
    short_length: int = 0
    dims: int = 0  # the first dimensions of a head, which are rotated; 0: all
    # Factor, length and power of `dynamic`: theta is larger if requests may be longer.
    ntk: tuple[float, int, float] | None = None
    # Factor and original length of YaRN, if they give the divisors: its other parameters are the usual ones.
    yarn: tuple[float, int] | None = field(default=None, compare=False)

    def for_length(self, tokens: int) -> Self:
        """The angles of a server whose requests have up to `tokens` tokens."""
        if self.ntk is not None:
            factor, length, power = self.ntk
            growth = max(1.0, factor * tokens / length - (factor - 1)) ** power
            return replace(self, theta=self.theta * growth, ntk=None)
        if not self.long_divisors:
            return self
        divisors = self.long_divisors if tokens > self.short_length else self.divisors
        return replace(self, divisors=divisors, long_divisors=(), short_length=0)


def llama3_divisors(
    theta: float, head_dim: int, *, factor: float, low: float, high: float, original: int
) -> tuple[float, ...]:
    """Stretch long waves by `factor`, keep short ones, interpolate between them.

    Args:
        low, high: a wave is long if it fits fewer than `low` times into `original` tokens, short from `high` times on.
    """
    divisors = []
    for e in range(head_dim // 2):
        turns = original * theta ** (-2 * e / head_dim) / (2 * math.pi)
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1 / ((1 - share) / factor + share))
    return tuple(divisors)


def yarn_divisors(
    theta: float,
    head_dim: int,
    *,
    factor: float,
    fast: float,
    slow: float,
    original: int,
    truncate: bool,
    min_width: float = -math.inf,
) -> tuple[float, ...]:
    """Keep pairs that turn more than `fast` times in `original` tokens, stretch those below `slow` times.

    Args:
        min_width: of the range of pairs between these; it only matters in ranges that are empty.
    """

    def pair_index(times: float) -> float:
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_index(fast), pair_index(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = max(last - first, min_width) or 0.001
    stretched = [min(1.0, max(0.0, (e - first) / width)) for e in range(head_dim // 2)]
    return tuple(1 / (share / factor + 1 - share) for share in stretched)


def yarn_scale(factor: float, share: float = 1.0) -> float:
    """YaRN's factor of cosines and sines."""
    return 0.1 * share * math.log(factor) + 1 if factor > 1 else 1.0


def longrope_scale(factor: float, original: int) -> float:
    """LongRoPE's factor of cosines and sines, for a context of factor x original tokens."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
