"""What the engine tells of its work while it works: for metrics. Called on the engine's thread, so it must be quick."""

import enum
from dataclasses import dataclass
from typing import Protocol

from serve.engine.request import FinishReason, Request


class EngineFault(enum.StrEnum):
    """What can fail in the engine."""

    STEP = "step"  # its running requests ended with an error, and the cache began anew
    CALL = "call"  # one from outside the thread; the same happened
    REQUEST = "request"  # one could not be queued
    ROWS = "rows"  # of a whole vocabulary
    NAN = "nan"  # a log-prob that is not a number, which nobody was told
    LOST = "lost"  # the state could not be made anew: the engine has stopped
    STALLED = "stalled"  # a step did not end: the engine was given up


@dataclass(frozen=True, slots=True)
class EngineGauges:
    """How things stand at a moment."""

    running: int
    waiting: int
    held: int
    cache_usage: float  # 0 to 1, of the pages that somebody holds


class Observer(Protocol):
    """Who is told. Times are in `Request.times`, in seconds of time.monotonic()."""

    def on_step(self, tokens: int) -> None:
        """A step was begun, of so many prompt and decode tokens."""

    def on_admitted(self, request: Request) -> None:
        """A request runs for the first time; `num_cached` of its prompt's tokens were in the cache."""

    def on_preempted(self, count: int) -> None:
        """So many requests lost their pages and wait again."""

    def on_token(self, request: Request, gap: float | None) -> None:
        """A token was chosen, `gap` seconds after the one before it; None if it is the first."""

    def on_finished(self, request: Request, reason: FinishReason) -> None:
        """A request has ended."""

    def on_rejected(self, reason: str) -> None:
        """A request found the queue full; `reason` is the limit. Called on an event loop's thread."""

    def on_fault(self, kind: EngineFault) -> None:
        """Something failed in the engine. Called on any thread."""


class NoObserver:
    """Nobody is told."""

    def on_step(self, tokens: int) -> None: ...
    def on_admitted(self, request: Request) -> None: ...
    def on_preempted(self, count: int) -> None: ...
    def on_token(self, request: Request, gap: float | None) -> None: ...
    def on_finished(self, request: Request, reason: FinishReason) -> None: ...
    def on_rejected(self, reason: str) -> None: ...
    def on_fault(self, kind: EngineFault) -> None: ...
