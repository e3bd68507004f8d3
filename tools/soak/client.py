"""Client: sends one request as it is meant to behave, and keeps what came and when. It never tries again."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import httpx2

from tools.soak.ask import Ask, Manner

# Below the five seconds after which the server closes a connection that nobody uses: a request that is sent just then
# would fail, which is nobody's fault.
_KEPT_OPEN = 2.0
# Small, so that a server feels it when a client does not read.
_RECEIVED = (socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)


@dataclass(slots=True)
class Answer:
    """What came of a request."""

    request_id: str
    begun: float
    status: int | None = None  # None: nothing came
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: list[tuple[float, bytes]] = field(default_factory=list)  # when each came
    left: bool = False  # the client has gone away, as it meant to
    failure: str | None = None  # how it broke, as the client saw it

    @property
    def body(self) -> bytes:
        """All that came."""
        return b"".join(piece for _, piece in self.pieces)


class _LeftError(Exception):
    """The client goes away."""


def connect(url: str) -> httpx2.AsyncClient:
    """Connections to a server, as many as there are requests at once; time limits are for those who send."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEPT_OPEN)
    transport = httpx2.AsyncHTTPTransport(limits=limits, socket_options=[_RECEIVED])
    return httpx2.AsyncClient(base_url=url, timeout=None, transport=transport)


async def send(http: httpx2.AsyncClient, ask: Ask, request_id: str, timeout: float) -> Answer:
    """Sends a request; after `timeout` seconds it hangs, which is a failure."""
    answer = Answer(request_id, time.perf_counter())
    try:
        async with asyncio.timeout(timeout):
            await _exchange(http, ask, answer)
    except _LeftError:
        answer.left = True
    except TimeoutError:
        answer.failure = f"it hangs: no end after {timeout:.0f} s"
    except httpx2.HTTPError as error:
        answer.failure = f"{type(error).__name__}: {error}"
    return answer


async def _exchange(http: httpx2.AsyncClient, ask: Ask, answer: Answer) -> None:
    if ask.manner is not Manner.LEAVES_WAITING:
        await _read(http, ask, answer)
        return
    try:
        async with asyncio.timeout(ask.patience):
            await _read(http, ask, answer)
    except TimeoutError:
        raise _LeftError from None


async def _read(http: httpx2.AsyncClient, ask: Ask, answer: Answer) -> None:
    headers = {"content-type": "application/json", **ask.headers, "x-request-id": answer.request_id}
    content = _content(ask)
    if ask.manner is Manner.LEAVES_SENDING:
        headers["content-length"] = str(len(content))
    method, sent = ("GET", None) if ask.is_get else ("POST", _sent(ask, content))
    async with http.stream(method, ask.path, content=sent, headers=headers) as response:
        answer.status, answer.headers = response.status_code, response.headers
        async for piece in response.aiter_bytes():
            answer.pieces.append((time.perf_counter(), piece))
            if ask.manner is Manner.LEAVES_READING and len(answer.pieces) >= ask.patience:
                raise _LeftError
            if ask.manner is Manner.READS_SLOWLY:
                await asyncio.sleep(ask.patience)


def _content(ask: Ask) -> bytes:
    if isinstance(ask.body, bytes):
        return ask.body
    return b"" if ask.body is None else json.dumps(ask.body).encode()


def _sent(ask: Ask, content: bytes) -> bytes | AsyncIterator[bytes]:
    return _torn(content, ask.patience) if ask.manner is Manner.LEAVES_SENDING else content


async def _torn(content: bytes, share: float) -> AsyncIterator[bytes]:
    """The beginning of a body, after which the client goes away once the server has had the time to read it."""
    yield content[: int(share * len(content))]
    await asyncio.sleep(share / 10)
    raise _LeftError
