"""AnswerRecord: what is known of one HTTP request once its answer has ended, for the access log and the metrics."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection

NO_ROUTE = "none"

_PLACE = "logprobd.record"  # in the scope


@dataclass(frozen=True, slots=True)
class Work:
    """What the engine did for a request. Times are in seconds; of several choices, the longest of each."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue: float | None  # from arrival in the engine until it ran; None: it never did
    prefill: float | None  # from then until its first token, or the last number of its prompt
    decode: float | None  # from the first token to the last


@dataclass(slots=True)
class AnswerRecord:
    """Filled in on the way; times are in seconds, `began` is of time.monotonic()."""

    request_id: str
    method: str
    path: str
    client: str | None = None  # its address
    key: str | None = None  # the name of the API key it bears
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0  # until the answer's end
    handler: str = NO_ROUTE  # the route, of which there are few, unlike paths
    status: int = 0  # 0: there was no answer
    sent: int = 0  # bytes of the answer's body
    error: str | None = None  # code of the error that the client was told, in an answer or within a stream
    measure: Callable[[], Work] | None = None  # where the engine has something to do
    work: Work | None = None

    def end(self, handler: str) -> None:
        """Called when nothing more is sent."""
        self.handler = handler
        self.seconds = time.monotonic() - self.began
        if self.measure is not None:
            self.work, self.measure = self.measure(), None


type OnAnswer = Callable[[AnswerRecord], None]


def record_of(connection: HTTPConnection) -> AnswerRecord:
    """The record of a request that came through `Access`."""
    record = connection.scope[_PLACE]
    assert isinstance(record, AnswerRecord)
    return record


def recorded(record: AnswerRecord) -> dict[str, AnswerRecord]:
    """What the scope of a request holds so that `record_of` finds its record."""
    return {_PLACE: record}
