"""Answers over HTTP: server-sent events, and JSON that is dropped when its client goes away."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.openai.errors import APIError, engine_error

logger = logging.getLogger(__name__)

_CLIENT_CLOSED = 499  # nobody reads it; it is the usual status of such a request in logs


def dump(value: Any) -> bytes:
    """JSON. numpy's float32 is printed as the shortest text that gives the same float32."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


class EventStream(StreamingResponse):
    """Server-sent events whose end, however it comes, is told to `on_close`.

    A generator's own `finally` does not run before the answer ends when the client is cut off while it is written to.
    """

    def __init__(self, events: AsyncIterator[bytes], on_close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def stream_or_disconnect(
    request: Request, chunks: AsyncGenerator[dict[str, Any]], on_close: Callable[[], None]
) -> Response:
    """Events of `chunks`, one at least, once the first is known: until then an error can still be a status.

    Raises:
        APIError: the first chunk could not be made.
    """
    first = await _unless_gone(request, _first(chunks))
    return Response(status_code=_CLIENT_CLOSED) if first is None else EventStream(_events(first, chunks), on_close)


async def _first(chunks: AsyncGenerator[dict[str, Any]]) -> dict[str, Any]:
    return await anext(chunks)


async def _events(first: dict[str, Any], chunks: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[bytes]:
    async with aclosing(chunks):
        try:
            yield await _event(first)
            async for chunk in chunks:
                yield await _event(chunk)
        except APIError as error:
            yield b"data: " + dump(error.body) + b"\n\n"
        except Exception:
            logger.exception("a stream failed")
            yield b"data: " + dump(engine_error().body) + b"\n\n"
        yield b"data: [DONE]\n\n"


async def _event(chunk: dict[str, Any]) -> bytes:
    large = "prompt_logprobs" in chunk or any("prompt_logprobs" in choice for choice in chunk["choices"])
    data = await asyncio.to_thread(dump, chunk) if large else dump(chunk)
    return b"data: " + data + b"\n\n"


async def json_or_disconnect(request: Request, work: Coroutine[Any, Any, bytes]) -> Response:
    """The JSON that `work` makes; cancels it when the client closes the connection."""
    data = await _unless_gone(request, work)
    return Response(status_code=_CLIENT_CLOSED) if data is None else Response(data, media_type="application/json")


async def _unless_gone[T](request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns; None, and `work` cancelled, when the client closes the connection first."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
