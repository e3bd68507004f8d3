"""The engine as its clients see it: EngineClient, and RequestHandle for one admitted request."""

import asyncio
import math
import time
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from serve.engine.request import (
    DeadlineError,
    EngineLimits,
    EngineStoppedError,
    FinishReason,
    QueueTimeoutError,
    Request,
    TokenEvent,
)
from serve.engine.request_state import RequestState, RequestTimes


class EngineClient(Protocol):
    """Interface of `serve.engine.engine.Engine`, which documents the methods."""

    limits: EngineLimits

    @property
    def ready(self) -> bool: ...
    @property
    def load(self) -> int: ...
    def admit(self, request: Request, *, bypass_limits: bool = False) -> "RequestHandle": ...
    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None: ...
    async def full_logprobs(self, request_id: str, start: int, count: int) -> NDArray[np.float32]: ...


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
            until = request.deadline if times.admitted else min(start_by, request.deadline)
            if until == math.inf:
                return await self.events.get()
            try:
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    return await self.events.get()
            except TimeoutError:
                now = time.monotonic()
                if now >= request.deadline:
                    raise DeadlineError from None
                if now >= start_by and not times.admitted:
                    raise QueueTimeoutError from None
