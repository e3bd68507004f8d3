"""How a server ends: at a signal, at a second one, when its engine is lost or hangs. Real processes and signals."""

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import httpx2
import pytest

from serve.server import lifecycle
from tests.support.certificates import Certificates
from tests.support.faulty_server import FAIL, HANG, LOSE, SLOW, STUCK, FaultyServer

SECONDS = 30
ENDLESS = {"prompt": [SLOW, 10], "max_tokens": 400, "stream": True, "ignore_eos": True}


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    process = FaultyServer("--shutdown-timeout", "20")
    yield process
    process.process.kill()
    process.terminate()


def post(server: FaultyServer, *prompt: int) -> httpx2.Response:
    return httpx2.post(f"{server.url}/v1/completions", json={"prompt": [*prompt, 10], "max_tokens": 4}, timeout=SECONDS)


@contextmanager
def streaming(server: FaultyServer, **fields: object) -> Iterator[Iterator[str]]:
    """The lines of a stream that has begun."""
    with (
        httpx2.Client(base_url=server.url, timeout=SECONDS) as client,
        client.stream("POST", "/v1/completions", json=ENDLESS | fields) as response,
    ):
        assert response.status_code == 200
        lines = (line for line in response.iter_lines() if line)
        assert next(lines).startswith("data: {")
        yield lines


def wait_until_draining(server: FaultyServer, tls: ssl.SSLContext | None = None) -> None:
    """Returns when /health says that the server is not ready."""
    with httpx2.Client(base_url=server.url, timeout=SECONDS, verify=tls or True) as client:
        while client.get("/health").status_code != 503:
            pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_at_a_signal_running_streams_end_and_new_requests_are_refused(server: FaultyServer, number: int) -> None:
    with streaming(server, max_tokens=100) as lines:
        server.process.send_signal(number)
        wait_until_draining(server)
        refused = post(server)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_stopped")
        assert refused.headers["retry-after"]
        *chunks, last, done = lines
        assert len(chunks) == 98
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert done == "data: [DONE]"
    assert server.process.wait(SECONDS) == 0


def test_what_does_not_end_in_time_is_told_so() -> None:
    server = FaultyServer("--shutdown-timeout", "0")
    with streaming(server) as lines:
        server.process.send_signal(signal.SIGTERM)
        *_, last, done = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_stopped"
        assert done == "data: [DONE]"
    assert server.process.wait(SECONDS) == 0
    server.terminate()


@pytest.mark.parametrize("encrypted", [False, True])
def test_an_answer_that_is_still_being_read_is_waited_for(encrypted: bool, tmp_path: Path) -> None:
    certificates = Certificates.made_in(tmp_path) if encrypted else None
    server = FaultyServer("--shutdown-timeout", "20", *(certificates.flags() if certificates else ()))
    tls = certificates.trusting() if certificates else None
    body = {"prompt": [10] * 400, "max_tokens": 1, "prompt_logprobs": 3, "n": 128, "stream": False}
    with killed(server), sending(server, body, receive_buffer=4096, tls=tls) as connection:
        head = connection.recv(1000)
        size = int(re.findall(rb"content-length: (\d+)", head)[0])
        assert size > 8 << 20  # more than a system's buffers
        server.process.send_signal(signal.SIGTERM)
        wait_until_draining(server, tls)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(3)  # which is longer than the last bytes of an answer get
        rest = head.partition(b"\r\n\r\n")[2]
        while len(rest) < size and (piece := connection.recv(1 << 20)):
            rest += piece
        assert len(rest) == size
        assert len(json.loads(rest)["choices"]) == 128
        assert server.process.wait(SECONDS) == 0


def test_what_never_ends_in_a_thread_of_the_pool_does_not_keep_the_process() -> None:
    server = FaultyServer("--shutdown-timeout", "0")
    threads = min(32, (getattr(os, "process_cpu_count", os.cpu_count)() or 1) + 4)
    end = time.monotonic() + SECONDS
    with killed(server), ExitStack() as stack:
        for _ in range(threads + 2):
            stack.enter_context(sending(server, {"prompt": STUCK}))
        while "".join(server.log).count(STUCK) < threads:
            assert time.monotonic() < end
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SECONDS) == 0


@contextmanager
def killed(server: FaultyServer) -> Iterator[None]:
    """Whatever becomes of the block, the process ends."""
    try:
        yield
    finally:
        server.process.kill()
        server.terminate()


