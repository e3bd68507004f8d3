"""Answering: what chat and completions do alike with a request, from its body to its answer."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from serve.api.context import Endpoint
from serve.api.job import Job
from serve.api.json_stream import Body
from serve.api.middleware import AnswerRecord, record_of
from serve.api.requests import GenerationRequest
from serve.api.sse import json_or_disconnect, stream_or_disconnect


class Answering[B: GenerationRequest](ABC):
    """An endpoint that answers jobs of one kind of body."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._at = endpoint

    async def __call__(self, request: Request) -> Response:
        """Answers with JSON, or with server-sent events where `stream` is true."""
        async with self._at.bodies.read(request) as data:
            answer = await self.checked(request, data)
        del data  # while it is answered, nobody needs what it was read from
        return await answer()

    async def checked(self, request: Request, data: bytes) -> Callable[[], Awaitable[Response]]:
        """What answers a body that has been read.

        Raises:
            APIError: what is wrong with it.
        """
        job = await asyncio.to_thread(self._prepare, data, record_of(request))
        return lambda: self._respond(request, job)

    async def _respond(self, request: Request, job: Job[B]) -> Response:
        abort = self._at.abort_all(job.request_ids)
        if job.body.stream:
            return await stream_or_disconnect(request, self._chunks(job), abort)
        return await json_or_disconnect(request, self._answer(job), abort)

    @abstractmethod
    def _prepare(self, data: bytes, record: AnswerRecord) -> Job[B]:
        """The job that a body asks for. Slow: not for the event loop."""

    @abstractmethod
    async def _answer(self, job: Job[B]) -> Body:
        """The whole answer."""

    @abstractmethod
    def _chunks(self, job: Job[B]) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a stream."""
