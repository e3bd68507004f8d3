"""A real server process while its model is loaded: 503, a waiting page, and the end of loading."""

import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from serve.server import loading
from tests.support.certificates import Certificates
from tests.support.server_process import ROOT

pytestmark = pytest.mark.slow

SECONDS = 60
# A server whose loading is driven by the lines of stdin: progress, "done" or "fail".
SERVER = """
import sys
from serve.config.flags import parse_args
from serve.server.model_files import StartupError
from serve.server.server import main
from tests.support.faulty_server import _assemble

def make(config, reporter):
    with reporter.loading() as progress:
        for line in sys.stdin:
            if line == "fail\\n":
                raise StartupError("m: it is damaged")
            if line == "done\\n":
                return _assemble(config, reporter)
            progress(int(line), 100)
            print("ok", flush=True)

sys.exit(main(parse_args(sys.argv[1:]), make))
"""


class Loading:
    """The process and a client of it."""

    def __init__(
        self, *flags: str, address: str | tuple[str, int], url: str, tls: ssl.SSLContext | None = None
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error::ResourceWarning", "-c", SERVER, *flags],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.address = address  # host and port, or the path of a Unix socket
        transport = httpx2.HTTPTransport(uds=address if isinstance(address, str) else None, verify=tls or True)
        self.client = httpx2.Client(transport=transport, base_url=url, timeout=SECONDS)
        self.connectable()

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def progress(self, percent: int) -> None:
        """Report progress; returns when the server has taken it."""
        assert self.process.stdout is not None
        self.send(str(percent))
        assert self.process.stdout.readline() == "ok\n"

    def connectable(self) -> None:
        """Wait until the process listens."""
        end = time.monotonic() + SECONDS
        while True:
            with socket.socket(socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET) as probe:
                if probe.connect_ex(self.address) == 0:
                    return
            assert time.monotonic() < end

    def until(self, status: int) -> httpx2.Response:
        """Poll /health, which is 503, until it has a status."""
        end = time.monotonic() + SECONDS
        while (answer := self.client.get("/health")).status_code != status:
            assert answer.status_code == 503
            assert time.monotonic() < end
        return answer

    def wait(self) -> tuple[int, str]:
        """Exit code and stderr."""
        _, error = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, error

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Loading]:
    path = str(tmp_path / "socket")
    process = Loading("--uds", path, address=path, url="http://server")
    yield process
    process.close()


def test_requests_while_loading_get_503_and_then_answers(server: Loading) -> None:
    health = server.until(503)
    assert (health.headers["retry-after"], health.content) == ("5", b"")
    assert [server.client.get(path).status_code for path in ("/ping", "/ready", "/live")] == [503, 503, 200]
    refused = server.client.post("/v1/completions", json={"prompt": "Hi"})
    assert refused.status_code == 503
    assert refused.json()["error"] == {
        "message": "The model is still being loaded.",
        "type": "service_unavailable",
        "param": None,
        "code": "not_ready",
    }
    server.send("done")
    server.until(200)
    assert server.client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 4}).status_code == 200
    server.process.terminate()
    code, error = server.wait()
    assert code == 0
    assert error.splitlines()[0].startswith("serving  ")


@pytest.mark.slow
def test_page_while_loading_shows_the_phase_and_reloads(server: Loading) -> None:
    server.until(503)
    server.progress(37)
    page = server.client.get("/")
    assert page.status_code == 503
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert '<meta http-equiv="refresh"' in page.text
    assert "The model is being loaded" in page.text
    assert "Loading weights: 37%" in page.text
    server.send("done")
    server.until(200)
    assert "Loading weights" not in server.client.get("/").text


@pytest.mark.slow
def test_connection_from_loading_does_not_block_the_start(server: Loading, tmp_path: Path) -> None:
    server.until(503)
    with socket.socket(socket.AF_UNIX) as idle:
        idle.connect(str(tmp_path / "socket"))
        server.send("done")
        server.until(200)


@pytest.mark.slow
def test_failure_while_loading_ends_with_one_line(server: Loading) -> None:
    server.until(503)
    server.send("fail")
    assert server.wait() == (1, "error: m: it is damaged\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "error"),
    [(signal.SIGINT, 130, "interrupted during start-up\n"), (signal.SIGTERM, -signal.SIGTERM, "")],
)
def test_signal_while_loading_ends_the_process(server: Loading, number: int, code: int, error: str) -> None:
    server.until(503)
    server.process.send_signal(number)
    assert server.wait() == (code, error)


@pytest.mark.slow
def test_https_while_loading(tmp_path: Path) -> None:
    certificates = Certificates.made_in(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [*certificates.flags(), "--port", str(port)]
    tls = certificates.trusting()
    server = Loading(*flags, address=("127.0.0.1", port), url=f"https://127.0.0.1:{port}", tls=tls)
    try:
        server.until(503)
        server.send("done")
        server.until(200)
    finally:
        server.close()


def test_root_path_while_loading() -> None:
    scope = {"type": "http", "path": "/api/health", "root_path": "/api"}
    assert loading._response(scope, "").body == b""
    assert b"&lt;b&gt;" in loading._response(scope | {"path": "/api/"}, "<b>").body
