"""Sums over rows: of one, of a file."""

import math
from dataclasses import dataclass, fields


@dataclass(slots=True)
class Sums:
    """What rows add up to."""

    lines: int = 0
    skipped: int = 0  # broken lines
    tokens: int = 0
    scored: int = 0  # tokens with a number
    logprob: float = 0.0  # in nats
    bytes: int = 0  # of the tokens that are scored, without special ones, which are no part of the text
    text_logprob: float = 0.0  # of these tokens, in nats
    rank_1: int = 0  # tokens that the model held for the likeliest
    completions: int = 0
    completion_tokens: int = 0
    completion_logprob: float = 0.0
    greedy: int = 0  # completions all of whose tokens have rank 1

    def add(self, other: "Sums") -> None:
        """Adds another's."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def bits_per_byte(self) -> float | None:
        """Of the text: special tokens have neither bits nor bytes. None where nothing of it is scored."""
        return -self.text_logprob / math.log(2) / self.bytes if self.bytes else None


def perplexity(logprob: float, tokens: int) -> float | None:
    """exp of the mean surprise; None without tokens, or where no float holds it."""
    try:
        return math.exp(-logprob / tokens) if tokens else None
    except OverflowError:
        return None


def summary(sums: Sums) -> list[tuple[str, str]]:
    """What is said at the end: names and values."""
    skipped = f", {sums.skipped:,} skipped" if sums.skipped else ""
    told = [
        ("lines", f"{sums.lines:,} scored{skipped}"),
        ("tokens", f"{sums.scored:,} scored of {sums.tokens:,}"),
    ]
    if sums.scored:
        told += [
            ("log-prob", f"{sums.logprob / sums.scored:.6f} a token"),
            ("perplexity", _number(perplexity(sums.logprob, sums.scored))),
            ("bits/byte", _number(sums.bits_per_byte)),
            ("rank 1", f"{sums.rank_1 / sums.scored:.2%} of the tokens"),
        ]
    if sums.completions:
        number = _number(perplexity(sums.completion_logprob, sums.completion_tokens))
        told += [
            ("completions", f"{sums.completions:,}, perplexity {number}"),
            ("greedy", f"{sums.greedy / sums.completions:.2%} of them"),
        ]
    return told


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
