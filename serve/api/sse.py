"""Answers over HTTP: server-sent events, and JSON that is dropped when its client goes away."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from serve.api.errors import APIError, client_gone, engine_error
from serve.api.json_stream import GZIP_HEADERS, Body, accepts_gzip, compress, compress_pieces, dump, make_body
from serve.api.middleware import AnswerRecord, record_of

logger = logging.getLogger(__name__)

_PIECE = 256 << 10  # bytes


class ClosingStream(StreamingResponse):
    """A body in pieces whose end, however it comes, is told to `on_close`.

    A generator's own `finally` does not run before the answer ends when the client is cut off while it is written to.
    """

    def __init__(
        self, pieces: AsyncIterator[bytes], media_type: str, on_close: Callable[[], None], record: AnswerRecord
    ) -> None:
        super().__init__(pieces, media_type=media_type, headers={"Cache-Control": "no-cache"})
        self._on_close = on_close
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ended = False

        async def noted(message: Message) -> None:
            nonlocal ended
            await send(message)
            ended |= message["type"] == "http.response.body" and not message.get("more_body", False)
            await asyncio.sleep(0)  # others have their turn, and a connection that was just lost is noticed

        try:
            await super().__call__(scope, receive, noted)
        except APIError as error:
            self._record.error = error.code
            raise
        except ClientDisconnect:
            raise
        except Exception:
            self._record.error = engine_error().code
            raise
        finally:
            if not ended and self._record.error is None:
                self._record.error = "client_gone"
            self._on_close()


class _InPieces(Response):
    """A whole body, written as its reader takes it.

    A transport would take all of it at once, and of an encrypted one nobody can tell how much it still holds.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), _PIECE):
            more = start + _PIECE < len(self.body)
            await send({"type": "http.response.body", "body": self.body[start : start + _PIECE], "more_body": more})


async def stream_or_disconnect(
    request: Request, chunks: AsyncGenerator[dict[str, Any]], on_close: Callable[[], None]
) -> Response:
    """Events of `chunks`, one at least, once the first is known: until then an error can still be a status.

    Raises:
        APIError: the first chunk could not be made, or the client has gone.
    """
    record = record_of(request)
    events = _events(chunks, record)
    first = await _unless_gone(request, _next(events))
    if first is None:
        raise client_gone()
    return ClosingStream(_continued(first, events), "text/event-stream", on_close, record)


async def json_or_disconnect(
    request: Request, work: Coroutine[Any, Any, Body], on_close: Callable[[], None]
) -> Response:
    """The JSON that `work` makes; cancels it when the client closes the connection.

    A body with holes is sent in pieces, once the first is known. What fails later closes the connection before the
    body's end, so that nobody takes it for whole.

    Raises:
        APIError: `work` failed, or the first piece could not be made, or the client has gone.
    """
    begun = await _unless_gone(request, _begin(work))
    if begun is None:
        raise client_gone()
    first, pieces = begun
    zipped = accepts_gzip(request)
    if pieces is None:
        smaller = await compress(first) if zipped else None
        return _InPieces(smaller or first, headers=GZIP_HEADERS if smaller else None, media_type="application/json")
    whole = _continued(first, pieces)
    record = record_of(request)
    answer = ClosingStream(compress_pieces(whole) if zipped else whole, "application/json", on_close, record)
    answer.headers.update(GZIP_HEADERS if zipped else {})
    return answer


async def _begin(work: Coroutine[Any, Any, Body]) -> tuple[bytes, AsyncGenerator[bytes] | None]:
    """The first piece of a body, and the rest if it has holes."""
    body = await work
    if not body.holes:
        return body.texts[0], None
    pieces = body.pieces()
    return await anext(pieces), pieces


async def _next(pieces: AsyncGenerator[bytes]) -> bytes:
    return await anext(pieces)


async def _continued(first: bytes, pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(pieces):
        yield first
        async for piece in pieces:
            yield piece


async def _events(chunks: AsyncGenerator[dict[str, Any]], record: AnswerRecord) -> AsyncGenerator[bytes]:
    """Chunks as events; a failure after the first piece is an event, too.

    If it tears an event, what the client has got of that one is no JSON, and cannot be taken for an answer.
    """
    sent, whole = False, True
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                async with aclosing(_event(chunk)) as pieces:
                    async for piece in pieces:
                        sent, whole = True, piece.endswith(b"\n\n")
                        yield piece
        except Exception as error:
            if not sent:
                raise
            if not isinstance(error, APIError):
                logger.exception("a stream failed")
                error = engine_error()
            record.error = error.code
            yield (b"" if whole else b"\n\n") + b"data: " + dump(error.body) + b"\n\n"
        yield b"data: [DONE]\n\n"


async def _event(chunk: dict[str, Any]) -> AsyncGenerator[bytes]:
    large = "prompt_logprobs" in chunk or any("prompt_logprobs" in choice for choice in chunk["choices"])
    body = await asyncio.to_thread(make_body, chunk) if large else make_body(chunk)
    body.texts[0] = b"data: " + body.texts[0]
    body.texts[-1] += b"\n\n"
    async with aclosing(body.pieces()) as pieces:
        async for piece in pieces:
            yield piece


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
