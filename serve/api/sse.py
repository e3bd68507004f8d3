"""Responses that end if the client disconnects: server-sent events, and JSON documents."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from serve.api.errors import END_OF_STREAM, APIError, client_gone, engine_error
from serve.api.json_stream import GZIP_HEADERS, Body, accepts_gzip, compress, compress_pieces, make_body
from serve.api.middleware import AnswerRecord, record_of, route_path

logger = logging.getLogger(__name__)

_PIECE = 256 << 10  # bytes


class ClosingStream(StreamingResponse):
    """A streamed body that calls `on_close` when it ends in any way, and records why it ended early.

    The generators' own `finally` would run too late if the connection is closed during a write.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes],
        media_type: str,
        on_close: Callable[[], None],
        record: AnswerRecord,
        source: AsyncGenerator[bytes],  # of `pieces`, which close it only if they have been started
    ) -> None:
        super().__init__(pieces, media_type=media_type, headers={"Cache-Control": "no-cache"})
        self._pieces = pieces
        self._source = source
        self._on_close = on_close
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        complete = False

        async def send_and_yield(message: Message) -> None:
            nonlocal complete
            await send(message)
            complete |= message["type"] == "http.response.body" and not message.get("more_body", False)
            await asyncio.sleep(0)  # let other tasks run, and let a lost connection be noticed

        try:
            await super().__call__(scope, receive, send_and_yield)
        except ClientDisconnect:
            raise
        except Exception as error:
            self._record.error = (error if isinstance(error, APIError) else engine_error()).code
            raise
        finally:
            if not complete and self._record.error is None:
                self._record.error = "client_gone"
            self._on_close()
            await self._pieces.aclose()  # not left to the garbage collector, which closes the inner generators first
            await self._source.aclose()


async def stream_or_disconnect(
    request: Request, chunks: AsyncGenerator[dict[str, Any]], on_close: Callable[[], None]
) -> Response:
    """Server-sent events of `chunks`, at least one. Awaits the first: until then an error can be a status.

    Raises:
        APIError: the first chunk failed, or the client has disconnected.
    """
    record = record_of(request)
    events = _events(chunks, record, route_path(request.scope))
    first = await unless_disconnected(request, anext(events))
    return ClosingStream(_prepend(first, events), "text/event-stream", on_close, record, events)


async def json_or_disconnect(
    request: Request, work: Coroutine[Any, Any, Body], on_close: Callable[[], None]
) -> Response:
    """The JSON document that `work` returns; `work` is cancelled if the client disconnects.

    A body that is large or has placeholders is streamed once its first piece is there. A later failure closes the
    connection early so that no client takes the body for complete. `on_close` is called when a streamed body ends, at
    once for a small one.

    Raises:
        APIError: `work` or the first piece failed, or the client has disconnected.
    """
    first, rest = await unless_disconnected(request, _first_piece(work))
    gzip = accepts_gzip(request)
    if rest is None:
        compressed = await compress(first) if gzip else None
        headers = GZIP_HEADERS if compressed else None
        on_close()
        return Response(compressed or first, headers=headers, media_type="application/json")
    pieces = _slices(_prepend(first, rest))
    response = ClosingStream(
        compress_pieces(pieces) if gzip else pieces, "application/json", on_close, record_of(request), rest
    )
    response.headers.update(GZIP_HEADERS if gzip else {})
    return response


async def _first_piece(work: Coroutine[Any, Any, Body]) -> tuple[bytes, AsyncGenerator[bytes] | None]:
    """The first piece of a body, and an iterator of the others unless it is all of a small body."""
    body = await work
    if not body.placeholders and len(body.parts[0]) <= _PIECE:
        return body.parts[0], None
    pieces = body.pieces()
    return await anext(pieces), pieces


async def _slices(pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """Pieces that a transport may buffer whole, even an encrypted one, whose unsent part cannot be measured."""
    async with aclosing(pieces):
        async for piece in pieces:
            for start in range(0, len(piece), _PIECE):
                yield piece[start : start + _PIECE]


async def _prepend(first: bytes, pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(pieces):
        yield first
        async for piece in pieces:
            yield piece


async def _events(chunks: AsyncGenerator[dict[str, Any]], record: AnswerRecord, path: str) -> AsyncGenerator[bytes]:
    """Server-sent events of chunks; those with a type are named by it, the others end with [DONE].

    A failure after the first piece becomes an event. If it interrupts an event, that event's data is not valid JSON, so
    the client cannot mistake it for a chunk.
    """
    sent, complete = 0, True  # sent: events; complete: the last piece ended an event
    chunk: dict[str, Any] = {}
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                async with aclosing(_event(chunk)) as pieces:
                    async for piece in pieces:
                        sent, complete = sent + complete, piece.endswith(b"\n\n")
                        yield piece
        except Exception as error:
            if not sent:
                raise
            if not isinstance(error, APIError):
                logger.exception("a stream failed")
                error = engine_error()
            record.error = error.code
            yield (b"" if complete else b"\n\n") + error.event(path, sent)
            return
        if "type" not in chunk:
            yield END_OF_STREAM


async def _event(chunk: dict[str, Any]) -> AsyncGenerator[bytes]:
    large = "prompt_logprobs" in chunk or any("prompt_logprobs" in choice for choice in chunk.get("choices", ()))
    body = await asyncio.to_thread(make_body, chunk) if large else make_body(chunk)
    is_named = "type" in chunk
    body.parts[0] = (f"event: {chunk['type']}\n".encode() if is_named else b"") + b"data: " + body.parts[0]
    body.parts[-1] += b"\n\n"
    # The last events of a named stream repeat all of it.
    async with aclosing(_slices(body.pieces()) if is_named else body.pieces()) as pieces:
        async for piece in pieces:
            yield piece


async def unless_disconnected[T](request: Request, work: Awaitable[T]) -> T:
    """Await `work`; cancel it if the client disconnects first.

    Raises:
        APIError: 499, the client has disconnected.
    """

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    disconnected = asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait((task, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise client_gone()
        return task.result()
    finally:
        task.cancel()
        disconnected.cancel()
        await asyncio.gather(task, disconnected, return_exceptions=True)
