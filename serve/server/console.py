"""Output on stderr: start-up and the logs of all modules, as text, as JSON lines, or drawn on a terminal."""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from logging import DEBUG, ERROR
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from serve.config.engine_config import EngineConfig
from serve.server.log_stream import LogStream
from serve.server.startup_events import LABEL_STYLE, Event, failed, program_compiled

if TYPE_CHECKING:
    from compiled.programs import Program

type OnProgress = Callable[[int, int], None]  # bytes read so far, bytes in all
type OnCompiled = Callable[["Program"], None]

_WIDTH = 100  # columns at most
_PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_OWN = ("serve", "compiled", "model")  # parents of our loggers; other libraries log warnings and errors at any level
# Attributes of every record, which are not fields. uvicorn repeats its message with colors.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_RESERVED = ("time", "level", "timestamp")  # parameters and fields of json_line
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "bold red"}


class Reporter:
    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        console: Console | None = None,
        as_json: bool = False,
        verbose: bool = False,
    ) -> None:
        """Report to a stream, on a terminal instead, or nowhere; `verbose`: also each compiled program."""
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
            fields = {"message": event.line, **event.fields}
            line = json_line(event.level, event=event.name, **fields) if self._as_json else event.line
            self._stream.write(f"{line}\n")  # one write, because other threads may write too
            self._stream.flush()

    def fail(self, error: BaseException) -> int:
        """Report an error of start-up or Ctrl-C, and return the exit code."""
        if isinstance(error, KeyboardInterrupt):
            self.report(Event("interrupted", "interrupted during start-up", level=ERROR))
            return 130
        self.report(failed(str(error)))
        return 1

    @contextmanager
    def loading(self) -> Iterator[OnProgress]:
        """Context in which weights are read. Yields a callback for progress."""
        with self._bar("loading", DownloadColumn(), TransferSpeedColumn()) as bar:
            task = bar.add_task("", total=None)

            def update(size: int, total: int) -> None:
                self.phase = f"loading weights: {size / max(total, 1):.0%}"
                bar.update(task, completed=size, total=total)

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
                count = len(names) - len(pending)
                self.phase = f"compiling: {count} of {len(names)} programs"
                bar.update(task, completed=count, description=next(iter(pending), ""))

            def on_compiled(program: "Program") -> None:
                with lock:
                    pending.pop(program.name, None)
                    update()
                self.report(program_compiled(program))

            update()
            yield on_compiled

    def _bar(self, label: str, *columns: ProgressColumn) -> Progress:
        label_column = TextColumn(f"[{LABEL_STYLE}]{label:<9}")
        return Progress(label_column, BarColumn(), *columns, console=self._console, disable=self._console is None)


def start_reporting(config: EngineConfig, stream: TextIO | None = None) -> Reporter:
    """Set up logging and return the matching reporter; both write to stderr or `stream`, as --log-format says."""
    stream = stream or sys.stderr
    terminal = config.log_format == "auto" and is_terminal(stream)
    console = Console(file=stream, highlight=False) if terminal else None
    as_json = config.log_format == "json"
    set_up_logs(config.log_level, stream=stream, as_json=as_json, console=console)
    return Reporter(stream, console=console, as_json=as_json, verbose=config.log_level == "debug")


def is_terminal(stream: TextIO) -> bool:
    """True if the stream is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def set_up_logs(level: str, *, stream: TextIO, as_json: bool = False, console: Console | None = None) -> None:
    """Send log records and Python warnings to `stream`, or to a console, replacing the handler of an earlier call.

    `level` is that of our own loggers, such as "info". As JSON, uncaught exceptions are logged, too.
    """
    handler = _StreamHandler(stream) if console is None else _ConsoleHandler(console)
    if console is None:
        handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(_PLAIN))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in _OWN:
        logging.getLogger(name).setLevel(level.upper())
    logging.captureWarnings(True)
    if as_json:
        _log_uncaught_exceptions()


def json_line(level: int, message: str, timestamp: float | None = None, **fields: Any) -> str:
    """Return one JSON object: time (UTC, default: now), level, message, and `fields`, where necessary as text."""
    time = datetime.now(UTC) if timestamp is None else datetime.fromtimestamp(timestamp, UTC)
    text = time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    record = {"time": text, "level": logging.getLevelName(level).lower(), "message": message} | fields
    try:
        return json.dumps(record, default=str, allow_nan=False)
    except (TypeError, ValueError):  # NaN, a reference cycle, or a key that is not a string
        return json.dumps({name: value if isinstance(value, str) else str(value) for name, value in record.items()})


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON, with its logger, its exception and its `extra` fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        for name, value in vars(record).items():
            if name not in _STANDARD and name not in fields:
                fields[f"extra_{name}" if name in _RESERVED else name] = value
        return json_line(record.levelno, record.getMessage(), record.created, **fields)


class _StreamHandler(logging.StreamHandler[TextIO]):
    def close(self) -> None:
        super().close()
        _close(self.stream)


class _ConsoleHandler(logging.Handler):
    """Writes above the progress bar of a console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter())  # else basicConfig sets one that repeats level and name

    def emit(self, record: logging.LogRecord) -> None:
        try:
            time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
            level = (record.levelname, _STYLES.get(record.levelno, "dim"))
            text = Text.assemble((time, "dim"), " ", level, f" {record.name}: {self.format(record)}")
            self._console.print(text, soft_wrap=True)
        except Exception:  # noqa: BLE001 - like all logging handlers, report the error instead of raising it
            self.handleError(record)

    def close(self) -> None:
        super().close()
        _close(self._console.file)


@contextmanager
def progress_bar(label: str, count: int, *, hidden: bool) -> Iterator[Callable[[], None]]:
    """Draw a bar of `count` steps on stderr; the value advances it by one."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as bar:
        task = bar.add_task(label, total=count)
        yield lambda: bar.advance(task)


def _close(stream: object) -> None:
    if isinstance(stream, LogStream):  # others, such as stderr, belong to the process
        stream.close()


def _log_uncaught_exceptions() -> None:
    """Log the tracebacks that Python prints to stderr, so that every line there is JSON.

    They are of the main thread, of other threads, and of finalizers and callbacks.
    """
    logger = logging.getLogger(_OWN[0])

    def uncaught(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
        logger.critical("uncaught exception", exc_info=error)

    def in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and args.exc_type is not SystemExit:
            name = args.thread.name if args.thread else "?"
            logger.critical("an exception ended the thread %s", name, exc_info=args.exc_value)

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        if args.exc_value is not None:
            logger.error("%s: %r", args.err_msg or "exception ignored in", args.object, exc_info=args.exc_value)

    sys.excepthook, threading.excepthook, sys.unraisablehook = uncaught, in_thread, unraisable
