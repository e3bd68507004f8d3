"""Engine: the thread that owns the core, and the asyncio side that talks to it.

Inbox: a queue of calls. Outbox: one asyncio queue per request, filled through `call_soon_threadsafe`.
"""

import asyncio
import contextlib
import logging
import queue
import random
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.engine.core import Emitted, EngineCore, Runner
from serve.engine.observer import EngineGauges, NoObserver, Observer
from serve.engine.request import (
    EngineLimits,
    EngineStoppedError,
    FinishReason,
    NotHeldError,
    QueueFullError,
    Request,
    TokenEvent,
    empty_scores,
)

logger = logging.getLogger(__name__)


type _Delivery = list[tuple[asyncio.Queue[TokenEvent], TokenEvent]]


@dataclass(frozen=True, slots=True)
class _Stream:
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[TokenEvent]
    tokens: int  # of the prompt


@dataclass(frozen=True, slots=True)
class _RowsWanted:
    """A call of vocabulary() that waits for its answer."""

    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[NDArray[np.float32]]
    request_id: str
    start: int
    count: int

    def tell(self, rows: NDArray[np.float32] | Exception) -> None:
        def tell() -> None:
            if self.answer.cancelled():
                return
            if isinstance(rows, Exception):
                self.answer.set_exception(rows)
            else:
                self.answer.set_result(rows)

        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens any more
            self.loop.call_soon_threadsafe(tell)


