"""Connections whose client sends no request or reads no response: they are closed, and do not affect others."""

import json
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import h11
import httpx2
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from serve.config.config import ServeConfig
from serve.config.flags import parse_args
from serve.server.http_protocol import GuardedProtocol, HttpConfig
from tests.support.http_client import completion_body
from tests.support.listening import listening

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n"


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """All bytes until the server closes the connection."""
    data = b""
    try:
        while piece := connection.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        pass
    return data


def error_in(answer: bytes) -> tuple[int, str]:
    """Status and code of a response in OpenAI's error envelope."""
    head, _, body = answer.partition(b"\r\n\r\n")
    match = re.match(rb"HTTP/1\.1 (\d+) ", head)
    assert match is not None, answer
    assert b"application/json" in head
    return int(match[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"nonsense\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "invalid_http"),  # no host
        (HEAD + b"Content-Length: many\r\n\r\n", 400, "invalid_http"),
        (HEAD + b"X-Long: " + b"x" * 5000, 431, "headers_too_large"),
        (b"GET /" + b"x" * 5000, 431, "headers_too_large"),
    ],
)
def test_invalid_request_gets_the_error_envelope(sent: bytes, status: int, code: str) -> None:
    refused: list[str] = []
    with listening(refused=refused) as (url, _), connected(url) as connection:
        connection.sendall(sent)
        assert error_in(read_all(connection)) == (status, code)
    assert refused == [code]


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", HEAD])
def test_incomplete_head_closes_the_connection(sent: bytes) -> None:
    refused: list[str] = []
    with listening(connection_timeout=0.1, refused=refused) as (url, _), connected(url) as connection:
        connection.sendall(sent)
        assert read_all(connection) == b""
    assert refused == ["header_timeout"]


def test_incomplete_head_of_a_second_request_closes_the_connection() -> None:
    refused: list[str] = []
    with listening(connection_timeout=0.1, refused=refused) as (url, _), connected(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /hea")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")
    assert refused == ["header_timeout"]


def test_incomplete_body_gets_408() -> None:
    with listening(client_timeout=0.1) as (url, server), connected(url) as connection:
        connection.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"prompt": ')
        assert error_in(read_all(connection)) == (408, "request_timeout")
        assert server.engine.num_requests == 0


def test_request_in_single_bytes_is_answered() -> None:
    body = json.dumps(completion_body()).encode()
    with listening() as (url, _), connected(url) as connection:
        for byte in HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body:
            connection.sendall(bytes([byte]))
        assert b'"text":"Hello"' in read_all(connection)


