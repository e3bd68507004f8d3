"""Access log: one line per answer, with token counts and the engine's times. Prompts and answers are never logged."""

import ipaddress
import logging
from dataclasses import asdict

from serve.api.middleware import PROBES, AnswerRecord

logger = logging.getLogger(__name__)

_MAX_PATH, _MAX_METHOD = 200, 20  # characters
_FIRST = ("method", "path", "status")  # without their names in a line


def log_answer(record: AnswerRecord) -> None:
    """Log an answer at INFO, or at DEBUG if it is a probe's."""
    level = logging.DEBUG if record.handler in PROBES else logging.INFO
    if logger.isEnabledFor(level):
        fields = fields_of(record)
        rest = " ".join(f"{name}={value}" for name, value in fields.items() if name not in _FIRST)
        logger.log(level, "%s %s %s %s", *(fields[name] for name in _FIRST), rest, extra=fields)


def fields_of(record: AnswerRecord) -> dict[str, object]:
    """The log fields of an answer; times in seconds, rounded to microseconds. Fields without a value are omitted."""
    fields: dict[str, object] = {
        "request_id": record.request_id,
        "method": record.method[:_MAX_METHOD],
        # Control characters are escaped, because a terminal would act on them, and spaces, because they end a field.
        "path": record.path[:_MAX_PATH].encode("unicode_escape").decode("ascii").replace(" ", r"\x20"),
        "status": record.status,
        "client": _address(record.client),
        "key": record.key,
        "trace_id": None if record.trace is None else record.trace.trace_id,
        "bytes": record.body_bytes,
        "seconds": record.seconds,
        "error": record.error,
    }
    if record.work is not None:
        fields |= asdict(record.work)
    rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in fields.items()}
    return {name: value for name, value in rounded.items() if value is not None}


def _address(client: str | None) -> str | None:
    """The client's IP address; None for anything else, since a forwarded header may contain arbitrary text."""
    try:
        return client and str(ipaddress.ip_address(client))
    except ValueError:
        return None
