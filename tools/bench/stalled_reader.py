"""Effect of a client that does not read on other streams, relative to one that reads."""

import asyncio
import json
import socket
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx2

_PAIRS = 5
_WINDOW = 4096  # receive buffer of the client that does not read, bytes


@dataclass(frozen=True, slots=True)
class Rates:
    """Total tokens/s of the other streams; medians of five alternating rounds."""

    read: float
    unread: float

    @property
    def ratio(self) -> float:
        """1 means no effect."""
        return self.unread / self.read


async def rates_next_to_reader(
    client: httpx2.AsyncClient, body: dict[str, object], measure: Callable[[], Awaitable[float]]
) -> Rates:
    """Measure other streams next to a stream that is read, and next to one that is not.

    Args:
        body: of that stream. Its first event must overflow the socket buffers, and it must run longer than `measure`.
        measure: runs the other streams and returns their rate.

    Raises:
        OSError: the server does not stream `body`.
    """
    rates: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(_PAIRS):
        for reads in (True, False):
            async with _stream(client.base_url, body, reads=reads):
                rates[reads].append(await measure())
    return Rates(statistics.median(rates[True]), statistics.median(rates[False]))


@asynccontextmanager
async def _stream(address: httpx2.URL, body: dict[str, object], *, reads: bool) -> AsyncIterator[None]:
    """A stream whose response has started; the connection is closed at the end."""
    connection = socket.socket()
    connection.setblocking(False)
    if not reads:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WINDOW)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(connection, (address.host, address.port))
        data = json.dumps(body | {"stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.host}\r\nContent-Type: application/json\r\n"
        await loop.sock_sendall(connection, f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        if not (await loop.sock_recv(connection, 12)).endswith(b"200"):
            raise ConnectionError("the server does not stream this")
        reading = asyncio.create_task(_read(connection)) if reads else None
        yield
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
    finally:
        connection.close()


async def _read(connection: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(connection, 1 << 16):
        pass
