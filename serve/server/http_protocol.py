"""HTTP/1.1 by uvicorn, with limits on how long a client may occupy a connection without using it."""

import asyncio
import ssl
import sys
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.api.errors import APIError
from serve.config.config import ServeConfig


class HttpConfig(uvicorn.Config):
    """uvicorn's configuration with the limits of GuardedProtocol."""

    def __init__(self, app: Any, config: ServeConfig, *, on_refused: Callable[[str], None], **options: Any) -> None:
        """`on_refused` gets the error code of each request that is rejected before the app; `options` are uvicorn's."""
        super().__init__(
            app,
            http=GuardedProtocol,
            ws="none",
            log_config=None,  # uvicorn's logs go to the common handler
            log_level=config.uvicorn_log_level,
            access_log=False,
            timeout_keep_alive=config.timeout_keep_alive,
            h11_max_incomplete_event_size=config.h11_max_incomplete_event_size,
            root_path=config.root_path,
            ssl_keyfile=config.ssl_keyfile,
            ssl_certfile=config.ssl_certfile,
            ssl_ca_certs=config.ssl_ca_certs and str(config.ssl_ca_certs),
            ssl_cert_reqs=ssl.CERT_REQUIRED if config.ssl_ca_certs else ssl.CERT_NONE,
            **options,
        )
        self.client_timeout = config.client_timeout
        self.on_refused = on_refused


class GuardedProtocol(H11Protocol):
    config: HttpConfig
    _head_timer: asyncio.TimerHandle | None = None  # runs while a request's line and headers are incomplete
    _read_timer: asyncio.TimerHandle | None = None  # runs while output is buffered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Stop the timer when the headers are complete; start it at the first byte of a next request."""
        super().data_received(data)
        if self._is_answering():
            _cancel(self._head_timer)
            self._head_timer = None
        elif self._head_timer is None and not self.transport.is_closing():
            self._start_head_timer()

    def on_response_complete(self) -> None:
        """Start the timers for a pipelined request that is incomplete, and for output that is not read yet."""
        super().on_response_complete()
        if not self._is_answering() and self.conn.trailing_data[0] and not self.transport.is_closing():
            self._start_head_timer()
        if self._read_timer is None and self.transport.get_write_buffer_size():
            self._start_read_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._head_timer)
        _cancel(self._read_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_read_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer an invalid request in OpenAI's error envelope. Called by uvicorn from an `except` block."""
        cause, error = sys.exception(), APIError(400, msg, None, "invalid_http")
        if isinstance(cause, h11.RemoteProtocolError) and cause.error_status_hint == 431:
            error = APIError(431, "The request's line and headers are too large.", None, "headers_too_large")
        self.config.on_refused(error.code or "")
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # a response is under way
            self.transport.close()
            return
        response = error.response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        events = (h11.Response(status_code=error.status, headers=headers), h11.Data(data=bytes(response.body)))
        for event in (*events, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: clients could fill the log."""

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_head_timer(self) -> None:
        _cancel(self._head_timer)
        self._head_timer = self.loop.call_later(self.config.client_timeout, self._abort, "header_timeout")

    def _start_read_timer(self) -> None:
        _cancel(self._read_timer)
        size = self.transport.get_write_buffer_size()

        def check() -> None:
            self._read_timer = None
            unread = self.transport.get_write_buffer_size()
            # While the app writes, the buffer may stay as full although the client reads.
            may_grow = self._is_answering() and not self.flow.write_paused
            if unread and unread >= size and not may_grow:
                self._abort("stalled_reader")
            elif unread:
                self._start_read_timer()

        self._read_timer = self.loop.call_later(self.config.client_timeout, check)

    def _abort(self, code: str) -> None:
        """Close the connection and drop buffered output, for which `close` would wait."""
        self.config.on_refused(code)
        self.transport.abort()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
