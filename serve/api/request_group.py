"""RequestGroup: the engine requests of one HTTP request that scores prompts and generates nothing."""

import asyncio
import sys
from collections.abc import AsyncGenerator
from dataclasses import replace

from serve.api.context import Context
from serve.api.generation import check_event
from serve.api.middleware import AnswerRecord, Work
from serve.api.requests import RequestFields
from serve.engine.client import RequestHandle
from serve.engine.request import QueueFullError, Request, TokenEvent
from serve.engine.request_state import RequestTimes
from serve.jobs.request_queue import RequestQueue

_MAX_ADMITTED = 128  # of a group in the engine at once; a long list of prompts must not fill the queue


class RequestGroup(RequestQueue):
    """Only the first request can find the queue full; the others wait until one of the group ends."""

    def __init__(self, context: Context, record: AnswerRecord, body: RequestFields, cache_salt: str | None) -> None:
        config = context.config
        super().__init__(context.engine, _MAX_ADMITTED, sys.maxsize)
        self._queue_timeout = config.queue_timeout
        self._deadline = record.deadline(body.timeout, config.request_timeout)
        self._priority = record.priority(body.priority or 0)
        self._cache_salt = record.cache_salt(cache_salt, per_key=config.prefix_cache_per_key)
        self._owner = record.key
        self._handles: set[RequestHandle] = set()  # in the engine
        self._times: list[RequestTimes] = []
        self._cached_tokens = 0
        self._ended = asyncio.Event()

    async def events(self, request: Request) -> AsyncGenerator[TokenEvent]:
        """Admit a request and yield its events.

        Raises:
            APIError: 500, the engine failed on the request.
            QueueFullError: it is the first of the group and the queue is full.
            QueueTimeoutError, DeadlineError, EngineStoppedError: see `RequestHandle`.
        """
        async with self._slots:
            handle = await self._admit(
                replace(
                    request,
                    priority=self._priority,
                    cache_salt=self._cache_salt,
                    # The others wait for their group, which has a place in the queue.
                    queue_timeout=request.queue_timeout if self._times else self._queue_timeout,
                    deadline=self._deadline,
                    owner=self._owner,
                )
            )
            try:
                with handle:
                    async for event in handle:
                        check_event(event)
                        yield event
            finally:
                self._cached_tokens += handle.cached_tokens
                self._handles.remove(handle)
                self._ended.set()

    async def _admit(self, request: Request) -> RequestHandle:
        while True:
            try:
                handle = self._engine.admit(request, bypass_limits=bool(self._times) and not self._handles)
            except QueueFullError:
                if not self._times:
                    raise
                self._ended.clear()
                await self._ended.wait()
            else:
                self._handles.add(handle)
                self._times.append(handle.times)
                return handle

    def work(self, prompt_tokens: int) -> Work:
        """The engine's work, once all requests have ended; `prompt_tokens` are those in `usage`."""
        started = [times for times in self._times if times.scheduled]
        return Work(
            prompt_tokens=prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=0,
            queue_seconds=max((times.scheduled - times.arrived for times in started), default=None),
            prefill_seconds=max((times.last - times.scheduled for times in started if times.last), default=None),
            decode_seconds=None,
            first_token_seconds=None,
        )
