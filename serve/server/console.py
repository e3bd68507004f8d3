"""Reporter of start-up: text lines, JSON lines, or progress bars and drawings on a terminal."""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging import DEBUG, ERROR
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from serve.config.config import EngineConfig
from serve.server.logs import json_line, set_up_logs
from serve.server.startup_events import LABEL_STYLE, Event

type OnProgress = Callable[[int, int], None]  # bytes read so far, bytes in all
type OnCompiled = Callable[[Event], None]

_WIDTH = 100  # columns at most


class Reporter:
    """Reports start-up on a terminal, or line by line as text or JSON."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        console: Console | None = None,
        as_json: bool = False,
        verbose: bool = False,
    ) -> None:
        """Create a reporter.

        Args:
            stream: for lines; None: no output.
            console: a terminal to draw on instead.
            verbose: also report each compiled program.
        """
        self.phase = "starting"  # current phase in a few words
        self._stream = stream
        self._console = console
        self._as_json = as_json
        self._verbose = verbose

    def report(self, event: Event) -> None:
        """Show an event. Thread-safe."""
        if event.level <= DEBUG and not self._verbose:
            return
        if self._console is not None:
            width = min(_WIDTH, self._console.width)
            style = "red" if event.level >= ERROR else "dim" if event.level <= DEBUG else ""
            for content in event.draw(width) if event.draw else [Text(event.line, style)]:
                # Text is not wrapped, so that it can be copied from the terminal.
                self._console.print(content, width=width, soft_wrap=isinstance(content, Text))
        elif self._stream is not None:
            # One write, because other threads may write too.
            self._stream.write((_json(event) if self._as_json else event.line) + "\n")
            self._stream.flush()

    @contextmanager
    def loading(self) -> Iterator[OnProgress]:
        """Context in which weights are read. Yields a callback for progress."""
        with self._bar("loading", DownloadColumn(), TransferSpeedColumn()) as bar:
            task = bar.add_task("", total=None)

            def update(done: int, total: int) -> None:
                self.phase = f"loading weights: {done / max(total, 1):.0%}"
                bar.update(task, completed=done, total=total)

            yield update

    @contextmanager
    def compiling(self, names: Sequence[str]) -> Iterator[OnCompiled]:
        """Context in which `names` are compiled, in this order. Yields a thread-safe callback for ready programs."""
        if self._console is None:  # else the bar shows it
            self.report(Event("compile_begun", f"compiling {len(names)} programs", {"programs": len(names)}))
        pending, lock = dict.fromkeys(names), threading.Lock()
        columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("[dim]{task.description}", markup=True))
        with self._bar("compiling", *columns) as bar:
            task = bar.add_task("", total=len(names))

            def update() -> None:
                """Show the first program that is not ready."""
                done = len(names) - len(pending)
                self.phase = f"compiling: {done} of {len(names)} programs"
                bar.update(task, completed=done, description=next(iter(pending), ""))

            def ready(event: Event) -> None:
                with lock:
                    pending.pop(event.fields["program"], None)
                    update()
                self.report(event)

            update()
            yield ready

    def _bar(self, label: str, *columns: ProgressColumn) -> Progress:
        label_column = TextColumn(f"[{LABEL_STYLE}]{label:<9}")
        return Progress(label_column, BarColumn(), *columns, console=self._console, disable=self._console is None)


def start_reporting(config: EngineConfig) -> Reporter:
    """Set up logging and return the matching reporter; both write to stderr as --log-format says."""
    terminal = config.log_format == "auto" and is_terminal(sys.stderr)
    console = Console(file=sys.stderr, highlight=False) if terminal else None
    as_json = config.log_format == "json"
    set_up_logs(config.log_level, stream=sys.stderr, as_json=as_json, console=console)
    return Reporter(sys.stderr, console=console, as_json=as_json, verbose=config.log_level == "debug")


def is_terminal(stream: TextIO) -> bool:
    """True if the stream is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _json(event: Event) -> str:
    fields = {"message": event.line, **event.fields}
    return json_line(event.level, fields.pop("message"), event=event.name, **fields)
