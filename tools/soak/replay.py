"""What is asked again, later: the same token after the same prefix must have the same numbers, however they come about.

An answer with its prompt is scored as a prompt, and a request whose draws have a seed is made once more, streamed where
it was not and the other way round.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tools.soak.answers import Choice, Reply, Scored
from tools.soak.ask import COMPLETIONS, Ask, Body, Wanted

_KEPT = 64  # of each kind; an answer that waits longer gives way to a later one
_ROWS = 256  # that are kept of an answer, the last

RESCORED, REPEATED = "scored again", "asked again"


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens whose numbers are known."""

    number: int  # of the request that told them
    token_ids: Sequence[int]
    rows: Mapping[int, Scored]  # by place in `token_ids`


@dataclass(frozen=True, slots=True)
class Original:
    """A request that must be answered alike when it comes again."""

    number: int
    ask: Ask
    choices: Mapping[int, Choice]


@dataclass(slots=True)
class Comparison:
    """How many numbers were compared, and which differ."""

    tokens: int = 0
    ranks_off: int = 0  # with a tolerance: near ties, which are counted and are no fault
    differ: list[str] = field(default_factory=list)

    def rows(self, place: int, before: Scored, now: Scored | None, tolerance: float) -> None:
        """Compares a token's numbers, as far as both are told."""
        self.tokens += 1
        if now is None or now.token_id != before.token_id:
            self.differ.append(f"token {place} is another, or has no numbers")
            return
        if not abs(before.logprob - now.logprob) <= tolerance:
            self.differ.append(f"token {place}: log-prob {before.logprob!r}, then {now.logprob!r}")
        if before.rank and now.rank and before.rank != now.rank:
            if tolerance:
                self.ranks_off += 1
            else:
                self.differ.append(f"token {place}: rank {before.rank}, then {now.rank}")
        if not tolerance and before.top and now.top:
            for one, other in zip(before.top, now.top, strict=False):
                if one[:2] != other[:2]:
                    self.differ.append(f"token {place}: an alternative {one}, then {other}")


class Pool:
    """Keeps some of what was answered until it is asked again."""

    def __init__(self, *, tolerance: float) -> None:
        """`tolerance` is between log-probs; 0 compares the bits, and only then requests are repeated."""
        self.tolerance = tolerance
        self._samples: list[Sample] = []
        self._originals: list[Original] = []

    def keep(self, rng: random.Random, number: int, ask: Ask, reply: Reply) -> None:
        """Takes what can be compared of an answer."""
        wanted = Wanted.of(ask)
        assert isinstance(ask.body, dict)
        choice = reply.choices[rng.randrange(len(reply.choices))]
        if rows := _comparable(ask.body, wanted, choice):
            self._samples.append(Sample(number, choice.prompt + choice.token_ids, rows))
            self._forget(rng, self._samples)
        settled = "seed" in ask.body or ask.body.get("temperature") == 0
        if settled and self.tolerance == 0 and rng.random() < 0.4:
            self._originals.append(Original(number, ask, reply.choices))
            self._forget(rng, self._originals)

    def draw_sample(self, rng: random.Random) -> Sample | None:
        """One that has waited, which is then forgotten."""
        return self._samples.pop(rng.randrange(len(self._samples))) if self._samples else None

    def draw_original(self, rng: random.Random) -> Original | None:
        """One that has waited, which is then forgotten."""
        return self._originals.pop(rng.randrange(len(self._originals))) if self._originals else None

    @staticmethod
    def _forget(rng: random.Random, kept: list[Sample] | list[Original]) -> None:
        if len(kept) > _KEPT:
            kept.pop(rng.randrange(len(kept)))


def _comparable(body: Body, wanted: Wanted, choice: Choice) -> dict[int, Scored]:
    """By place: numbers of the raw distribution, with the best as alternatives where there are any."""
    rows: dict[int, Scored | None] = {}
    if choice.prompt_numbers is not None and not wanted.prompt_named:
        rows |= dict(enumerate(choice.prompt_numbers))
    if not wanted.named and body.get("logprobs_mode") != "processed_logprobs":
        echoed = len(choice.prompt) if wanted.echo else 0
        rows |= dict(enumerate(choice.numbers[echoed:], len(choice.prompt)))
    told = {place: row for place, row in rows.items() if row is not None}
    return {place: told[place] for place in sorted(told)[-_ROWS:]}


def ask_to_score(rng: random.Random, sample: Sample, model: str) -> Ask:
    """The tokens as a prompt, of which nothing is generated: from the cache, or under a salt of its own without it."""
    most = max(len(row.top or ()) for row in sample.rows.values())
    body: Body = {
        "model": model,
        "prompt": list(sample.token_ids),
        "max_tokens": 0,
        "prompt_logprobs": most,
        "return_token_ids": True,
    }
    if rng.random() < 0.5:
        body["cache_salt"] = f"again {rng.getrandbits(64)}"
    if rng.random() < 0.5:
        body["prompt_logprobs_start"] = min(sample.rows)
    if rng.random() < 0.5:
        body["prompt_logprobs_format"] = "columns"
    return Ask(RESCORED, COMPLETIONS, body)


def ask_to_repeat(original: Original) -> Ask:
    """The same request, told the other way."""
    assert isinstance(original.ask.body, dict)
    body = {name: value for name, value in original.ask.body.items() if name not in ("stream", "stream_options")}
    if not original.ask.streams:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return replace(original.ask, kind=REPEATED, body=body)


def compare_scores(sample: Sample, reply: Reply, tolerance: float) -> Comparison:
    """The numbers of a sample, against those of its tokens as a prompt."""
    found, now = Comparison(), reply.choices[0].prompt_numbers or []
    for place, row in sample.rows.items():
        found.rows(place, row, now[place] if place < len(now) else None, tolerance)
    return found


def compare_replies(original: Original, reply: Reply) -> Comparison:
    """All that was answered, which must be the same to the last bit."""
    found = Comparison()
    for index, before in original.choices.items():
        now = reply.choices[index]
        for name in ("token_ids", "text", "finish_reason", "stop_reason"):
            if getattr(before, name) != getattr(now, name):
                found.differ.append(f"choice {index} has another {name}")
        for kind, rows, others in (
            ("prompt", before.prompt_numbers or [], now.prompt_numbers or []),
            ("choice", before.numbers, now.numbers),
        ):
            if len(rows) != len(others):
                found.differ.append(f"{kind} {index} has {len(others)} log-probs instead of {len(rows)}")
            for place, row in enumerate(rows[: len(others)]):
                if row is not None:
                    found.rows(place, row, others[place], 0)
    return found


def told(comparison: Comparison, number: int) -> Iterator[str]:
    """What differs, in a line for each request."""
    if comparison.differ:
        first = "; ".join(comparison.differ[:3])
        yield f"{len(comparison.differ)} differences from request {number} of {comparison.tokens} tokens: {first}"
