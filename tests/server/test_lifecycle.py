"""The end of a server process: after a signal, a second one, and if its engine fails or hangs. Real processes."""

import json
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

pytestmark = pytest.mark.slow

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
    """The lines of a stream after its first event."""
    with (
        httpx2.Client(base_url=server.url, timeout=SECONDS) as client,
        client.stream("POST", "/v1/completions", json=ENDLESS | fields) as response,
    ):
        assert response.status_code == 200
        lines = (line for line in response.iter_lines() if line)
        assert next(lines).startswith("data: {")
        yield lines


def wait_until_draining(server: FaultyServer, tls: ssl.SSLContext | None = None) -> None:
    """Return when /health answers 503."""
    with httpx2.Client(base_url=server.url, timeout=SECONDS, verify=tls or True) as client:
        while client.get("/health").status_code != 503:
            pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_drains_running_streams_and_rejects_new_requests(server: FaultyServer, number: int) -> None:
    with streaming(server, max_tokens=100) as lines:
        server.process.send_signal(number)
        wait_until_draining(server)
        refused = post(server)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_stopped")
        assert refused.headers["retry-after"]
        *chunks, last, end = lines
        assert len(chunks) == 98
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert end == "data: [DONE]"
    assert server.process.wait(SECONDS) == 0


def test_drain_timeout_ends_streams_with_an_error() -> None:
    server = FaultyServer("--shutdown-timeout", "0")
    with streaming(server) as lines:
        server.process.send_signal(signal.SIGTERM)
        *_, last, end = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_stopped"
        assert end == "data: [DONE]"
    assert server.process.wait(SECONDS) == 0
    server.terminate()


@pytest.mark.parametrize("encrypted", [False, True])
def test_drain_waits_for_a_response_that_is_being_read(encrypted: bool, tmp_path: Path) -> None:
    certificates = Certificates.made_in(tmp_path) if encrypted else None
    server = FaultyServer("--shutdown-timeout", "20", *(certificates.flags() if certificates else ()))
    tls = certificates.trusting() if certificates else None
    body = {"prompt": [10] * 400, "max_tokens": 1, "prompt_logprobs": 3, "n": 128, "stream": False}
    with killed(server), sending(server, body, receive_buffer=4096, tls=tls) as connection:
        response = connection.recv(1000)
        server.process.send_signal(signal.SIGTERM)
        wait_until_draining(server, tls)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(3)  # longer than the time for the last bytes
        while not response.endswith(b"\r\n0\r\n\r\n") and (piece := connection.recv(1 << 20)):
            response += piece
        answer = unchunked(response.partition(b"\r\n\r\n")[2])
        assert len(answer) > 8 << 20  # more than the buffers of the operating system
        assert len(json.loads(answer)["choices"]) == 128
        assert server.process.wait(SECONDS) == 0


def unchunked(body: bytes) -> bytes:
    """A complete body in chunked encoding, decoded."""
    parts = []
    while size := int(body[: body.index(b"\r\n")], 16):
        body = body[body.index(b"\r\n") + 2 :]
        parts.append(body[:size])
        body = body[size + 2 :]
    assert body == b"0\r\n\r\n"
    return b"".join(parts)


def test_hanging_pool_threads_do_not_block_the_exit() -> None:
    server = FaultyServer("--shutdown-timeout", "0")
    threads = lifecycle.NUM_WORKERS
    end = time.monotonic() + SECONDS
    tasks = Path(f"/proc/{server.process.pid}/task")
    before = len(list(tasks.iterdir()))
    with killed(server), ExitStack() as stack:
        for _ in range(threads + 2):
            stack.enter_context(sending(server, {"prompt": STUCK}))
        while "".join(server.log).count(STUCK) < threads:
            assert time.monotonic() < end
        assert len(list(tasks.iterdir())) <= before  # all threads exist from the start
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SECONDS) == 0


@contextmanager
def killed(server: FaultyServer) -> Iterator[None]:
    """Kill the process at the end of the block."""
    try:
        yield
    finally:
        server.process.kill()
        server.terminate()


