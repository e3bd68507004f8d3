"""Observer: callbacks for metrics, made on the engine's thread unless stated otherwise; they must be quick."""

import enum
from dataclasses import dataclass

from serve.engine.request import FinishReason
from serve.engine.request_state import RequestState


class EngineFault(enum.StrEnum):
    STEP = "step"  # a step failed: its requests finished with an error and the cache was cleared
    CALL = "call"  # a call from another thread failed, with the same consequences
    REQUEST = "request"  # a request could not be queued
    ROWS = "rows"  # full log-probs of a prompt could not be computed
    NAN = "nan"  # a log-prob was NaN: the request finished with an error
    LOST = "lost"  # the cache could not be cleared: the engine stopped
    STALLED = "stalled"  # a step did not end: the engine was given up


@dataclass(frozen=True, slots=True)
class EngineGauges:
    running: int
    waiting: int
    pinned: int  # finished requests that keep their pages
    cache_usage: float  # share of pages in use, 0 to 1


class Observer:
    """Callbacks of the engine, which do nothing here."""

    def on_step(self, tokens: int) -> None:
        """A step with `tokens` prompt and decode tokens was dispatched."""

    def on_scheduled(self, request: RequestState) -> None:
        """A request was scheduled for the first time; `num_cached` is known."""

    def on_preempted(self, count: int) -> None:
        """`count` requests were preempted."""

    def on_token(self, request: RequestState, gap: float | None, *, forced: bool = False) -> None:
        """A token was generated, `gap` seconds after the previous one; None for the first.

        `forced`: the request's grammar allowed no other.
        """

    def on_grammar_error(self) -> None:
        """A request finished with an error, because its grammar could not continue."""

    def on_finished(self, request: RequestState, reason: FinishReason) -> None:
        """A request finished."""

    def on_fault(self, kind: EngineFault) -> None:
        """Something failed in the engine. Called on any thread."""
