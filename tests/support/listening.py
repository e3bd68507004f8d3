"""An in-process server on a real port: the app of `serving` with its scripted model."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from serve.config.config import ServeConfig
from serve.server.http_protocol import HttpConfig
from tests.support.http_client import Server, serving


@contextmanager
def listening(
    port: int = 0,
    *,
    connection_timeout: float = 60,
    refused: list[str] | None = None,
    send_buffer: int | None = None,
    **options: Any,
) -> Iterator[tuple[str, Server]]:
    """Yield address and `Server` of a running server; `options` are those of `serving`.

    Args:
        connection_timeout: client_timeout, seconds.
        refused: receives the error codes of closed connections.
        send_buffer: SO_SNDBUF, bytes; None: the system's default.
    """
    refused = [] if refused is None else refused
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    ready, parts = threading.Event(), []
    uvicorns: list[uvicorn.Server] = []

    async def serve() -> None:
        async with serving(**options) as server:
            limits = ServeConfig(
                client_timeout=connection_timeout,
                h11_max_incomplete_event_size=4096,
                uvicorn_log_level="critical",
                root_path=options.get("root_path", ""),
            )
            config = HttpConfig(
                server.app, limits, on_refused=refused.append, lifespan="off", timeout_graceful_shutdown=0
            )
            uvicorns.append(uvicorn.Server(config))
            parts.append(server)
            ready.set()
            await uvicorns[0].serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(20)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", parts[0]
    finally:
        uvicorns[0].should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()