@contextmanager
def sending(
    server: FaultyServer, body: object, *, receive_buffer: int | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[socket.socket]:
    """A connection with a request sent."""
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


def test_idle_timer_expires_once_per_idle_period(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    timer = lifecycle._IdleTimer()

    def after(seconds: float, running: int, ended: int) -> bool:
        now[0] += seconds
        return timer.expires(running, ended)

    assert [after(1.5, 0, 0) for _ in range(4)] == [False, False, True, False]
    assert not after(50, 1, 0)
    assert [after(1.5, 0, 1) for _ in range(4)] == [False, False, True, False]
    assert [after(1.5, 0, 2 + i) for i in range(4)] == [False] * 4  # short requests that are never seen running


HEAP = """
import resource
from pathlib import Path

from serve.server.lifecycle import trim_heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

blocks = [bytes(64 << 10) for _ in range(4000)]
blocks = blocks[-1:]  # the last block keeps the heap from shrinking by itself
size = resident()
trim_heap()
print(size - resident())
"""


def test_trim_heap_returns_freed_memory() -> None:
    run = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 100 << 20


def test_idle_server_exits_at_once(server: FaultyServer) -> None:
    assert post(server).status_code == 200
    assert server.terminate() == 0


def test_second_signal_exits_at_once(server: FaultyServer) -> None:
    with streaming(server) as lines:
        server.process.send_signal(signal.SIGTERM)
        wait_until_draining(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SECONDS) == 128 + signal.SIGTERM
        with pytest.raises(httpx2.TransportError):
            list(lines)


def test_failed_step_fails_only_its_requests(server: FaultyServer) -> None:
    failed = post(server, FAIL)
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_error")
    assert post(server).json()["choices"][0]["text"] == "xxxx"
    assert httpx2.get(f"{server.url}/health").status_code == 200
    assert 'kind="step",model_name="org/bytes"} 1.0' in httpx2.get(f"{server.url}/metrics").text


def test_lost_engine_ends_the_process(server: FaultyServer) -> None:
    with streaming(server) as lines:
        lost = post(server, LOSE)
        assert (lost.status_code, lost.json()["error"]["code"]) == (500, "engine_error")
        *_, last, end = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"
        assert end == "data: [DONE]"
    assert server.process.wait(SECONDS) == 1
    server._reader.join()
    assert "the engine is lost" in "".join(server.log)


def test_signal_during_a_hanging_step_ends_the_process() -> None:
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


def test_probes_are_answered_while_draining(server: FaultyServer) -> None:
    stop = threading.Event()

    def probe() -> None:
        with httpx2.Client(base_url=server.url, timeout=SECONDS) as client, suppress(httpx2.TransportError):
            while not stop.is_set():
                client.get("/health")

    probing = [threading.Thread(target=probe) for _ in range(4)]
    for connection in probing:
        connection.start()
    with streaming(server, max_tokens=50) as lines:
        server.process.send_signal(signal.SIGTERM)
        wait_until_draining(server)
        assert httpx2.get(f"{server.url}/metrics").status_code == 200
        assert list(lines)[-1] == "data: [DONE]"
    assert server.process.wait(10) == 0  # and not after --shutdown-timeout
    stop.set()
    for connection in probing:
        connection.join()


def test_hanging_engine_ends_the_process() -> None:
    server = FaultyServer("--watchdog-timeout", "1")
    hung = post(server, HANG)
    assert (hung.status_code, hung.json()["error"]["code"]) == (500, "engine_error")
    assert server.process.wait(SECONDS) == 1
    server._reader.join()
    log = "".join(server.log)
    assert "a step has run for 1 s" in log
    assert "in prefill" in log  # where it hangs
    assert server.terminate() == 1


class UnreadServer(FaultyServer):
    """A server whose log is not read after it has started."""

    def _read_log(self) -> None:
        """Read nothing."""


@pytest.mark.parametrize("log_format", ["plain", "json"])
@pytest.mark.parametrize("signals", [1, 2])
def test_unread_log_stops_neither_requests_nor_the_exit(log_format: str, signals: int) -> None:
    server = UnreadServer("--log-format", log_format)
    with killed(server):
        for _ in range(100):  # each logs a traceback of more than 1 kB
            assert post(server, FAIL).status_code == 500
        assert post(server).status_code == 200
        with streaming(server) if signals == 2 else nullcontext():
            server.process.send_signal(signal.SIGTERM)
            if signals == 2:
                wait_until_draining(server)
                server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(SECONDS) == (0 if signals == 1 else 128 + signal.SIGTERM)


def test_stopped_process_keeps_its_engine() -> None:
    server = FaultyServer("--watchdog-timeout", "1")
    with killed(server), streaming(server, max_tokens=200) as lines:
        server.process.send_signal(signal.SIGSTOP)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(3)  # longer than --watchdog-timeout
        server.process.send_signal(signal.SIGCONT)
        *_, last, end = lines
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert end == "data: [DONE]"
        assert httpx2.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_signal_logs_stacks_and_continues(server: FaultyServer, number: int) -> None:
    with streaming(server, max_tokens=100) as lines:
        server.process.send_signal(number)
        assert list(lines)[-1] == "data: [DONE]"
    assert post(server).status_code == 200
    assert server.terminate() == 0
    assert "stacks of all threads:\n" in "".join(server.log)


def test_fatal_signal_leaves_a_traceback(server: FaultyServer) -> None:
    server.process.send_signal(signal.SIGSEGV)
    assert server.process.wait(SECONDS) == -signal.SIGSEGV
    wait_for_log(server, "Fatal Python error: Segmentation fault")


def wait_for_log(server: FaultyServer, text: str) -> None:
    end = time.monotonic() + SECONDS
    while text not in "".join(server.log):
        assert time.monotonic() < end


def test_sighup_reads_keys_and_certificates_again(tmp_path: Path) -> None:
    old, file = Certificates.made_in(tmp_path), tmp_path / "keys"
    file.write_text("old\n")
    server = FaultyServer(*old.flags(), "--api-key-file", str(file))

    def status(key: str, certificates: Certificates) -> int:
        headers = {"X-Api-Key": key}
        return httpx2.get(f"{server.url}/v1/models", headers=headers, verify=certificates.trusting()).status_code

    with killed(server):
        assert [status(key, old) for key in ("old", "new")] == [200, 401]
        new = Certificates.made_in(tmp_path)
        file.write_text("new\n")
        server.process.send_signal(signal.SIGHUP)
        wait_for_log(server, "SIGHUP: API keys and certificates were read again")
        assert [status(key, new) for key in ("old", "new")] == [401, 200]
        with pytest.raises(httpx2.ConnectError):
            status("new", old)
        file.write_text("")
        server.process.send_signal(signal.SIGHUP)
        wait_for_log(server, "contains no key")
        assert status("new", new) == 200
