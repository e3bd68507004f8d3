"""Engine: the thread that owns the core, and the asyncio side that talks to it.

Inbox: a queue of calls. Outbox: one asyncio queue per request, filled through `call_soon_threadsafe`.
"""

import asyncio
import contextlib
import logging
import math
import queue
import random
import secrets
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from serve.engine.core import Emitted, EngineCore, Runner
from serve.engine.observer import EngineFault, EngineGauges, NoObserver, Observer
from serve.engine.request import (
    DeadlineError,
    EngineLimits,
    EngineStoppedError,
    FinishReason,
    NotHeldError,
    Place,
    QueueFullError,
    QueueTimeoutError,
    Request,
    TokenEvent,
    empty_scores,
)
from serve.engine.streams import RowsWanted, Stream, Streams

logger = logging.getLogger(__name__)


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
        self._core = EngineCore(
            runner,
            max_model_len=limits.max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            prefix_caching=prefix_caching,
            observer=observer,
        )
        self._observer: Observer = observer or NoObserver()
        self._random = secrets.SystemRandom() if seed is None else random.Random(seed)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams = Streams(
            max_waiting=max_waiting, max_waiting_tokens=max_waiting_tokens, hold_seconds=hold_seconds
        )
        self._wanted: deque[RowsWanted] = deque()  # the thread's own
        self._stopping = False
        self._at_work_since: float | None = None  # time.monotonic() when the thread's round began; None: it waits
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def ready(self) -> bool:
        """Whether requests are being served."""
        return self._thread.is_alive() and not self.failed

    @property
    def hangs(self) -> bool:
        """Whether the thread goes on though the engine has failed: nothing ends it but the process's end."""
        return self.failed and self._thread.is_alive()

    @property
    def load(self) -> int:
        """Unfinished requests, those that are held included."""
        return len(self._streams)

    @property
    def gauges(self) -> EngineGauges:
        """How things stand."""
        return self._core.gauges

    @property
    def silent_for(self) -> float:
        """Seconds since the thread began what it is doing; 0 while it has nothing to do."""
        since = self._at_work_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, seconds: float | None = None) -> None:
        """Ends the thread after its current step; unfinished requests are aborted.

        Args:
            seconds: after which it is given up; None: it is waited for.
        """
        if self._thread.is_alive() and not self.failed:
            self._inbox.put(self._stop)
            self._thread.join(seconds)
            if self._thread.is_alive():
                self.give_up()

    def give_up(self) -> None:
        """Ends all requests with an error while the thread hangs in a step, and takes no more."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        where = "".join(traceback.format_stack(frame)) if frame else "it has ended\n"
        logger.critical(
            "a step has not ended for %.0f s; the engine is given up. Its thread:\n%s", self.silent_for, where
        )
        self._observer.on_fault(EngineFault.STALLED)
        self.failed = self._stopping = True
        self._streams.close(failed=True)

    async def submit(self, request: Request) -> AsyncGenerator[TokenEvent]:
        """Queues a request and yields its events until the one that has a finish reason.

        Raises:
            EngineStoppedError: the engine takes no more requests, or was stopped before this one's end.
            QueueFullError: too many requests are unfinished.
            QueueTimeoutError: it did not run within `request.queue_seconds`.
            DeadlineError: it did not end by `request.end_by`.
            ValueError: the prompt is empty or above the model's length, or the cache could never hold the request.
        """
        self._check(request)
        try:
            stream = self._streams.open(request.id, len(request.prompt_token_ids), request.place)
        except QueueFullError as error:
            if request.place is Place.REFUSED:
                self._observer.on_rejected(error.limit)
            raise
        seed = request.params.seed
        request.times.arrived = time.monotonic()
        request.seed = self._random.getrandbits(64) if seed is None else seed & (2**64 - 1)
        self._inbox.put(lambda: self._add(request))
        ended = False
        try:
            while not ended:
                event = await _next_event(request, stream)
                if event.stopped:
                    raise EngineStoppedError
                ended = event.finish_reason is not None
                yield event
        finally:
            if not ended:
                self.abort(request.id)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """Ends a request, or the hold of one that has ended, and frees what it has. Harmless when it has nothing.

        The reason is STOP where the text has ended, of which the engine knows nothing.
        """
        if self._streams.leave(request_id):
            self._inbox.put(lambda: self._abort(request_id, reason))

    async def vocabulary(self, request_id: str, start: int, count: int) -> NDArray[np.float32]:
        """Log-probs [count, V] of every token after the prompt tokens start..start+count-1 of a request that is held.

        Raises:
            EngineStoppedError: the engine has stopped, or failed on these rows.
            NotHeldError: the request is not held, or no longer: nobody asked for `hold_seconds`.
        """
        loop = asyncio.get_running_loop()
        wanted = RowsWanted(loop, loop.create_future(), request_id, start, count)
        with self._streams.asking(wanted):
            self._inbox.put(lambda: self._wanted.append(wanted))
            return await wanted.answer

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
            self._streams.close(failed=self.failed or sys.exception() is not None)

    def _step(self) -> list[Emitted]:
        try:
            return self._core.step()
        except Exception:
            logger.exception("a step failed; its requests are ended with an error and the cache starts anew")
        self._observer.on_fault(EngineFault.STEP)
        return self._recover()  # not among the handlers: a traceback keeps arrays of the step alive

    def _drain_inbox(self) -> bool:
        """Handles the calls that have come; waits for one while there is nothing to do. False: the thread shall end."""
        count = self._inbox.qsize()
        if not count and not self._core.at_work and not self._wanted:
            self._at_work_since = None
            with contextlib.suppress(queue.Empty):
                self._handle(self._inbox.get(timeout=self._streams.until_a_hold_ends()))
        self._at_work_since = time.monotonic()
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
        self._observer.on_fault(EngineFault.CALL)
        self._deliver(self._recover())

    def _add(self, request: Request) -> None:
        try:
            self._core.add(request)
        except Exception:
            logger.exception("a request could not be queued")
            self._observer.on_fault(EngineFault.REQUEST)
            event = TokenEvent([], empty_scores(0, 0), FinishReason.ERROR, error="it could not be queued")
            self._deliver([(request, event)])

    def _end_old_holds(self) -> None:
        asked = {wanted.request_id for wanted in self._wanted}
        for request_id in self._streams.old_holds():
            if request_id not in asked:
                self._abort(request_id, FinishReason.ABORT)

    def _recover(self) -> list[Emitted]:
        try:
            return self._core.fail_all("the engine failed on this request")
        except Exception:
            logger.exception("the engine could not recover; it stops")
            self._observer.on_fault(EngineFault.LOST)
            self.failed = self._stopping = True
            return []

    def _abort(self, request_id: str, reason: FinishReason) -> None:
        self._streams.release(request_id)
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
            self._observer.on_fault(EngineFault.ROWS)
            wanted.tell(EngineStoppedError())
        self._streams.hold_on(wanted.request_id)

    def _stop(self) -> None:
        self._stopping = True

    def _deliver(self, emitted: Sequence[Emitted]) -> None:
        self._streams.deliver(emitted, self._core.scheduler.held)


async def _next_event(request: Request, stream: Stream) -> TokenEvent:
    """Raises as `Engine.submit` does for a time that is up."""
    while True:
        start_by = request.times.arrived + request.queue_seconds
        until = request.end_by if request.times.admitted else min(start_by, request.end_by)
        if until == math.inf:
            return await stream.events.get()
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                return await stream.events.get()
        except TimeoutError:
            now = time.monotonic()
            if now >= request.end_by:
                raise DeadlineError from None
            if now >= start_by and not request.times.admitted:
                raise QueueTimeoutError from None
