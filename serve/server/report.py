"""Reporter: tells how start-up goes, on a terminal, in plain lines or as JSON."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TextIO

from rich.console import Console

from serve.config.config import EngineConfig
from serve.server.console import ScreenReporter
from serve.server.logs import set_up_logs
from serve.server.report_lines import LineReporter
from serve.server.startup_events import Event, ProgramCompiled


class Reporter(Protocol):
    """Is told how start-up goes."""

    def tell(self, event: Event) -> None:
        """Shows one event."""

    def loading(self) -> AbstractContextManager[Callable[[int, int], None]]:
        """While weights are read: what is to be called with the bytes read so far and in all."""

    def compiling(self, names: Sequence[str]) -> AbstractContextManager[Callable[[ProgramCompiled], None]]:
        """While programs are compiled: what is to be called with each that is ready, from any thread.

        Args:
            names: of all programs, in the order in which they are begun.
        """


def reporter_for(log_format: str, *, stream: TextIO | None = None, verbose: bool = False) -> Reporter:
    """A reporter that writes to a stream: a screen for "auto" on a terminal, else lines.

    Args:
        log_format: "auto", "plain" or "json".
        stream: stderr, if None.
        verbose: tells of each program, too.
    """
    stream = sys.stderr if stream is None else stream
    if log_format == "auto" and is_terminal(stream):
        return ScreenReporter(_console(stream), verbose=verbose)
    return LineReporter(stream, as_json=log_format == "json", verbose=verbose)


def start_reporting(config: EngineConfig) -> Reporter:
    """Sets up logging, and gives the reporter that goes with it; both write to stderr as --log-format says."""
    verbose, stream = config.log_level == "debug", sys.stderr
    if config.log_format == "auto" and is_terminal(stream):
        console = _console(stream)
        set_up_logs(config.log_level, stream=stream, console=console)
        return ScreenReporter(console, verbose=verbose)
    form = "json" if config.log_format == "json" else "plain"
    set_up_logs(config.log_level, stream=stream, form=form)
    return reporter_for(form, stream=stream, verbose=verbose)


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _console(stream: TextIO) -> Console:
    return Console(file=stream, highlight=False)
