"""Engine: the thread that owns the core, and its thread-safe interface.

The inbox is a queue of calls. Events leave through one asyncio queue per request, filled with `call_soon_threadsafe`.
"""

import asyncio
import contextlib
import logging
import queue
import random
import secrets
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from serve.engine.client import FullVocabQuery, RequestHandle, Streams
from serve.engine.core import EngineCore, Runner
from serve.engine.observer import EngineFault, EngineGauges, Observer
from serve.engine.request import (
    EngineLimits,
    EngineOptions,
    EngineStoppedError,
    FinishReason,
    NotPinnedError,
    Request,
    TokenEvent,
)
from serve.engine.request_state import Emitted, RequestState, RequestTimes

logger = logging.getLogger(__name__)


class Engine:
    """Runs requests on one thread."""

    def __init__(
        self, runner: Runner, limits: EngineLimits, options: EngineOptions, observer: Observer | None = None
    ) -> None:
        self.limits = limits
        self.failed = False
        self._runner = runner
        self._core = EngineCore(
            runner,
            max_model_len=limits.max_model_len,
            max_num_batched_tokens=options.max_num_batched_tokens,
            prefix_caching=options.enable_prefix_caching,
            observer=observer,
        )
        self._observer = observer or Observer()
        self._random = secrets.SystemRandom() if options.seed is None else random.Random(options.seed)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams = Streams(options)
        self._queries: deque[FullVocabQuery] = deque()  # used by the thread only
        self._stopping = False
        self.busy_since: float | None = None  # time.monotonic() at the start of the thread's iteration; None: idle
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def ready(self) -> bool:
        return self._thread.is_alive() and not self.failed

    @property
    def is_hung(self) -> bool:
        """True if the engine has failed and its thread still runs; only the end of the process ends it."""
        return self.failed and self._thread.is_alive()

    @property
    def num_requests(self) -> int:
        """Number of unfinished and pinned requests."""
        return len(self._streams)

    @property
    def gauges(self) -> EngineGauges:
        return self._core.gauges

    @property
    def seconds_in_step(self) -> float:
        """Seconds since the thread began its current iteration; 0 while it is idle."""
        since = self.busy_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float | None = None) -> None:
        """End the thread after its current step and abort unfinished requests; abandon() after `seconds`, if set."""
        if self._thread.is_alive() and not self.failed:
            self._inbox.put(self._stop)
            self._thread.join(seconds)
            if self._thread.is_alive():
                self.abandon()

    def abandon(self) -> None:
        """Finish all requests with an error and admit no more, while the thread hangs in a step."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame else "it has ended\n"
        logger.critical("giving up the engine: a step has run for %.0f s. Its thread:\n%s", self.seconds_in_step, stack)
        self._observer.on_fault(EngineFault.STALLED)
        self.failed = self._stopping = True
        self._streams.close(failed=True)

    def admit(self, request: Request, *, bypass_limits: bool = False) -> RequestHandle:
        """Queue a request and return the handle of its events. For any thread that runs an event loop.

        Args:
            request: what to run; its id must be unique among unfinished requests.
            bypass_limits: admit the request even if the queue is full.

        Raises:
            EngineStoppedError: the engine admits no more requests.
            QueueFullError: the queue is full.
            ValueError: the prompt is empty or above the model's length, or the cache could never hold the request.
        """
        self._check_size(request)
        state = RequestState(request, times=RequestTimes(arrived=time.monotonic()))
        handle = RequestHandle(self, state)
        self._streams.open(handle, bypass_limits=bypass_limits)
        seed = request.params.seed
        state.seed = self._random.getrandbits(64) if seed is None else seed & (2**64 - 1)
        self._inbox.put(lambda: self._add(state))
        return handle

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """Finish a request, or unpin the pages of one that has finished. Harmless for an unknown id. Thread-safe.

        `reason` is STOP if the client has found the end of the text, which the engine cannot see.
        """
        if self._streams.start_abort(request_id):
            self._inbox.put(lambda: self._abort(request_id, reason))

    async def full_vocab_logprobs(self, request_id: str, start: int, count: int) -> NDArray[np.float32]:
        """Log-probs [count, V] of all tokens after the prompt tokens start..start+count-1 of a pinned request.

        Raises:
            EngineStoppedError: the engine has stopped, or failed on these rows.
            NotPinnedError: the request is not pinned, or its lease has expired.
        """
        query = FullVocabQuery(request_id, start, count)
        self._streams.register(query)
        self._inbox.put(lambda: self._queries.append(query))
        return await asyncio.wrap_future(query.future)

    def _check_size(self, request: Request) -> None:
        length, max_model_len = len(request.prompt_token_ids), self.limits.max_model_len
        if not 1 <= length <= max_model_len:
            raise ValueError(f"the prompt must have 1 to {max_model_len} tokens, not {length}")
        needed = min(max_model_len, length + request.params.max_tokens)
        if needed > self.limits.cache_tokens:
            raise ValueError(f"the request needs {needed} tokens of cache; there are {self.limits.cache_tokens}")

    def _loop(self) -> None:
        try:
            while self._drain_inbox():
                self._abort_expired()
                self._answer_query()
                self._run_or_recover(lambda: self._deliver(self._core.step()), EngineFault.STEP)
        finally:
            self._streams.close(failed=self.failed or sys.exception() is not None)
            self._core.masks.close()

    def _drain_inbox(self) -> bool:
        """Run the calls in the inbox; wait for one when idle. Returns False when the thread should exit."""
        count = self._inbox.qsize()
        if not count and not self._core.in_flight and not self._queries:
            self.busy_since = None
            with contextlib.suppress(queue.Empty):
                self._handle(self._inbox.get(timeout=self._streams.seconds_to_expiry()))
        self.busy_since = time.monotonic()
        for _ in range(count):  # later calls wait until after the next step
            self._handle(self._inbox.get())
        return not self._stopping

    def _handle(self, call: Callable[[], None]) -> None:
        if not self._stopping:
            self._run_or_recover(call, EngineFault.CALL)

    def _run_or_recover(self, work: Callable[[], None], fault: EngineFault) -> None:
        """Do `work`. If it fails, finish running requests with an error and clear the cache."""
        try:
            work()
        except Exception:
            logger.exception("a %s failed; running requests finish with an error and the cache is cleared", fault)
        else:
            return
        self._observer.on_fault(fault)  # outside the handler: its traceback keeps the arrays of the step alive
        try:
            self._deliver(self._core.fail_all("the engine failed on this request"))
        except Exception:
            logger.exception("the engine could not recover; it stops")
            self._observer.on_fault(EngineFault.LOST)
            self.failed = self._stopping = True

    def _add(self, state: RequestState) -> None:
        try:
            self._core.add(state)
        except Exception:
            logger.exception("a request could not be queued")
            self._observer.on_fault(EngineFault.REQUEST)
            self._deliver([(state, TokenEvent(finish_reason=FinishReason.ERROR, error="it could not be queued"))])

    def _abort_expired(self) -> None:
        in_use = {query.request_id for query in self._queries}
        for request_id in self._streams.expired_leases():
            if request_id not in in_use:
                self._abort(request_id, FinishReason.ABORT)

    def _abort(self, request_id: str, reason: FinishReason) -> None:
        self._streams.end_lease(request_id)
        emitted = self._core.abort(request_id, reason)
        if emitted is not None:
            self._deliver([emitted])

    def _answer_query(self) -> None:
        """Compute the rows of one pending query: steps run between queries."""
        if not self._queries:
            return
        query = self._queries.popleft()
        try:
            query.resolve(self._core.full_vocab_logprobs(query.request_id, query.start, query.count))
        except LookupError:
            query.resolve(NotPinnedError())
        except Exception:
            logger.exception("full log-probs of a prompt could not be computed")
            self._observer.on_fault(EngineFault.ROWS)
            query.resolve(EngineStoppedError())
        self._streams.renew_lease(query.request_id)

    def _stop(self) -> None:
        self._stopping = True

    def _deliver(self, emitted: Sequence[Emitted]) -> None:
        self._streams.deliver(emitted, self._core.scheduler.pinned)
