"""HTTP/1.1 by uvicorn, with limits on how long a client may occupy a connection, and on the work its bytes cause."""

import asyncio
import ssl
import sys
from collections.abc import Callable
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.api.errors import APIError
from serve.config.config import ServeConfig

_MAX_EVENTS = 64  # of a connection's parser per iteration of the event loop, about 0.5 ms
_MAX_CHUNKS, _CHUNK_BYTES = 1 << 14, 512  # chunks of any body, and average size of more


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
        self.limits = config
        self.on_refused = on_refused


class _Connection(h11.Connection):
    """h11 with bounds on its events. A response to an incomplete or ambiguous request closes the connection."""

    def __init__(self, max_incomplete_event_size: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size)
        self.remaining_events = 0  # until the caller sets it again
        self._chunks = self._body_bytes = 0
        self._has_two_lengths = False  # Transfer-Encoding and Content-Length: a proxy may use the other

    @property
    def is_request_incomplete(self) -> bool:
        return self.their_state in (h11.SEND_BODY, h11.ERROR)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if not self.remaining_events:
            return h11.NEED_DATA
        self.remaining_events -= 1
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._body_bytes = 0
            self._has_two_lengths = {b"transfer-encoding", b"content-length"} <= {name for name, _ in event.headers}
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_end
            self._body_bytes += len(event.data)
            if self._chunks > _MAX_CHUNKS + self._body_bytes // _CHUNK_BYTES:
                raise h11.RemoteProtocolError("too many small chunks")
        return event

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        if isinstance(event, h11.Response) and (self._has_two_lengths or self.is_request_incomplete):
            headers = [(name, value) for name, value in event.headers if name != b"connection"]
            headers.append((b"connection", b"close"))
            event = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        return super().send_with_data_passthrough(event)


class _Flow(FlowControl):
    """Flow control that reads nothing while received bytes wait to be parsed."""

    has_backlog = False

    def resume_reading(self) -> None:
        if not self.has_backlog:
            super().resume_reading()


class _Transport:
    """A transport whose `close` first drops the rest of a request: a TCP reset could destroy the answer."""

    def __init__(self, transport: asyncio.Transport, conn: _Connection, limits: ServeConfig) -> None:
        self._transport = transport
        self._conn = conn
        self._limits = limits
        self.is_dropping = False
        self._dropped_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.is_dropping or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing() or not self._conn.is_request_incomplete:
            self._transport.close()
            return
        self.is_dropping = True
        self._timer = asyncio.get_running_loop().call_later(self._limits.client_timeout, self._transport.abort)
        if self._transport.can_write_eof():  # not with TLS
            self._transport.write_eof()
        self._transport.resume_reading()

    def drop(self, size: int) -> None:
        self._dropped_bytes += size
        if self._dropped_bytes > self._limits.max_body_bytes:
            self._transport.abort()

    def connection_lost(self) -> None:
        _cancel(self._timer)


class GuardedProtocol(H11Protocol):
    config: HttpConfig
    conn: _Connection
    flow: _Flow
    _head_timer: asyncio.TimerHandle | None = None  # runs while a request's line and headers are incomplete
    _read_timer: asyncio.TimerHandle | None = None  # runs while output is buffered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        self.conn = _Connection(self.config.limits.h11_max_incomplete_event_size)
        self._closing_transport = _Transport(transport, self.conn, self.config.limits)
        super().connection_made(cast("asyncio.Transport", self._closing_transport))
        self.flow = _Flow(self.transport)
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Stop the timer when the headers are complete; start it at the first byte of a next request."""
        if self._closing_transport.is_dropping:
            self._closing_transport.drop(len(data))
            return
        super().data_received(data)
        if self._is_answering():
            _cancel(self._head_timer)
            self._head_timer = None
        elif self._head_timer is None and not self.transport.is_closing():
            self._start_head_timer()

    def handle_events(self) -> None:
        """Parse a bounded number of events; more of them wait for the next iteration of the event loop."""
        self.conn.remaining_events = _MAX_EVENTS
        super().handle_events()
        if not self.conn.remaining_events and not self.flow.has_backlog and not self.transport.is_closing():
            self.flow.pause_reading()
            self.flow.has_backlog = True
            self.loop.call_soon(self._handle_backlog)

    def _handle_backlog(self) -> None:
        if not self.flow.has_backlog or self.transport.is_closing():
            return
        self.flow.has_backlog = False
        self.handle_events()
        if len(self.cycle.body) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()

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
        self._closing_transport.connection_lost()
        self.flow.has_backlog = False
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if self._closing_transport.is_dropping:
            self.transport.close()
        else:
            super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_read_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer an invalid request in OpenAI's error envelope. Called by uvicorn from an `except` block."""
        cause, error = sys.exception(), APIError(400, msg, None, "invalid_http")
        if isinstance(cause, h11.RemoteProtocolError) and cause.error_status_hint == 431:
            error = APIError(431, "The request's line and headers are too large.", None, "headers_too_large")
        self.config.on_refused(error.code or "")
        if self.cycle is not None:  # for an app that reads the body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # a response is under way
            self.transport.abort()
            return
        response = error.response()
        events = (
            h11.Response(status_code=error.status, headers=response.raw_headers),
            h11.Data(data=bytes(response.body)),
        )
        for event in (*events, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: clients could fill the log."""

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_head_timer(self) -> None:
        _cancel(self._head_timer)
        self._head_timer = self.loop.call_later(self.config.limits.client_timeout, self._abort, "header_timeout")

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

        self._read_timer = self.loop.call_later(self.config.limits.client_timeout, check)

    def _abort(self, code: str) -> None:
        """Close the connection and drop buffered output, for which `close` would wait."""
        self.config.on_refused(code)
        self.transport.abort()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
