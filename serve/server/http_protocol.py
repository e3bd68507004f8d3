"""GuardedProtocol: uvicorn's HTTP/1.1, which gives a connection up that its client holds without using it."""

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.api.errors import APIError


class HttpConfig(uvicorn.Config):
    """uvicorn's configuration, and what the protocol needs beside it."""

    def __init__(self, app: Any, *, client_timeout: float, on_refused: Callable[[str], None], **others: Any) -> None:
        """Configures a server.

        Args:
            client_timeout: seconds for a request's line and headers to come, and for some of what waits to be read.
            on_refused: is told, by a code, of what no app is asked about.
        """
        super().__init__(app, http=GuardedProtocol, ws="none", **others)
        self.client_timeout = client_timeout
        self.on_refused = on_refused


class GuardedProtocol(H11Protocol):
    """One connection."""

    config: HttpConfig
    _until_head: asyncio.TimerHandle | None = None  # a request's line and headers are awaited
    _until_read: asyncio.TimerHandle | None = None  # the client is to read what fills the buffer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        if self._is_answering():
            self._stop_waiting_for_head()
        elif self._until_head is None and not self.transport.is_closing():
            self._await_head()

    def on_response_complete(self) -> None:
        """Pipelined bytes of a next request may be here already."""
        super().on_response_complete()
        if not self._is_answering() and self.conn.trailing_data[0] and not self.transport.is_closing():
            self._await_head()
        if self._until_read is None and self.transport.get_write_buffer_size():
            self._await_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._stop_waiting_for_head()
        self._stop_waiting_for_reader()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See asyncio.Protocol: the buffer is full."""
        super().pause_writing()
        self._await_reader()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn among the handlers of what is wrong with the request."""
        cause = sys.exception()
        too_large = isinstance(cause, h11.RemoteProtocolError) and cause.error_status_hint == 431
        error = (
            APIError(431, "The request's line and headers are too large.", None, "headers_too_large")
            if too_large
            else APIError(400, msg, None, "invalid_http")
        )
        self.config.on_refused(error.code or "")
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in the middle of an answer
            self.transport.close()
            return
        answer = error.response()
        headers = [*answer.raw_headers, (b"connection", b"close")]
        events = (h11.Response(status_code=error.status, headers=headers), h11.Data(data=bytes(answer.body)))
        for event in (*events, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Each request could fill the log with it."""

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._stop_waiting_for_head()
        self._until_head = self.loop.call_later(self.config.client_timeout, self._abandon, "header_timeout")

    def _await_reader(self) -> None:
        self._stop_waiting_for_reader()
        unread = self.transport.get_write_buffer_size()

        def look() -> None:
            self._until_read = None
            left = self.transport.get_write_buffer_size()
            # While it is written to, the client may read and as much wait all the same.
            adds = self._is_answering() and not self.flow.write_paused
            if left and left >= unread and not adds:
                self._abandon("stalled_reader")
            elif left:
                self._await_reader()

        self._until_read = self.loop.call_later(self.config.client_timeout, look)

    def _stop_waiting_for_head(self) -> None:
        if self._until_head is not None:
            self._until_head.cancel()
            self._until_head = None

    def _stop_waiting_for_reader(self) -> None:
        if self._until_read is not None:
            self._until_read.cancel()
            self._until_read = None

    def _abandon(self, code: str) -> None:
        """Drops what the buffer holds: closing would wait for it to be read."""
        self.config.on_refused(code)
        self.transport.abort()
