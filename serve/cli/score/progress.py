"""How a scoring goes, on stderr: a bar on a terminal, else a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import INFO
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from serve.cli.score.totals import Sums, perplexity
from serve.server.console import is_terminal
from serve.server.logs import json_line

_EVERY = 30.0  # seconds between lines


class Meter(Protocol):
    """Is told how a scoring goes."""

    def at(self, done: float, sums: Sums) -> None:
        """Shows a share (0 to 1) of the work, and what is scored so far."""

    def say(self, message: str, level: int = INFO) -> None:
        """Tells something else, such as that a line is broken."""


@contextmanager
def open_meter(stream: TextIO, log_format: str, before: int) -> Iterator[Meter]:
    """A meter that goes with --log-format; `before` are the tokens that earlier runs have scored."""
    begun = time.monotonic()

    def told(sums: Sums) -> str:
        rate = (sums.scored - before) / max(1e-9, time.monotonic() - begun)
        return _told(sums, rate)

    if log_format != "auto" or not is_terminal(stream):
        yield _LineMeter(stream, told, as_json=log_format == "json")
        return
    console = Console(file=stream, highlight=False)
    columns = (TextColumn("scoring"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[told]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        yield _BarMeter(bar, told)


class _BarMeter:
    def __init__(self, bar: Progress, told: Callable[[Sums], str]) -> None:
        self._bar = bar
        self._told = told
        self._task = bar.add_task("scoring", total=1.0, told="")

    def at(self, done: float, sums: Sums) -> None:
        self._bar.update(self._task, completed=done, told=self._told(sums))

    def say(self, message: str, level: int = INFO) -> None:
        self._bar.console.print(message, style="yellow" if level > INFO else None, markup=False, soft_wrap=True)


class _LineMeter:
    def __init__(self, stream: TextIO, told: Callable[[Sums], str], *, as_json: bool) -> None:
        self._stream = stream
        self._told = told
        self._as_json = as_json
        self._last = time.monotonic()

    def at(self, done: float, sums: Sums) -> None:
        if time.monotonic() - self._last >= _EVERY:
            self._last = time.monotonic()
            self.say(f"scoring  {done:.1%}, {self._told(sums)}")

    def say(self, message: str, level: int = INFO) -> None:
        self._stream.write((json_line(level, message) if self._as_json else message) + "\n")
        self._stream.flush()


def _told(sums: Sums, rate: float) -> str:
    number = perplexity(sums.logprob, sums.scored)
    known = "" if number is None else f", perplexity {number:.4g}"
    return f"{sums.lines + sums.skipped:,} lines, {sums.scored:,} tokens, {rate:,.0f} tokens/s{known}"
