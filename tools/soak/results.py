"""Tally: what was asked, what came, and what should not have."""

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tools.soak.again import Comparison
from tools.soak.answers import Reply
from tools.soak.ask import Ask, Manner
from tools.soak.client import Answer

_HOPELESS = 200  # violations after which there is nothing more to learn

# What is checked; the report has a line for each.
CHECKS = STATUS, ANSWER, AGAIN, IDLE, MEMORY, FAILURES, PROCESS, LATENCY = (
    "connections and statuses",
    "answers and their numbers",
    "the same numbers again",
    "idle when nothing is asked",
    "memory",
    "failures of the engine",
    "the server's process",
    "latency",
)


@dataclass(frozen=True, slots=True)
class Violation:
    """What should not have happened."""

    check: str
    where: str  # kind and number of a request, or when
    what: str


def quantile(values: Iterable[float], share: float) -> float | None:
    """The least value that so many are not above; None of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


@dataclass(slots=True)
class Tally:
    """Counts; violations are never taken back."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind, and status or what else came
    checked: Counter[str] = field(default_factory=Counter)  # by check
    violations: list[Violation] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token: "array[float]" = field(default_factory=lambda: array("d"))  # seconds
    between_tokens: "array[float]" = field(default_factory=lambda: array("d"))
    again: Counter[str] = field(default_factory=Counter)  # answers, tokens, and tokens that differ

    @property
    def is_hopeless(self) -> bool:
        """Whether so much is wrong that going on is of no use."""
        return len(self.violations) >= _HOPELESS

    def count(self, ask: Ask, answer: Answer) -> None:
        """What came of a request."""
        came = "left" if answer.left else "failed" if answer.failure is not None else str(answer.status)
        self.outcomes[ask.kind, came] += 1

    def check(self, check: str, where: str, wrong: Iterable[str], checked: int = 1) -> None:
        """Counts a check of so many things, and what it has found."""
        self.checked[check] += checked
        self.violations += [Violation(check, where, what) for what in wrong]

    def tokens(self, ask: Ask, answer: Answer, reply: Reply) -> None:
        """Counts an answer's tokens, and of a stream of one text when they came."""
        self.prompt_tokens += sum(len(choice.prompt) for choice in reply.choices.values())
        self.output_tokens += sum(len(choice.token_ids) for choice in reply.choices.values())
        if reply.arrivals and len(reply.choices) == 1 and ask.manner is Manner.READS:
            self.first_token.append(reply.arrivals[0] - answer.begun)
            self.between_tokens.extend(after - before for before, after in itertools.pairwise(reply.arrivals))

    def compared(self, kind: str, comparison: Comparison) -> None:
        """Counts what was asked again."""
        self.again[f"answers {kind}"] += 1
        self.again[f"tokens compared, {kind}"] += comparison.tokens
        self.again[f"differences, {kind}"] += len(comparison.differ)
        if comparison.ranks_off:
            self.again["ranks that differ within the tolerance"] += comparison.ranks_off
