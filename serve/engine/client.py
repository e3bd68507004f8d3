"""The engine as its clients see it: EngineClient, RequestHandle, and Streams, which fills the handles."""

import asyncio
import contextlib
import math
import threading
import time
from collections import defaultdict
from collections.abc import Container, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from serve.engine.request import (
    DeadlineError,
    EngineLimits,
    EngineOptions,
    EngineStoppedError,
    FinishReason,
    QueueFullError,
    QueueTimeoutError,
    Request,
    TokenEvent,
)
from serve.engine.request_state import Emitted, RequestState, RequestTimes

type _Delivery = list[tuple["RequestHandle", TokenEvent]]


class EngineClient(Protocol):
    """Interface of `serve.engine.engine.Engine`, which documents the methods."""

    limits: EngineLimits

    @property
    def ready(self) -> bool: ...
    @property
    def num_requests(self) -> int: ...
    def admit(self, request: Request, *, bypass_limits: bool = False) -> "RequestHandle": ...
    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None: ...
    async def full_vocab_logprobs(self, request_id: str, start: int, count: int) -> NDArray[np.float32]: ...


class RequestHandle:
    """An admitted request: an async iterator of its events, and a context manager that aborts it on exit.

    Belongs to the event loop on which it was created. Iterating raises:
        EngineStoppedError: the engine stopped before the request finished.
        QueueTimeoutError: the request did not run within its `queue_timeout`.
        DeadlineError: the request did not finish by its `deadline`.
    """

    def __init__(self, engine: EngineClient, state: RequestState) -> None:
        self.request = state.request
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[TokenEvent] = asyncio.Queue()  # filled on the loop by the engine
        self._engine = engine
        self._state = state
        self._finished = False

    @property
    def times(self) -> RequestTimes:
        return self._state.times

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache; 0 until the request runs."""
        return self._state.num_cached or 0

    def abort(self, reason: FinishReason = FinishReason.ABORT) -> None:
        self._engine.abort(self.request.id, reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._finished:
            raise StopAsyncIteration
        event = await self._next()
        self._finished = event.finish_reason is not None
        if event.stopped:
            raise EngineStoppedError
        return event

    async def _next(self) -> TokenEvent:
        request, times = self.request, self.times
        start_by = times.arrived + request.queue_timeout
        while True:
            until = request.deadline if times.scheduled else min(start_by, request.deadline)
            if until == math.inf:
                return await self.events.get()
            try:
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    return await self.events.get()
            except TimeoutError:
                now = time.monotonic()
                if now >= request.deadline:
                    raise DeadlineError from None
                if now >= start_by and not times.scheduled:
                    raise QueueTimeoutError from None


@dataclass(eq=False, frozen=True, slots=True)
class FullVocabQuery:
    request_id: str
    start: int
    count: int
    future: Future[NDArray[np.float32]] = field(default_factory=Future)

    def resolve(self, result: NDArray[np.float32] | Exception) -> None:
        """Set the result, unless there is one or the caller has gone. Thread-safe."""
        with contextlib.suppress(InvalidStateError):
            if isinstance(result, Exception):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)


class Streams:
    """Handles of unfinished requests, and leases on the pages of finished ones. All methods are thread-safe."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._open: dict[str, RequestHandle] = {}
        self._aborting: set[str] = set()  # ids in _open that the engine is about to abort
        self._leases: dict[str, float] = {}  # id of a pinned request -> expiry, time.monotonic()
        self._queries: set[FullVocabQuery] = set()
        self._closed = False

    def __len__(self) -> int:
        """Number of unfinished and pinned requests."""
        return len(self._open) + len(self._leases)

    def open(self, handle: RequestHandle, *, bypass_limits: bool) -> None:
        """Register a handle.

        Raises:
            EngineStoppedError: the streams are closed.
            QueueFullError: a limit of the queue is reached.
        """
        with self._lock:
            if self._closed:
                raise EngineStoppedError
            if not bypass_limits:
                self._check_limits(len(handle.request.prompt_token_ids))
            self._open[handle.request.id] = handle

    def start_abort(self, request_id: str) -> bool:
        """Free the request's place in the queue at once. Returns False for an unknown request."""
        with self._lock:
            if request_id in self._open:
                self._aborting.add(request_id)
            return request_id in self._open or request_id in self._leases

    def deliver(self, emitted: Sequence[Emitted], pinned: Container[str]) -> None:
        """Hand events to their handles, one call per event loop. `pinned`: ids of finished requests that keep pages."""
        by_loop: dict[asyncio.AbstractEventLoop, _Delivery] = defaultdict(list)
        with self._lock:
            for state, event in emitted:
                handle = self._open.get(state.id)
                if handle is None:
                    continue
                by_loop[handle.loop].append((handle, event))
                if event.finish_reason is not None:
                    del self._open[state.id]
                    self._aborting.discard(state.id)
                    if state.id in pinned:
                        self._leases[state.id] = time.monotonic() + self._options.pin_seconds
        for loop, delivery in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_put, delivery)

    def end_lease(self, request_id: str) -> None:
        with self._lock:
            self._leases.pop(request_id, None)

    def renew_lease(self, request_id: str) -> None:
        with self._lock:
            if request_id in self._leases:
                self._leases[request_id] = time.monotonic() + self._options.pin_seconds

    def seconds_to_expiry(self) -> float | None:
        """Time until the next lease expires; None without leases."""
        with self._lock:
            expiry = min(self._leases.values(), default=None)
        return None if expiry is None else max(0.0, expiry - time.monotonic())

    def expired_leases(self) -> list[str]:
        now = time.monotonic()
        with self._lock:
            return [request_id for request_id, expiry in self._leases.items() if expiry <= now]

    def register(self, query: FullVocabQuery) -> None:
        """Register a query, which close() fails.

        Raises:
            EngineStoppedError: the streams are closed.
        """
        with self._lock:
            if self._closed:
                raise EngineStoppedError
            self._queries.add(query)
        query.future.add_done_callback(lambda _: self._queries.discard(query))

    def close(self, *, failed: bool) -> None:
        """Finish all streams and queries, and accept no more. Unless `failed`, iteration raises EngineStoppedError."""
        with self._lock:
            self._closed = True
            handles, queries = list(self._open.values()), list(self._queries)
            self._open.clear()
            self._aborting.clear()
            self._leases.clear()
        for handle in handles:
            event = TokenEvent(finish_reason=FinishReason.ABORT, stopped=True)
            if failed:
                event = TokenEvent(finish_reason=FinishReason.ERROR, error="the engine has stopped")
            with contextlib.suppress(RuntimeError):  # the loop is closed
                handle.loop.call_soon_threadsafe(handle.events.put_nowait, event)
        for query in queries:
            query.resolve(EngineStoppedError())

    def _check_limits(self, tokens: int) -> None:
        if len(self) - len(self._aborting) >= self._options.max_num_queued_reqs:
            raise QueueFullError("max_num_queued_reqs")
        limit = self._options.max_num_queued_tokens
        if limit is None:
            return
        queued = [len(h.request.prompt_token_ids) for name, h in self._open.items() if name not in self._aborting]
        if queued and sum(queued) + tokens > limit:  # with an empty queue, a prompt above the limit is admitted
            raise QueueFullError("max_num_queued_tokens")


def _put(delivery: _Delivery) -> None:
    for handle, event in delivery:
        handle.events.put_nowait(event)
