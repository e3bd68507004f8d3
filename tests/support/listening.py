"""A server in this process, on a port that others can reach: the app of `serving`, whose model is a script."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

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
    """The address and the parts of a server, for as long as the block runs; `options` are those of `serving`.

    Args:
        connection_timeout: seconds for a head to come, and for what waits to be read.
        refused: gets the codes of connections that were closed.
        send_buffer: bytes that the system takes of an answer before it is read; None: as many as it likes.
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
            config = HttpConfig(
                server.app,
                client_timeout=connection_timeout,
                on_refused=refused.append,
                h11_max_incomplete_event_size=4096,
                log_level="critical",
                lifespan="off",
                timeout_graceful_shutdown=0,
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