def stalled(url: str, body: dict[str, Any], until: Callable[[], bool]) -> socket.socket:
    """Send a request and read nothing until `until` is true; other clients are served meanwhile."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = url.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    data = json.dumps(body).encode()
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    end = time.monotonic() + 30
    with httpx2.Client(base_url=url) as client:
        while not until():
            assert time.monotonic() < end, "the server has not closed the connection"
            assert client.post("/v1/completions", json=completion_body()).status_code == 200
    return connection


def test_stalled_reader_of_a_long_response_is_closed() -> None:
    refused: list[str] = []
    prompt = [10] * 20_000
    with listening(script=None, connection_timeout=0.2, refused=refused, max_model_len=30_000, pages=1000) as (
        url,
        server,
    ):
        body = completion_body(prompt=prompt, max_tokens=1, prompt_logprobs=3)
        with stalled(url, body, lambda: refused == ["stalled_reader"]):
            pass
        assert server.engine.num_requests == 0


def test_stalled_reader_of_a_response_below_the_high_water_mark_is_closed() -> None:
    refused: list[str] = []
    body = completion_body(prompt=[10] * 300, max_tokens=1, prompt_logprobs=3)
    with listening(script=None, connection_timeout=0.2, refused=refused, send_buffer=4096) as (url, server):
        answer = httpx2.post(f"{url}/v1/completions", json=body).content
        assert 32_000 < len(answer) < 1 << 16  # asyncio's high-water mark
        with stalled(url, body, lambda: refused == ["stalled_reader"]):
            pass
        assert server.engine.num_requests == 0


def test_slow_reader_is_not_closed() -> None:
    refused: list[str] = []
    timers: list[Callable[[], None]] = []
    protocol: Any = GuardedProtocol.__new__(GuardedProtocol)  # with stand-ins for its attributes
    protocol.config = SimpleNamespace(limits=ServeConfig(client_timeout=60), on_refused=refused.append)
    timer = SimpleNamespace(cancel=lambda: None)

    def call_later(_: float, call: Callable[[], None], *__: object) -> SimpleNamespace:
        timers.append(call)
        return timer

    protocol.loop = SimpleNamespace(call_later=call_later)
    protocol.cycle = SimpleNamespace(response_complete=False)
    protocol.flow = SimpleNamespace(write_paused=True)
    unread = [100_000]
    aborted: list[bool] = []
    protocol.transport = SimpleNamespace(get_write_buffer_size=lambda: unread[0], abort=lambda: aborted.append(True))
    protocol._start_read_timer()
    for unread[0] in (99_999, 50_000, 20_000):
        timers.pop()()
        assert not aborted
    protocol.flow.write_paused = False  # the app writes, so the buffer may stay as full although the client reads
    timers.pop()()
    assert not aborted
    protocol.cycle.response_complete = True
    timers.pop()()  # nothing was read or written since
    assert (aborted, refused, timers) == ([True], ["stalled_reader"], [])
    unread[0] = 0
    protocol._start_read_timer()
    timers.pop()()  # everything is read
    assert (aborted, timers) == ([True], [])


@pytest.mark.parametrize(("flags", "seconds"), [((), 75), (("--timeout-keep-alive", "7"), 7)])
async def test_idle_connection_stays_open_for_timeout_keep_alive(flags: tuple[str, ...], seconds: int) -> None:
    config = HttpConfig(None, parse_args(flags, {}), on_refused=lambda _: None, lifespan="off")
    config.load()
    assert GuardedProtocol(config, ServerState(), {}).timeout_keep_alive == seconds


@dataclass
class ParserWork:
    events: int = 0
    events_of_calls: list[int] = field(default_factory=list)  # of the protocol's handle_events
    early_reads: int = 0  # while received data was still to be parsed


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> ParserWork:
    """The work of all parsers."""
    work = ParserWork()
    next_event, handle_events = h11.Connection.next_event, H11Protocol.handle_events
    data_received = H11Protocol.data_received

    def counted_event(connection: h11.Connection) -> Any:
        work.events += 1
        return next_event(connection)

    def counted_call(protocol: H11Protocol) -> None:
        before = work.events
        handle_events(protocol)
        work.events_of_calls.append(work.events - before)

    monkeypatch.setattr(h11.Connection, "next_event", counted_event)

    def counted_read(protocol: GuardedProtocol, data: bytes) -> None:
        work.early_reads += protocol.flow.has_backlog
        data_received(protocol, data)

    monkeypatch.setattr(H11Protocol, "handle_events", counted_call)
    monkeypatch.setattr(H11Protocol, "data_received", counted_read)
    return work


def chunks(data: bytes, size: int = 1) -> bytes:
    parts = (data[start : start + size] for start in range(0, len(data), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (HEALTH, 200),
        (HEAD.replace(b"json", b"text"), 400),
        (HEAD.replace(b"/v1/", b"/"), 404),
        (b"POST" + HEALTH[3:], 405),
    ],
)
def test_body_that_is_not_read_is_dropped_unparsed(work: ParserWork, head: bytes, status: int) -> None:
    with listening() as (url, _), connected(url) as connection:
        connection.sendall(head + CHUNKED + chunks(b"x" * 100_000))
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nconnection: close\r\n" in answer
    assert work.events < 500


def test_client_that_still_sends_gets_the_answer() -> None:
    with listening() as (url, _), connected(url) as connection:
        connection.sendall(HEAD.replace(b"json", b"text") + b"Content-Length: 8000000\r\n\r\n")
        assert error_in(read_all(connection)) == (400, "invalid_content_type")
        connection.sendall(b"x" * 8_000_000)  # raises after a reset


def test_client_that_sends_without_end_is_disconnected() -> None:
    with listening() as (url, _), connected(url) as connection:
        connection.sendall(HEALTH + CHUNKED)
        with pytest.raises(ConnectionError):
            connection.sendall(b"x" * (64 << 20))


def test_body_in_small_chunks_is_parsed_in_parts(work: ParserWork) -> None:
    body = json.dumps(completion_body()).encode()
    with listening() as (url, _), connected(url) as connection:
        connection.sendall(HEAD + b"Connection: close\r\n" + CHUNKED + chunks(body + b" " * 5000) + b"0\r\n\r\n")
        assert b'"text":"Hello"' in read_all(connection)
    assert max(work.events_of_calls) == 64


def test_nothing_is_read_while_received_chunks_wait(work: ParserWork) -> None:
    body = json.dumps(completion_body()).encode() + b" " * 1_500_000
    with listening() as (url, _), connected(url) as connection:
        connection.sendall(HEAD + b"Connection: close\r\n" + CHUNKED + chunks(body, 100) + b"0\r\n\r\n")
        assert b'"text":"Hello"' in read_all(connection)
    assert work.early_reads == 0


def test_body_of_too_many_small_chunks_is_refused(work: ParserWork) -> None:
    refused: list[str] = []
    with listening(refused=refused) as (url, server), connected(url) as connection:
        connection.sendall(HEAD + CHUNKED + chunks(b" " * 50_000))
        assert error_in(read_all(connection)) == (400, "invalid_http")
        assert server.engine.num_requests == 0
    assert refused == ["invalid_http"]
    assert work.events < 17_000


def test_request_with_two_lengths_closes_the_connection() -> None:
    with listening() as (url, _), connected(url) as connection:
        connection.sendall(HEALTH + b"Content-Length: 100\r\n" + CHUNKED + b"0\r\n\r\n" + HEALTH + b"\r\n")
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nconnection: close\r\n" in answer
