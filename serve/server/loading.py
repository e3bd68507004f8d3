"""Answers of the server while the model is loaded and compiled."""

import asyncio
import html
import socket
import threading
import time
from typing import Any, Self

import uvicorn
from starlette.responses import HTMLResponse, Response
from starlette.types import Receive, Scope, Send

from serve.api.errors import APIError
from serve.api.middleware import route_path
from serve.config.config import ServeConfig
from serve.server.console import Reporter
from serve.server.http_protocol import HttpConfig

# Clients connect again, to the server that follows.
_HEADERS = {"Retry-After": "5", "Connection": "close", "Cache-Control": "no-store"}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_CLOSE_SECONDS = 1  # for the last requests
_POLL_SECONDS = 0.02
_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="2">
<title>logprobd: loading</title>
<style>
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }
body { max-width: 36rem; margin: 20vh auto; padding: 0 1rem }
</style>
<h1>The model is being loaded</h1>
<p>The server loads the model's weights and compiles its programs. The first start of a model can take minutes, later
ones take seconds. This page reloads itself.</p>
<p role="status">PHASE</p>
</html>
"""


class LoadingServer(uvicorn.Server):
    """Context in which a thread answers on a listening socket: 503 for every path but /live, and a page at "/"."""

    def __init__(self, listener: socket.socket, config: ServeConfig, reporter: Reporter) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await _response(scope, reporter.phase)(scope, receive, send)

        super().__init__(
            HttpConfig(app, config, on_refused=lambda _: None, lifespan="off", timeout_graceful_shutdown=_CLOSE_SECONDS)
        )
        self._listener = listener.dup()  # closed at the end, unlike the listener itself
        self._stop = threading.Event()
        self._closed = threading.Event()  # no connection is accepted any more

    def __enter__(self) -> Self:
        # Not a daemon: the process waits for the last answers if loading fails.
        threading.Thread(target=self._run, name="loading-server").start()
        return self

    def __exit__(self, *_: object) -> None:
        """Return when no connection is accepted any more. The thread ends by itself after its last answers."""
        self._stop.set()
        self._closed.wait()

    def _run(self) -> None:
        try:
            self.run([self._listener])
        finally:
            self._closed.set()

    async def main_loop(self) -> None:
        await self.on_tick(0)  # sets the Date header
        await asyncio.to_thread(self._stop.wait)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        self._closed.set()
        # Connections that were accepted before may still send their request. Every response closes its connection.
        deadline = time.monotonic() + _CLOSE_SECONDS
        await asyncio.sleep(_POLL_SECONDS)
        while self.server_state.connections and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        await super().shutdown(sockets)


def _response(scope: Scope, phase: str) -> Response:
    path, headers = route_path(scope), dict[str, Any](_HEADERS)
    if path == "/live":
        return Response(headers={"Connection": "close"})
    if path in ("/health", "/ready", "/ping"):
        return Response(status_code=503, headers=headers)
    if path in ("", "/"):
        page = _PAGE.replace("PHASE", html.escape(phase.capitalize()))
        return HTMLResponse(page, 503, headers | {"Content-Security-Policy": _POLICY})
    return APIError(503, "The model is still being loaded.", None, "not_ready", headers).response(route_path(scope))
