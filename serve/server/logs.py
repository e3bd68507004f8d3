"""Logging of the process: one handler for all modules, which writes text or one JSON object per line."""

import json
import logging
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

_PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_OWN = "serve"  # parent of our loggers, whose level is configurable; other libraries log warnings and errors only
# Attributes of every record, which are not fields. uvicorn repeats its message with colours.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_RESERVED = ("time", "level", "timestamp")  # parameters and fields of json_line
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "bold red"}


def set_up_logs(level: str, *, stream: TextIO, as_json: bool = False, console: Console | None = None) -> None:
    """Send log records and Python warnings to `stream`, replacing the handler of an earlier call.

    Args:
        level: lowest level of our own loggers, such as "info".
        as_json: write JSON lines; then uncaught exceptions are logged, too (see `_log_uncaught_exceptions`).
        console: a terminal to write to instead of `stream`.
    """
    handler = logging.StreamHandler(stream) if console is None else _ConsoleHandler(console)
    if console is None:
        handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(_PLAIN))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(_OWN).setLevel(level.upper())
    logging.captureWarnings(True)
    if as_json:
        _log_uncaught_exceptions()


def json_line(level: int, message: str, timestamp: float | None = None, **fields: Any) -> str:
    """Return one JSON object: time (ISO 8601, UTC), level, message, and `fields`; other types are written as str().

    Args:
        timestamp: seconds since the epoch; default: now.
    """
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


def _log_uncaught_exceptions() -> None:
    """Log what Python would print to stderr as a traceback, so that every line there is JSON.

    Replaces three hooks of the interpreter: `sys.excepthook` (main thread), `threading.excepthook` (other threads) and
    `sys.unraisablehook` (finalizers and callbacks). Exceptions propagate and end threads as before.
    """
    logger = logging.getLogger(_OWN)

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
