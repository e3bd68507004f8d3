"""The trace of a request: W3C Trace Context of its client, and what a tracer records."""

import re
from dataclasses import dataclass

from starlette.datastructures import Headers

_TRACEPARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace_id>(?!0{32})[0-9a-f]{32})-(?P<span_id>(?!0{16})[0-9a-f]{16})"
    r"-(?P<flags>[0-9a-f]{2})(?P<later>-.*)?"
)


@dataclass(frozen=True, slots=True)
class TraceContext:
    trace_id: str  # 32 hexadecimal digits
    span_id: str  # 16
    is_sampled: bool

    @property
    def header(self) -> str:
        """The value of `traceparent` or `traceresponse`."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.is_sampled):02x}"


def read_traceparent(headers: Headers) -> TraceContext | None:
    """The client's trace; None without a valid `traceparent`. Later versions may have more fields."""
    values = headers.getlist("traceparent")
    match = _TRACEPARENT.fullmatch(values[0].strip()) if len(values) == 1 else None
    if match is None or (match["version"] == "00" and match["later"]):
        return None
    return TraceContext(match["trace_id"], match["span_id"], bool(int(match["flags"], 16) & 1))
