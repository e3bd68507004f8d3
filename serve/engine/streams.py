"""Streams: what the engine's thread and the event loops share, behind one lock: who waits for whose events."""

import asyncio
import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.engine.core import Emitted
from serve.engine.request import EngineStoppedError, FinishReason, Place, QueueFullError, TokenEvent, empty_scores

type _Delivery = list[tuple[asyncio.Queue[TokenEvent], TokenEvent]]


@dataclass(frozen=True, slots=True)
class Stream:
    """The way back to the loop that a request came from."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[TokenEvent]
    tokens: int  # of the prompt


@dataclass(eq=False, frozen=True, slots=True)
class RowsWanted:
    """A call of Engine.vocabulary() that waits for its answer."""

    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[NDArray[np.float32]]
    request_id: str
    start: int
    count: int

    def tell(self, rows: NDArray[np.float32] | Exception) -> None:
        """The answer; the first one counts. Any thread may call this."""

        def tell() -> None:
            if self.answer.done():
                return
            if isinstance(rows, Exception):
                self.answer.set_exception(rows)
            else:
                self.answer.set_result(rows)

        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens any more
            self.loop.call_soon_threadsafe(tell)


class Streams:
    """Open streams, and requests that have ended and are held. Any thread may call any method."""

    def __init__(self, *, max_waiting: int, max_waiting_tokens: int | None, hold_seconds: float) -> None:
        """See `Engine` for the limits."""
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._hold_seconds = hold_seconds
        self._lock = threading.Lock()
        self._open: dict[str, Stream] = {}
        self._held: dict[str, float] = {}  # kept for Engine.vocabulary() until abort() or this monotonic time
        self._leaving: set[str] = set()  # of the open ones, those that the engine is to end
        self._asked: set[RowsWanted] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._open) + len(self._held)

    def open(self, request_id: str, tokens: int, place: Place) -> Stream:
        """A stream to the loop that runs now, for a prompt of so many tokens.

        Raises:
            EngineStoppedError: all are closed.
            QueueFullError: there are too many requests.
        """
        stream = Stream(asyncio.get_running_loop(), asyncio.Queue(), tokens)
        with self._lock:
            if self._closed:
                raise EngineStoppedError
            if place is not Place.GIVEN:
                self._check_room(tokens)
            self._open[request_id] = stream
        return stream

    def leave(self, request_id: str) -> bool:
        """A request is to end: from now on its place in the queue is another's. False: there is no such request."""
        with self._lock:
            if request_id in self._open:
                self._leaving.add(request_id)
            return request_id in self._open or request_id in self._held

    def deliver(self, emitted: Sequence[Emitted], held: Container[str]) -> None:
        """Hands a step's events to the loops that wait for them: one call for each loop.

        Args:
            held: ids of requests that keep their pages when they have ended.
        """
        by_loop: dict[asyncio.AbstractEventLoop, _Delivery] = defaultdict(list)
        with self._lock:
            for request, event in emitted:
                if event.finish_reason is None:
                    stream = self._open.get(request.id)
                else:
                    stream = self._open.pop(request.id, None)
                    self._leaving.discard(request.id)
                    if stream is not None and request.id in held:
                        self._held[request.id] = time.monotonic() + self._hold_seconds
                if stream is not None:
                    by_loop[stream.loop].append((stream.events, event))
        for loop, delivery in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens any more
                loop.call_soon_threadsafe(_put, delivery)

    def release(self, request_id: str) -> None:
        """Ends a hold."""
        with self._lock:
            self._held.pop(request_id, None)

    def hold_on(self, request_id: str) -> None:
        """Somebody asked: a hold begins anew."""
        with self._lock:
            if request_id in self._held:
                self._held[request_id] = time.monotonic() + self._hold_seconds

    def until_a_hold_ends(self) -> float | None:
        """Seconds; None if nothing is held."""
        with self._lock:
            ends = min(self._held.values(), default=None)
        return None if ends is None else max(0.0, ends - time.monotonic())

    def old_holds(self) -> list[str]:
        """Those that nobody has asked for long enough."""
        now = time.monotonic()
        with self._lock:
            return [each for each, ends in self._held.items() if ends <= now]

    @contextlib.contextmanager
    def asking(self, wanted: RowsWanted) -> Iterator[None]:
        """For as long as a call waits for rows.

        Raises:
            EngineStoppedError: all are closed.
        """
        with self._lock:
            if self._closed:
                raise EngineStoppedError
            self._asked.add(wanted)
        try:
            yield
        finally:
            with self._lock:
                self._asked.discard(wanted)

    def close(self, *, failed: bool) -> None:
        """Nobody is left waiting: every open stream and call for rows ends, and no other is taken.

        Args:
            failed: they end with an error; else they are told that the engine was stopped.
        """
        with self._lock:
            self._closed = True
            streams, asked = list(self._open.values()), list(self._asked)
            self._open.clear()
            self._leaving.clear()
            self._held.clear()
        for stream in streams:
            event = TokenEvent([], empty_scores(0, 0), FinishReason.ABORT, stopped=True)
            if failed:
                event = TokenEvent([], empty_scores(0, 0), FinishReason.ERROR, error="the engine has stopped")
            with contextlib.suppress(RuntimeError):
                stream.loop.call_soon_threadsafe(stream.events.put_nowait, event)
        for wanted in asked:
            wanted.tell(EngineStoppedError())

    def _check_room(self, tokens: int) -> None:
        if len(self) - len(self._leaving) >= self._max_waiting:
            raise QueueFullError("max_num_queued_reqs")
        if self._max_waiting_tokens is not None and self._too_many_tokens(tokens, self._max_waiting_tokens):
            raise QueueFullError("max_num_queued_tokens")

    def _too_many_tokens(self, more: int, most: int) -> bool:
        """Whether a prompt has to wait; one that is too long for the limit alone may come when nothing else is here."""
        waiting = [stream.tokens for name, stream in self._open.items() if name not in self._leaving]
        return bool(waiting) and sum(waiting) + more > most


def _put(delivery: _Delivery) -> None:
    for events, event in delivery:
        events.put_nowait(event)
