"""Results: counts of requests, checks and violations."""

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tools.soak.client import Answer
from tools.soak.replay import Comparison
from tools.soak.replies import Reply
from tools.soak.request import ClientBehavior, Request

_MAX_VIOLATIONS = 200  # after which the soak stops

# The kinds of checks; the report has a line for each.
CHECKS = STATUS, ANSWER, REPLAY, IDLE, MEMORY, FAILURES, PROCESS, LATENCY = (
    "connections and statuses",
    "answers and log-probs",
    "replayed log-probs",
    "idle server",
    "memory",
    "failures of the engine",
    "the server's process",
    "latency",
)


@dataclass(frozen=True, slots=True)
class Violation:
    """A failed check."""

    check: str
    where: str  # kind and number of a request, or a time
    what: str


def quantile(values: Iterable[float], share: float) -> float | None:
    """Return the `share` quantile; None if there are no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


@dataclass(slots=True)
class Results:
    """All counts of one soak."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind, and status, "left" or "failed"
    checked: Counter[str] = field(default_factory=Counter)  # by kind of check
    violations: list[Violation] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token: "array[float]" = field(default_factory=lambda: array("d"))  # seconds
    between_tokens: "array[float]" = field(default_factory=lambda: array("d"))
    replay: Counter[str] = field(default_factory=Counter)  # answers, tokens and differences

    @property
    def should_stop(self) -> bool:
        """True if there are too many violations to continue."""
        return len(self.violations) >= _MAX_VIOLATIONS

    def count(self, request: Request, answer: Answer) -> None:
        """Count the outcome of a request."""
        outcome = "left" if answer.left else "failed" if answer.failure is not None else str(answer.status)
        self.outcomes[request.kind, outcome] += 1

    def check(self, check: str, where: str, wrong: Iterable[str], checked: int = 1) -> None:
        """Count `checked` checks of a kind and add their violations."""
        self.checked[check] += checked
        self.violations += [Violation(check, where, what) for what in wrong]

    def tokens(self, request: Request, answer: Answer, reply: Reply) -> None:
        """Count the tokens of an answer, and the latencies of a stream with one choice."""
        self.prompt_tokens += sum(len(choice.prompt) for choice in reply.choices.values())
        self.output_tokens += sum(len(choice.token_ids) for choice in reply.choices.values())
        if reply.arrivals and len(reply.choices) == 1 and request.behavior is ClientBehavior.READS:
            self.first_token.append(reply.arrivals[0] - answer.started)
            self.between_tokens.extend(after - before for before, after in itertools.pairwise(reply.arrivals))

    def compared(self, kind: str, comparison: Comparison) -> None:
        """Count a replay."""
        self.replay[f"answers {kind}"] += 1
        self.replay[f"tokens compared, {kind}"] += comparison.tokens
        self.replay[f"differences, {kind}"] += len(comparison.differences)
        if comparison.rank_changes:
            self.replay["ranks that differ within the tolerance"] += comparison.rank_changes