@contextmanager
def sending(
    server: FaultyServer, body: object, *, receive_buffer: int | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[socket.socket]:
    """A connection over which a request was sent."""
    data = json.dumps(body).encode()
    host, port = server.url.partition("://")[2].split(":")
    with socket.socket() as connection:
        connection.settimeout(SECONDS)
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect((host, int(port)))
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        with tls.wrap_socket(connection, server_hostname=host) if tls else nullcontext(connection) as client:
            client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            yield client


def test_memory_is_given_back_once_in_each_quiet_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    quiet = lifecycle._Quiet()

    def after(seconds: float, running: int, ended: int) -> bool:
        now[0] += seconds
        return quiet.begins(running, ended)

    assert [after(1.5, 0, 0) for _ in range(4)] == [False, False, True, False]
    assert not after(50, 1, 0)
    assert [after(1.5, 0, 1) for _ in range(4)] == [False, False, True, False]
    assert [after(1.5, 0, 2 + i) for i in range(4)] == [False] * 4  # short ones, never seen to run


HEAP = """
import resource
from pathlib import Path

from serve.server.heap import trim

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

kept = [bytes(64 << 10) for _ in range(4000)]
kept = kept[-1:]  # it lies behind all the others, so that the heap does not shrink by itself
before = resident()
trim()
print(before - resident())
"""


def test_freed_memory_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100 << 20


def test_an_idle_server_ends_at_once(server: FaultyServer) -> None:
    assert post(server).status_code == 200
    assert server.terminate() == 0


def test_a_second_signal_ends_at_once(server: FaultyServer) -> None:
    with streaming(server) as lines:
        server.process.send_signal(signal.SIGTERM)
        wait_until_draining(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SECONDS) == 128 + signal.SIGTERM
        with pytest.raises(httpx2.TransportError):
            list(lines)


def test_a_failed_step_costs_its_requests_and_no_more(server: FaultyServer) -> None:
    failed = post(server, FAIL)
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_error")
    assert post(server).json()["choices"][0]["text"] == "xxxx"
    assert httpx2.get(f"{server.url}/health").status_code == 200
    assert 'kind="step",model_name="org/bytes"} 1.0' in httpx2.get(f"{server.url}/metrics").text


def test_an_engine_that_is_lost_ends_the_process(server: FaultyServer) -> None:
    with streaming(server) as lines:
        lost = post(server, LOSE)
        assert (lost.status_code, lost.json()["error"]["code"]) == (500, "engine_error")
        *_, last, done = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"
        assert done == "data: [DONE]"
    assert server.process.wait(SECONDS) == 1
    server._reader.join()
    assert "the engine is lost" in "".join(server.log)


def test_a_signal_while_a_step_hangs_ends_the_process_too() -> None:
    server = FaultyServer("--shutdown-timeout", "1", "--watchdog-timeout", "3")
    answers: list[httpx2.Response] = []
    asking = threading.Thread(target=lambda: answers.append(post(server, HANG)))
    asking.start()
    with httpx2.Client(base_url=server.url, timeout=SECONDS) as client:
        while client.get("/load").json()["server_load"] == 0:
            pass
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(SECONDS) == 1
    asking.join()
    assert [answer.status_code for answer in answers] == [500]
    server.terminate()


def test_probes_are_answered_while_it_drains_and_not_waited_for(server: FaultyServer) -> None:
    stop = threading.Event()

    def probe() -> None:
        with httpx2.Client(base_url=server.url, timeout=SECONDS) as client, suppress(httpx2.TransportError):
            while not stop.is_set():
                client.get("/health")

    probing = [threading.Thread(target=probe) for _ in range(4)]
    for each in probing:
        each.start()
    with streaming(server, max_tokens=50) as lines:
        server.process.send_signal(signal.SIGTERM)
        wait_until_draining(server)
        assert httpx2.get(f"{server.url}/metrics").status_code == 200
        assert list(lines)[-1] == "data: [DONE]"
    assert server.process.wait(10) == 0  # and not after --shutdown-timeout
    stop.set()
    for each in probing:
        each.join()


def test_an_engine_that_hangs_ends_the_process() -> None:
    server = FaultyServer("--watchdog-timeout", "1")
    hung = post(server, HANG)
    assert (hung.status_code, hung.json()["error"]["code"]) == (500, "engine_error")
    assert server.process.wait(SECONDS) == 1
    server._reader.join()
    log = "".join(server.log)
    assert "a step has not ended for 1 s" in log
    assert "in prefill" in log  # where it hangs
    assert server.terminate() == 1
