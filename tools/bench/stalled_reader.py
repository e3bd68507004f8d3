"""What a client that reads nothing costs the others: their rate beside it, against that beside one that reads."""

import asyncio
import json
import socket
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx2

_PAIRS = 5
_WINDOW = 4096  # bytes that the system takes for a client that does not read


@dataclass(frozen=True, slots=True)
class Beside:
    """Tokens a second of all other streams together, each the median of five rounds in turn."""

    read: float
    unread: float

    @property
    def ratio(self) -> float:
        """1: it costs them nothing."""
        return self.unread / self.read


async def beside_a_reader(
    client: httpx2.AsyncClient, body: dict[str, object], measure: Callable[[], Awaitable[float]]
) -> Beside:
    """Measures the others while one stream runs that is read, and while one does that is not.

    Args:
        body: of that stream. Its first event has to be larger than what both sides' systems take in, and it has to
            run for as long as `measure` takes.
        measure: runs the others, and gives their rate.

    Raises:
        OSError: there is no such stream.
    """
    rates: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(_PAIRS):
        for reads in (True, False):
            async with _stream(client.base_url, body, reads=reads):
                rates[reads].append(await measure())
    return Beside(statistics.median(rates[True]), statistics.median(rates[False]))


@asynccontextmanager
async def _stream(address: httpx2.URL, body: dict[str, object], *, reads: bool) -> AsyncIterator[None]:
    """A stream that has begun to answer; it is broken off in the end."""
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
