"""How this process logs: one handler for all modules, in words or as a JSON object a line."""

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
_OWN = "serve"  # the loggers whose level can be chosen; libraries say what is wrong, and no more
# What every record has. uvicorn adds its message again, with colours.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "bold red"}


def set_up_logs(level: str, *, stream: TextIO, form: str = "plain", console: Console | None = None) -> None:
    """Sends what is logged, and warnings, to `stream`; replaces what an earlier call set up.

    Args:
        level: of our own modules, such as "info".
        form: "plain", or "json", which also takes in what Python itself would write of exceptions.
        console: of a terminal, to be written to instead.
    """
    handler = logging.StreamHandler(stream) if console is None else _ConsoleHandler(console)
    if console is None:
        handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_PLAIN))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(_OWN).setLevel(level.upper())
    logging.captureWarnings(True)
    if form == "json":
        _log_what_is_uncaught()


def json_line(level: int, message: str, at: float | None = None, **fields: Any) -> str:
    """One JSON object: time (ISO 8601, UTC), level, message, and the other fields, unknown types as their str().

    Args:
        at: seconds since the epoch; now, if None.
    """
    time = datetime.now(UTC) if at is None else datetime.fromtimestamp(at, UTC)
    head = {"time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"), "level": _level(level)}
    value = head | {"message": message} | fields
    try:
        return json.dumps(value, default=str, allow_nan=False)
    except (TypeError, ValueError):  # NaN, a circle, a key that is no string
        return json.dumps({name: each if isinstance(each, str) else str(each) for name, each in value.items()})


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON, with its logger, its exception and what `extra` gave it."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        fields |= {name: value for name, value in vars(record).items() if name not in _STANDARD and name not in fields}
        reserved = {name: fields.pop(name) for name in ("time", "level", "at") if name in fields}
        fields |= {f"extra_{name}": value for name, value in reserved.items()}
        return json_line(record.levelno, record.getMessage(), record.created, **fields)


class _ConsoleHandler(logging.Handler):
    """Writes above whatever bar the console shows."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
            level = (record.levelname, _STYLES.get(record.levelno, "dim"))
            said = Text.assemble((time, "dim"), " ", level, f" {record.name}: {self.format(record)}")
            self._console.print(said, soft_wrap=True)
        except Exception:  # noqa: BLE001 - logging never raises; this says it as the other handlers do
            self.handleError(record)


def _log_what_is_uncaught() -> None:
    logger = logging.getLogger(_OWN)

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        logger.critical("an exception was not caught", exc_info=(kind, error, trace))

    def in_thread(told: threading.ExceptHookArgs) -> None:
        if told.exc_value is not None and told.exc_type is not SystemExit:
            name = told.thread.name if told.thread else "?"
            exc_info = (told.exc_type, told.exc_value, told.exc_traceback)
            logger.critical("an exception ended the thread %s", name, exc_info=exc_info)

    def unraisable(told: "sys.UnraisableHookArgs") -> None:
        if told.exc_value is not None:
            exc_info = (told.exc_type, told.exc_value, told.exc_traceback)
            logger.error("%s: %r", told.err_msg or "an exception was ignored in", told.object, exc_info=exc_info)

    sys.excepthook, threading.excepthook, sys.unraisablehook = uncaught, in_thread, unraisable


def _level(level: int) -> str:
    return logging.getLevelName(level).lower()
