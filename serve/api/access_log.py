"""AccessLog: a line for each answer, with the times that the engine took. Never what was asked."""

import ipaddress
import logging

from serve.api.readiness import PROBES
from serve.api.record import AnswerRecord

logger = logging.getLogger(__name__)

_MAX_PATH = 200  # characters


class AccessLog:
    """Writes to the log, at `info`; probes at `debug`."""

    def __call__(self, record: AnswerRecord) -> None:
        """Writes of an answer that has ended."""
        level = logging.DEBUG if record.handler in PROBES else logging.INFO
        if logger.isEnabledFor(level):
            fields = fields_of(record)
            logger.log(level, "%s", _line(fields), extra=fields)


def fields_of(record: AnswerRecord) -> dict[str, object]:
    """What is told of an answer; times in seconds, to the microsecond. What does not apply is left out."""
    fields: dict[str, object] = {
        "request_id": record.request_id,
        "method": record.method,
        # As it came, but for what a terminal would act upon.
        "path": record.path[:_MAX_PATH].encode("unicode_escape").decode("ascii"),
        "status": record.status,
        "client": _address(record.client),
        "key": record.key,
        "bytes": record.sent,
        "seconds": round(record.seconds, 6),
        "error": record.error,
    }
    if (work := record.work) is not None:
        fields |= {
            "prompt_tokens": work.prompt_tokens,
            "cached_tokens": work.cached_tokens,
            "completion_tokens": work.completion_tokens,
        }
        times = {"queue_seconds": work.queue, "prefill_seconds": work.prefill, "decode_seconds": work.decode}
        fields |= {name: round(seconds, 6) for name, seconds in times.items() if seconds is not None}
    return {name: value for name, value in fields.items() if value is not None}


def _address(client: str | None) -> str | None:
    """A proxy on this machine may say whose request it is, in a header that anybody could have written."""
    try:
        return client and str(ipaddress.ip_address(client))
    except ValueError:
        return None


def _line(fields: dict[str, object]) -> str:
    rest = " ".join(f"{name}={value}" for name, value in fields.items() if name not in ("method", "path", "status"))
    return f"{fields['method']} {fields['path']} {fields['status']} {rest}"
