"""Progress of a scoring: sums over rows, and their display on stderr, as a bar on a terminal or a line now and then."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from logging import INFO
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from serve.jobs.results import perplexity
from serve.server.console import is_terminal, json_line

_INTERVAL = 30.0  # seconds between lines


@dataclass(slots=True)
class Sums:
    lines: int = 0
    skipped: int = 0  # broken lines
    tokens: int = 0
    scored: int = 0  # tokens with a log-prob
    logprob: float = 0.0  # nats
    bytes: int = 0  # of the scored tokens without special ones, which are not part of the text
    text_logprob: float = 0.0  # of these tokens, nats
    rank_1: int = 0  # tokens of rank 1
    completions: int = 0
    completion_tokens: int = 0
    completion_logprob: float = 0.0
    greedy: int = 0  # completions all of whose tokens have rank 1

    def add(self, other: "Sums") -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text, special tokens excluded; None if no text is scored."""
        return -self.text_logprob / math.log(2) / self.bytes if self.bytes else None


def summary(sums: Sums) -> list[tuple[str, str]]:
    """Names and values to print at the end."""
    skipped = f", {sums.skipped:,} skipped" if sums.skipped else ""
    entries = [
        ("lines", f"{sums.lines:,} scored{skipped}"),
        ("tokens", f"{sums.scored:,} scored of {sums.tokens:,}"),
    ]
    if sums.scored:
        entries += [
            ("log-prob", f"{sums.logprob / sums.scored:.6f} per token"),
            ("perplexity", _number(perplexity(sums.logprob, sums.scored))),
            ("bits/byte", _number(sums.bits_per_byte)),
            ("rank 1", f"{sums.rank_1 / sums.scored:.2%} of the tokens"),
        ]
    if sums.completions:
        number = _number(perplexity(sums.completion_logprob, sums.completion_tokens))
        entries += [
            ("completions", f"{sums.completions:,}, perplexity {number}"),
            ("greedy", f"{sums.greedy / sums.completions:.2%} of them"),
        ]
    return entries


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


class Meter:
    """Shows progress as a bar, or as a line now and then."""

    def __init__(self, stream: TextIO, log_format: str, scored_before: int, bar: Progress | None) -> None:
        self._stream = stream
        self._as_json = log_format == "json"
        self._scored_before = scored_before
        self._bar = bar
        self._start = self._last = time.monotonic()

    def update(self, done: float, sums: Sums) -> None:
        """Show the share of the work done, 0 to 1, and the sums so far."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, sums=self._describe(sums))
        elif time.monotonic() - self._last >= _INTERVAL:
            self._last = time.monotonic()
            self.message(f"scoring  {done:.1%}, {self._describe(sums)}")

    def message(self, text: str, level: int = INFO) -> None:
        """Show a message, such as an error of a line."""
        if self._bar is not None:
            self._bar.console.print(text, style="yellow" if level > INFO else None, markup=False, soft_wrap=True)
        else:
            self._stream.write((json_line(level, text) if self._as_json else text) + "\n")
            self._stream.flush()

    def _describe(self, sums: Sums) -> str:
        rate = (sums.scored - self._scored_before) / max(1e-9, time.monotonic() - self._start)
        value = perplexity(sums.logprob, sums.scored)
        shown = "" if value is None else f", perplexity {value:.4g}"
        return f"{sums.lines + sums.skipped:,} lines, {sums.scored:,} tokens, {rate:,.0f} tokens/s{shown}"


@contextmanager
def open_meter(stream: TextIO, log_format: str, scored_before: int) -> Iterator[Meter]:
    """A meter as --log-format requires.

    Args:
        log_format: "auto", "plain" or "json".
        scored_before: tokens that earlier runs have scored, which do not count for the speed.
    """
    if log_format != "auto" or not is_terminal(stream):
        yield Meter(stream, log_format, scored_before, None)
        return
    columns = (TextColumn("scoring"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[sums]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(file=stream, highlight=False)) as bar:
        bar.add_task("scoring", total=1.0, sums="")
        yield Meter(stream, log_format, scored_before, bar)
