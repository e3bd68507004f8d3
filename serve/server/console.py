"""Reporters of start-up: text lines, JSON lines, or progress bars and panels on a terminal."""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging import DEBUG, ERROR
from typing import TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.panel import Panel
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
from rich.table import Table
from rich.text import Text

from serve import __version__
from serve.config.config import EngineConfig
from serve.config.values import mb
from serve.server.logs import json_line, set_up_logs
from serve.server.startup_events import Event, MemoryPlanned, Message, ModelFound, Serving, compile_started, count

type OnProgress = Callable[[int, int], None]  # bytes read so far, bytes in all
type OnCompiled = Callable[[Message], None]

_WIDTH = 100  # columns at most
_LABEL = "bold cyan"
# Parts of the memory bar. The shades differ so that the bar can be read without colours.
_PARTS = (
    ("weights", "█", "cyan"),
    ("cache", "▓", "magenta"),
    ("workspace", "▒", "yellow"),
    ("free", "░", "bright_black"),
)


class Reporter:
    """Reports start-up line by line, as text or JSON."""

    _terminal: Console | None = None  # for progress bars

    def __init__(self, stream: TextIO | None, *, as_json: bool = False, verbose: bool = False) -> None:
        """Create a reporter that writes to `stream`, or nowhere; with `verbose`, also a line for each program."""
        self.phase = "starting"  # current phase in a few words
        self._stream = stream
        self._as_json = as_json
        self._verbose = verbose

    def report(self, event: Event) -> None:
        """Show an event, from any thread."""
        if self._stream is None or (event.level <= DEBUG and not self._verbose):
            return
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
        self.report(compile_started(len(names)))
        pending, lock = dict.fromkeys(names), threading.Lock()
        columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("[dim]{task.description}", markup=True))
        with self._bar("compiling", *columns) as bar:
            task = bar.add_task("", total=len(names))

            def update() -> None:
                """Show the first program that is not ready."""
                done = len(names) - len(pending)
                self.phase = f"compiling: {done} of {len(names)} programs"
                bar.update(task, completed=done, description=next(iter(pending), ""))

            def ready(event: Message) -> None:
                with lock:
                    pending.pop(event.fields["program"], None)
                    update()
                self.report(event)

            update()
            yield ready

    def _bar(self, label: str, *columns: ProgressColumn) -> Progress:
        label_column = TextColumn(f"[{_LABEL}]{label:<9}")
        return Progress(label_column, BarColumn(), *columns, console=self._terminal, disable=self._terminal is None)


class ScreenReporter(Reporter):
    """Reports start-up on a terminal."""

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        super().__init__(None, verbose=verbose)
        self._terminal = self._console = console

    def report(self, event: Event) -> None:
        """Show an event."""
        match event:
            case ModelFound():
                self._print(_panel(event))
            case MemoryPlanned():
                self._memory(event)
            case Serving():
                self._serving(event)
            case Message(name="compile_begun"):
                pass  # the bar shows it
            case Message(level=level, line=line):
                if level > DEBUG or self._verbose:
                    self._print(Text(line, "red" if level >= ERROR else "dim" if level <= DEBUG else ""))

    def _memory(self, event: MemoryPlanned) -> None:
        plan = event.plan
        unused = None if plan.free is None else max(0, plan.free - plan.needed)
        sizes = (plan.weights, plan.cache, plan.workspace, unused)
        self._print(_memory_bar(sizes, min(_WIDTH, self._console.width)))
        legend = _labelled("", "")
        for (name, shade, colour), size in zip(_PARTS, sizes, strict=True):
            if size is not None:
                legend.append(f"{shade} ", colour).append(f"{name} {mb(size)}  ")
        self._print(legend)
        self._print(_labelled("", f"the cache holds {plan.cache_tokens:,} tokens"))
        if event.warning:
            self._print(Text.assemble(_labelled("", ""), (event.warning, "yellow")))

    def _serving(self, event: Serving) -> None:
        self._print(Text())
        self._print(Text.assemble(("serving  ", "bold green"), f"{', '.join(event.models)} at ", (event.url, "bold")))
        if not event.url.startswith("unix:"):
            self._print(_labelled("API", f"{event.reachable}/v1"))
            self._print(_labelled("inspector", f"{event.reachable}/"))
            if event.documented:
                self._print(_labelled("docs", f"{event.reachable}/docs"))
        self._print(Text())
        self._print(Text(event.curl, "green"))
        self._print(Text())

    def _print(self, content: RenderableType) -> None:
        """Print; text is not wrapped, so that it can be copied from the terminal."""
        if isinstance(content, Text):
            self._console.print(content, soft_wrap=True)
        else:
            self._console.print(content, width=min(_WIDTH, self._console.width))


def start_reporting(config: EngineConfig) -> Reporter:
    """Set up logging and return the matching reporter; both write to stderr as --log-format says."""
    verbose, stream = config.log_level == "debug", sys.stderr
    if config.log_format == "auto" and is_terminal(stream):
        console = Console(file=stream, highlight=False)
        set_up_logs(config.log_level, stream=stream, console=console)
        return ScreenReporter(console, verbose=verbose)
    as_json = config.log_format == "json"
    set_up_logs(config.log_level, stream=stream, as_json=as_json)
    return Reporter(stream, as_json=as_json, verbose=verbose)


def is_terminal(stream: TextIO) -> bool:
    """True if the stream is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _json(event: Event) -> str:
    fields = {"message": event.line, **event.fields}
    return json_line(event.level, fields.pop("message"), event=event.name, **fields)


def _memory_bar(sizes: Sequence[int | None], width: int) -> Text:
    """The parts of the memory as one bar; every part that is not empty has at least one cell."""
    known = [size or 0 for size in sizes]
    available, total = width - len(_labelled("", "")), max(1, sum(known))
    widths = [max(1, round(available * size / total)) if size else 0 for size in known]
    widths[-1] = max(0, available - sum(widths[:-1])) if known[-1] else 0
    blocks = ((shade * cells, colour) for (_, shade, colour), cells in zip(_PARTS, widths, strict=True))
    return Text.assemble(_labelled("memory", ""), *blocks)


def _panel(event: ModelFound) -> Panel:
    table = Table.grid(padding=(0, 2))
    table.add_row(Text("model", _LABEL), Text(event.model, "bold"))
    table.add_row(Text("weights", _LABEL), f"{event.family}, {count(event.parameters)} parameters, {event.weights_as}")
    table.add_row(Text("device", _LABEL), event.placement)
    table.add_row(Text("requests", _LABEL), f"up to {event.max_num_seqs} of {event.max_model_len:,} tokens each")
    return Panel(table, title=f"logprobd {__version__}", title_align="left", box=box.ROUNDED, border_style="dim")


def _labelled(label: str, text: str) -> Text:
    return Text.assemble((f"{label:<9} ", _LABEL), text)