class Engine:
    """Runs requests on one thread. submit and abort may be called from any event loop."""

    def __init__(
        self,
        runner: Runner,
        limits: EngineLimits,
        *,
        max_waiting: int,
        max_num_batched_tokens: int,
        prefix_caching: bool = True,
        hold_seconds: float = 120,
        max_waiting_tokens: int | None = None,
        seed: int | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Prepares the thread; start() starts it.

        Args:
            max_waiting: unfinished requests that may be in the engine before QueueFullError.
            hold_seconds: how long a request is held for vocabulary() without being asked: a client that does not read
                shall not keep others from its pages.
            max_waiting_tokens: prompt tokens that unfinished requests may have together before QueueFullError.
            seed: what seeds are drawn from for requests without one; None draws them from the system.
            observer: is told of all work.
        """
        self.limits = limits
        self.failed = False
        self._runner = runner
        self._max_waiting = max_waiting
        self._core = EngineCore(
            runner,
            max_model_len=limits.max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            prefix_caching=prefix_caching,
            observer=observer,
        )
        self._observer: Observer = observer or NoObserver()
        self._hold_seconds = hold_seconds
        self._max_waiting_tokens = max_waiting_tokens
        self._random = secrets.SystemRandom() if seed is None else random.Random(seed)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._held: dict[str, float] = {}  # ended, and kept for vocabulary() until abort() or this monotonic time
        self._wanted: deque[_RowsWanted] = deque()  # the thread's own
        self._streams_lock = threading.Lock()
        self._closed = False
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def ready(self) -> bool:
        """Whether requests are being served."""
        return self._thread.is_alive() and not self.failed

    @property
    def load(self) -> int:
        """Unfinished requests, those that are held included."""
        return len(self._streams) + len(self._held)

    @property
    def gauges(self) -> EngineGauges:
        """How things stand."""
        return self._core.gauges

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step; unfinished requests are aborted."""
        self._inbox.put(self._stop)
        self._thread.join()

    async def submit(self, request: Request) -> AsyncGenerator[TokenEvent]:
        """Queues a request and yields its events until the one that has a finish reason.

        Raises:
            EngineStoppedError: the engine takes no more requests.
            QueueFullError: too many requests are unfinished.
            ValueError: the prompt is empty or above the model's length, or the cache could never hold the request.
        """
        self._check(request)
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue(), len(request.prompt_token_ids))
        with self._streams_lock:
            if self._closed:
                raise EngineStoppedError
            if self.load >= self._max_waiting:
                self._observer.on_rejected("max_num_queued_reqs")
                raise QueueFullError
            if self._max_waiting_tokens is not None and self._too_many_tokens(stream.tokens):
                self._observer.on_rejected("max_num_queued_tokens")
                raise QueueFullError
            self._streams[request.id] = stream
        seed = request.params.seed
        request.times.arrived = time.monotonic()
        request.seed = self._random.getrandbits(64) if seed is None else seed & (2**64 - 1)
        self._inbox.put(lambda: self._add(request))
        ended = False
        try:
            while not ended:
                event = await stream.events.get()
                ended = event.finish_reason is not None
                yield event
        finally:
            if not ended:
                self.abort(request.id)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """Ends a request, or the hold of one that has ended, and frees what it has. Harmless when it has nothing.

        The reason is STOP where the text has ended, of which the engine knows nothing.
        """
        with self._streams_lock:
            if request_id not in self._streams and request_id not in self._held:
                return
        self._inbox.put(lambda: self._abort(request_id, reason))

    async def vocabulary(self, request_id: str, start: int, count: int) -> NDArray[np.float32]:
        """Log-probs [count, V] of every token after the prompt tokens start..start+count-1 of a request that is held.

        Raises:
            EngineStoppedError: the engine has stopped, or failed on these rows.
            NotHeldError: the request is not held, or no longer: nobody asked for `hold_seconds`.
        """
        loop = asyncio.get_running_loop()
        wanted = _RowsWanted(loop, loop.create_future(), request_id, start, count)
        with self._streams_lock:
            if self._closed:
                raise EngineStoppedError
            self._inbox.put(lambda: self._wanted.append(wanted))
        return await wanted.answer

    def _too_many_tokens(self, more: int) -> bool:
        """Whether a prompt has to wait; one that is too long for the limit alone may come when nothing else is here."""
        waiting = [stream.tokens for stream in self._streams.values()]
        return bool(waiting) and sum(waiting) + more > (self._max_waiting_tokens or 0)

    def _check(self, request: Request) -> None:
        prompt, most = len(request.prompt_token_ids), self.limits.max_model_len
        if not 1 <= prompt <= most:
            raise ValueError(f"the prompt has {prompt} of 1 to {most} tokens")
        needed = min(most, prompt + request.params.max_tokens)
        if needed > self.limits.cache_tokens:
            raise ValueError(
                f"the request needs a cache of {needed} tokens, there is one of {self.limits.cache_tokens}"
            )

    def _loop(self) -> None:
        try:
            while self._drain_inbox():
                self._end_old_holds()
                self._answer_one()
                self._deliver(self._step())
        finally:
            self._close_streams()

    def _step(self) -> list[Emitted]:
        try:
            return self._core.step()
        except Exception:
            logger.exception("a step failed; its requests are ended with an error and the cache starts anew")
        return self._recover()  # not among the handlers: a traceback keeps arrays of the step alive

    def _drain_inbox(self) -> bool:
        """Handles the calls that have come; waits for one while there is nothing to do. False: the thread shall end."""
        count = self._inbox.qsize()
        if not count and not self._core.at_work and not self._wanted:
            with contextlib.suppress(queue.Empty):
                self._handle(self._inbox.get(timeout=self._until_a_hold_ends()))
        for _ in range(count):  # those that come meanwhile are for after the next step
            self._handle(self._inbox.get())
        return not self._stopping

    def _handle(self, call: Callable[[], None]) -> None:
        if self._stopping:
            return
        try:
            call()
        except Exception:
            logger.exception("a call to the engine failed; running requests are ended and the cache starts anew")
        else:
            return
        self._deliver(self._recover())

    def _add(self, request: Request) -> None:
        try:
            self._core.add(request)
        except Exception:
            logger.exception("a request could not be queued")
            event = TokenEvent([], empty_scores(0, 0), FinishReason.ERROR, error="it could not be queued")
            self._deliver([(request, event)])

    def _until_a_hold_ends(self) -> float | None:
        """Seconds; None if nothing is held."""
        with self._streams_lock:
            ends = min(self._held.values(), default=None)
        return None if ends is None else max(0.0, ends - time.monotonic())

    def _end_old_holds(self) -> None:
        now = time.monotonic()
        with self._streams_lock:
            asked = {wanted.request_id for wanted in self._wanted}
            old = [each for each, ends in self._held.items() if ends <= now and each not in asked]
        for request_id in old:
            self._abort(request_id, FinishReason.ABORT)

    def _recover(self) -> list[Emitted]:
        try:
            return self._core.fail_all("the engine failed on this request")
        except Exception:
            logger.exception("the engine could not recover; it stops")
            self.failed = self._stopping = True
            return []

    def _abort(self, request_id: str, reason: FinishReason) -> None:
        with self._streams_lock:
            self._held.pop(request_id, None)
        emitted = self._core.abort(request_id, reason)
        if emitted is not None:
            self._deliver([emitted])

    def _answer_one(self) -> None:
        """Computes rows for one call of vocabulary(): steps go on between them."""
        if not self._wanted:
            return
        wanted = self._wanted.popleft()
        try:
            wanted.tell(self._core.vocabulary(wanted.request_id, wanted.start, wanted.count))
        except LookupError:
            wanted.tell(NotHeldError())
        except Exception:
            logger.exception("the rows of a prompt could not be computed")
            wanted.tell(EngineStoppedError())
        with self._streams_lock:
            if wanted.request_id in self._held:
                self._held[wanted.request_id] = time.monotonic() + self._hold_seconds

    def _stop(self) -> None:
        self._stopping = True

    def _deliver(self, emitted: Sequence[Emitted]) -> None:
        """Hands a step's events to the loops that wait for them: one call for each loop."""
        by_loop: dict[asyncio.AbstractEventLoop, _Delivery] = defaultdict(list)
        with self._streams_lock:
            for request, event in emitted:
                if event.finish_reason is None:
                    stream = self._streams.get(request.id)
                else:
                    stream = self._streams.pop(request.id, None)
                    if stream is not None and request.id in self._core.scheduler.held:
                        self._held[request.id] = time.monotonic() + self._hold_seconds
                if stream is not None:
                    by_loop[stream.loop].append((stream.events, event))
        for loop, delivery in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens any more
                loop.call_soon_threadsafe(_put, delivery)

    def _close_streams(self) -> None:
        """Nobody is left waiting: every open stream ends, and no other is opened."""
        with self._streams_lock:
            self._closed = True
            streams = list(self._streams.values())
            self._streams.clear()
            self._held.clear()
        for stream in streams:
            event = TokenEvent([], empty_scores(0, 0), FinishReason.ERROR, error="the engine has stopped")
            with contextlib.suppress(RuntimeError):
                stream.loop.call_soon_threadsafe(stream.events.put_nowait, event)

        while not self._inbox.empty():  # who waits for rows must be told that there are none
            with contextlib.suppress(Exception):
                self._inbox.get()()
        for wanted in self._wanted:
            wanted.tell(EngineStoppedError())


def _put(delivery: _Delivery) -> None:
    for events, event in delivery:
        events.put_nowait(event)
