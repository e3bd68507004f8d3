"""Flow control from a client back to the replica that answers it.

Ray Serve's proxy sends a message when the client has room for it, but does not tell the Front. So `SentReports` runs in
the proxy and reports in `receive` how many bytes have been sent, and `Window` in the Front waits for these reports. The
Front takes a batch from Ray when it needs one, Ray runs the replica's generator at most MAX_BATCHES ahead of it, and
`Batches` makes the app wait, which limits what it keeps as it does on a server.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BATCHES = 2  # of a response that wait in Ray's memory between replica and front
_BATCH_BYTES = 64 << 10  # above which the app waits until its batch is taken
_WINDOW_BYTES = 256 << 10  # above which the front waits for a report
_REPORT_BYTES = 64 << 10  # a report is a call from the front to the proxy

# A key of the scope's extensions and of the response's start, and the type of a report.
_SENT = "logprobd.sent"

PROXY_CALLBACK = "serve.ray.flow_control.proxy_middleware"  # of RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
UNLIMITED = (
    "answers that are not read wait in the memory of Ray Serve's proxy, which does not report what it has sent: set "
    f"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH={PROXY_CALLBACK} where Ray starts"
)


def proxy_middleware() -> list[Middleware]:
    """Called by Ray Serve's proxy when it starts."""
    return [Middleware(SentReports)]


class SentReports:
    """ASGI middleware that reports the sent bytes of a response to an app that requests it when the response starts."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        try:
            scope = {**scope, "extensions": {**scope.get("extensions", {}), _SENT: {}}}
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            exchange.close()


class _Exchange:
    """One request of `SentReports`."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._received: asyncio.Future[Message] | None = None
        self._is_requested = False
        self._sent_bytes = 0  # not reported yet
        self._report_due = asyncio.Event()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _SENT in message:
            self._is_requested = True
            message = {name: value for name, value in message.items() if name != _SENT}
        await self._send(message)
        self._sent_bytes += len(message.get("body", b""))
        if self._is_requested and self._sent_bytes >= _REPORT_BYTES:
            self._report_due.set()

    async def receive(self) -> Message:
        self._received = self._received or asyncio.ensure_future(self._receive())
        due = asyncio.ensure_future(self._report_due.wait())
        try:
            await asyncio.wait((self._received, due), return_when=asyncio.FIRST_COMPLETED)
        finally:
            due.cancel()
        if self._received.done():
            message, self._received = self._received.result(), None
            return message
        self._report_due.clear()
        size, self._sent_bytes = self._sent_bytes, 0
        return {"type": _SENT, "bytes": size}

    def close(self) -> None:
        if self._received is not None:
            self._received.cancel()


class Window:
    """The bytes of one response between the front and its client."""

    def __init__(self, scope: Mapping[str, Any], receive: Receive, *, seconds: float) -> None:
        """A client that reads nothing for `seconds` is given up."""
        self.is_limited = _SENT in scope.get("extensions", {})  # else the proxy reports nothing
        self._receive = receive
        self._seconds = seconds
        self._bytes = 0
        self._report = asyncio.Event()

    async def receive(self) -> Message:
        """The next message that is no report. To be awaited as long as the response is sent."""
        while (message := await self._receive())["type"] == _SENT:
            self._bytes -= message["bytes"]
            self._report.set()
        return message

    async def admit(self, message: Message) -> Message:
        """Return `message` when the client has room for it.

        Raises:
            TimeoutError: the client has stopped reading.
        """
        if not self.is_limited:
            return message
        while self._bytes > _WINDOW_BYTES:
            self._report.clear()
            async with asyncio.timeout(self._seconds):
                await self._report.wait()
        self._bytes += len(message.get("body", b""))
        return {**message, _SENT: True} if message["type"] == "http.response.start" else message


class Batches:
    """The messages of an app, in batches."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._bytes = 0
        self._changed, self._taken = asyncio.Event(), asyncio.Event()

    async def send(self, message: Message) -> None:
        """ASGI's `send`. Returns when the messages are few, or have been taken."""
        self._messages.append(message)
        self._bytes += len(message.get("body", b""))
        self._changed.set()
        while self._bytes > _BATCH_BYTES:
            self._taken.clear()
            await self._taken.wait()

    async def until_done(self, app: asyncio.Future[None]) -> AsyncGenerator[list[Message]]:
        """The batches of `app`. Each has all messages since the last one."""
        app.add_done_callback(lambda _: self._changed.set())
        while not app.done() or self._messages:
            await self._changed.wait()
            self._changed.clear()
            batch, self._messages, self._bytes = self._messages, [], 0
            self._taken.set()
            if batch:
                yield batch
