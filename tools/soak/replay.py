"""Replay: the same token after the same prefix must get the same log-prob, however it is computed.

A prompt with its answer is scored as a prompt. A deterministic request is repeated, with streaming switched on or off.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tools.soak.replies import Choice, Reply, Scored
from tools.soak.request import COMPLETIONS, Body, Expectation, Request

_POOL_SIZE = 64  # samples of each kind; above it a random one is dropped
_MAX_ROWS = 256  # last tokens of an answer that are compared

RESCORED, REPEATED = "scored again", "repeated"


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens with known log-probs."""

    number: int  # request number
    token_ids: Sequence[int]
    rows: Mapping[int, Scored]  # by index in `token_ids`


@dataclass(frozen=True, slots=True)
class Original:
    """A deterministic request and its answer."""

    number: int
    request: Request
    choices: Mapping[int, Choice]


@dataclass(slots=True)
class Comparison:
    """Number of compared tokens and the differences."""

    tokens: int = 0
    rank_changes: int = 0  # with a tolerance: near ties, which are allowed
    differences: list[str] = field(default_factory=list)

    def rows(self, index: int, before: Scored, now: Scored | None, tolerance: float) -> None:
        """Compare log-prob, rank and alternatives of a token, as far as both have them."""
        self.tokens += 1
        if now is None or now.token_id != before.token_id:
            self.differences.append(f"token {index} is different or has no log-prob")
            return
        if not abs(before.logprob - now.logprob) <= tolerance:
            self.differences.append(f"token {index}: log-prob {before.logprob!r}, then {now.logprob!r}")
        if before.rank and now.rank and before.rank != now.rank:
            if tolerance:
                self.rank_changes += 1
            else:
                self.differences.append(f"token {index}: rank {before.rank}, then {now.rank}")
        if not tolerance and before.top and now.top:
            for one, other in zip(before.top, now.top, strict=False):
                if one[:2] != other[:2]:
                    self.differences.append(f"token {index}: an alternative {one}, then {other}")


class Pool:
    """Answers that wait for a replay."""

    def __init__(self, *, tolerance: float) -> None:
        """`tolerance`: maximum difference of log-probs. With 0, bits are compared and requests are repeated."""
        self.tolerance = tolerance
        self._samples: list[Sample] = []
        self._originals: list[Original] = []

    def add(self, rng: random.Random, number: int, request: Request, reply: Reply) -> None:
        """Add the parts of an answer that can be compared."""
        expected = Expectation.of(request)
        assert isinstance(request.body, dict)
        choice = reply.choices[rng.randrange(len(reply.choices))]
        if rows := _comparable(request.body, expected, choice):
            self._samples.append(Sample(number, choice.prompt + choice.token_ids, rows))
            self._trim(rng, self._samples)
        deterministic = "seed" in request.body or request.body.get("temperature") == 0
        if deterministic and self.tolerance == 0 and rng.random() < 0.4:
            self._originals.append(Original(number, request, reply.choices))
            self._trim(rng, self._originals)

    def draw_sample(self, rng: random.Random) -> Sample | None:
        """Remove and return a random one."""
        return self._samples.pop(rng.randrange(len(self._samples))) if self._samples else None

    def draw_original(self, rng: random.Random) -> Original | None:
        """Remove and return a random one."""
        return self._originals.pop(rng.randrange(len(self._originals))) if self._originals else None

    @staticmethod
    def _trim(rng: random.Random, items: list[Sample] | list[Original]) -> None:
        if len(items) > _POOL_SIZE:
            items.pop(rng.randrange(len(items)))


def _comparable(body: Body, expected: Expectation, choice: Choice) -> dict[int, Scored]:
    """Return index -> log-probs of the raw distribution whose alternatives are the most likely tokens."""
    rows: dict[int, Scored | None] = {}
    if choice.prompt_logprobs is not None and not expected.prompt_named:
        rows |= dict(enumerate(choice.prompt_logprobs))
    if not expected.named and body.get("logprobs_mode") != "processed_logprobs":
        echoed = len(choice.prompt) if expected.echo else 0
        rows |= dict(enumerate(choice.logprobs[echoed:], len(choice.prompt)))
    present = {index: row for index, row in rows.items() if row is not None}
    return {index: present[index] for index in sorted(present)[-_MAX_ROWS:]}


def scoring_request(rng: random.Random, sample: Sample, model: str) -> Request:
    """Return a request that scores the sample as a prompt, with the prefix cache or with a salt that bypasses it."""
    limit = max(len(row.top or ()) for row in sample.rows.values())
    body: Body = {
        "model": model,
        "prompt": list(sample.token_ids),
        "max_tokens": 0,
        "prompt_logprobs": limit,
        "return_token_ids": True,
    }
    if rng.random() < 0.5:
        body["cache_salt"] = f"replay {rng.getrandbits(64)}"
    if rng.random() < 0.5:
        body["prompt_logprobs_start"] = min(sample.rows)
    if rng.random() < 0.5:
        body["prompt_logprobs_format"] = "columns"
    return Request(RESCORED, COMPLETIONS, body)


def repeated_request(original: Original) -> Request:
    """Return the same request with streaming switched on or off."""
    assert isinstance(original.request.body, dict)
    body = {name: value for name, value in original.request.body.items() if name not in ("stream", "stream_options")}
    if not original.request.streams:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return replace(original.request, kind=REPEATED, body=body)


def compare_scores(sample: Sample, reply: Reply, tolerance: float) -> Comparison:
    """Compare a sample with the prompt log-probs of its replay."""
    found, now = Comparison(), reply.choices[0].prompt_logprobs or []
    for index, row in sample.rows.items():
        found.rows(index, row, now[index] if index < len(now) else None, tolerance)
    return found


def compare_replies(original: Original, reply: Reply) -> Comparison:
    """Compare an answer with that of its repetition, bit by bit."""
    found = Comparison()
    for index, before in original.choices.items():
        now = reply.choices[index]
        for name in ("token_ids", "text", "finish_reason", "stop_reason"):
            if getattr(before, name) != getattr(now, name):
                found.differences.append(f"choice {index} has a different {name}")
        for kind, rows, others in (
            ("prompt", before.prompt_logprobs or [], now.prompt_logprobs or []),
            ("choice", before.logprobs, now.logprobs),
        ):
            if len(rows) != len(others):
                found.differences.append(f"{kind} {index} has {len(others)} log-probs instead of {len(rows)}")
            for i, row in enumerate(rows[: len(others)]):
                if row is not None:
                    found.rows(i, row, others[i], 0)
    return found


def summary(comparison: Comparison, number: int) -> Iterator[str]:
    """Yield one line if the comparison with request `number` found differences."""
    if comparison.differences:
        first = "; ".join(comparison.differences[:3])
        yield f"{len(comparison.differences)} differences from request {number} of {comparison.tokens} tokens: {first}"
