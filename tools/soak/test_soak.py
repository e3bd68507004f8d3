"""The soak command, and a short soak of a real server."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import httpx2
import pytest

from tests.support.server_process import ServerProcess
from tools.own_server import OwnServer, own_server
from tools.soak.__main__ import _log_errors, main
from tools.soak.client import connect, send
from tools.soak.fake_answers import ERROR, ID, metrics_of
from tools.soak.idle import IdleChecks
from tools.soak.request import COMPLETIONS, ClientBehavior, Request
from tools.soak.soak import Soak

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for fake servers to return memory."""
    monkeypatch.setattr("tools.soak.idle._SETTLE_SECONDS", 0.0)


def test_log_errors_are_found() -> None:
    assert list(_log_errors(OwnServer("x", ["12:00 INFO serve: fine\n"], 0))) == []
    log = ["12:00 ERROR serve.engine.engine: a step failed\n", "Traceback (most recent call last):\n", "  x\n"]
    assert len(list(_log_errors(OwnServer("x", log, 1)))) == 3


def test_own_server_with_wrong_flags_exits(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"), own_server(["--no-such-flag"]):
        pass
    assert "--no-such-flag" in capfd.readouterr().err


def test_main_rejects_server_flags_with_url(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--url", "http://s", "--dtype", "float32"])
    assert "--dtype float32 cannot be combined with --url" in capsys.readouterr().err


def test_main_without_a_server_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:1"]) == 1
    assert "does not answer" in capsys.readouterr().err


def failing_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the server by one that is idle and answers each request of a soak with 500."""
    pages: dict[str, object] = {
        "/v1/models": {"data": [{"id": "m", "max_model_len": 2048, "max_logprobs": 20}]},
        "/tokenizer_info": {"vocab_size": 1000},
        "/version": {"version": "0"},
        "/load": {"server_load": 0},
    }

    def failing(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/metrics":
            return httpx2.Response(200, text=metrics_of())
        if "x-request-id" in request.headers:
            return httpx2.Response(500, json=ERROR)
        return httpx2.Response(200, json=pages.get(request.url.path, {"system_fingerprint": "fp"}))

    def connect(url: str) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(base_url=url, transport=httpx2.MockTransport(failing))

    monkeypatch.setattr("tools.soak.soak.connect", connect)


def test_main_stops_at_a_failing_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    failing_server(monkeypatch)
    assert main(["--url", "http://s", "--report", str(tmp_path / "soak.md")]) == 1
    shown, written = capsys.readouterr().out, (tmp_path / "soak.md").read_text("utf-8")
    for report in (shown, written):
        assert "the status is 500" in report
        assert "failed: " in report
    failed = re.search(r"failed: (\d+) violations", written)
    assert failed is not None
    assert 200 <= int(failed[1]) < 1000  # it stops after 200 and the requests in flight


def test_main_reports_after_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    failing_server(monkeypatch)
    monkeypatch.setattr(Soak, "run", interrupted)
    assert main(["--url", "http://s"]) == 130
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "result"), [(0, 0), (-9, 1)])
def test_main_starts_a_server_and_checks_its_exit_code(monkeypatch: pytest.MonkeyPatch, code: int, result: int) -> None:
    started: list[str] = []

    @contextmanager
    def own(arguments: Sequence[str]) -> Iterator[OwnServer]:
        started.extend(arguments)
        server = OwnServer("http://s")
        yield server
        server.exit_code = code

    async def nothing(*_: object) -> None:
        pass

    failing_server(monkeypatch)
    monkeypatch.setattr("tools.soak.__main__.own_server", own)
    monkeypatch.setattr(Soak, "run", nothing)
    assert main(["--model", "org/m", "--minutes", "1", "--max-num-seqs", "4", "--dtype", "float32"]) == result
    assert started[0] == "org/m"
    assert started[-4:] == ["--max-num-seqs", "4", "--dtype", "float32"]  # last, so that they take precedence


async def test_clients_disconnect_and_read_slowly(server: ServerProcess) -> None:
    body = {"prompt": "A long story:", "max_tokens": 60, "ignore_eos": True, "stream": True, "logprobs": 5}
    request = Request("any", COMPLETIONS, body)
    async with connect(server.url) as http:
        for behavior, patience in ((ClientBehavior.LEAVES_WAITING, 0.005), (ClientBehavior.LEAVES_SENDING, 0.5)):
            answer = await send(http, replace(request, behavior=behavior, patience=patience), ID, 20)
            assert (answer.left, answer.failure, answer.status) == (True, None, None)
        answer = await send(http, replace(request, behavior=ClientBehavior.LEAVES_READING, patience=3), ID, 20)
        assert (answer.left, answer.failure, answer.status, len(answer.pieces)) == (True, None, 200, 3)
        slow = replace(request, behavior=ClientBehavior.READS_SLOWLY, patience=0.1, body=body | {"max_tokens": 5})
        answer = await send(http, slow, ID, 20)
        assert answer.body.endswith(b"data: [DONE]\n\n")
        times = [arrival for arrival, _ in answer.pieces]
        assert all(after - before >= 0.09 for before, after in pairwise(times))
    async with connect(server.url) as http:
        assert await IdleChecks().check(http, 0.0) == ([], [])


def test_short_soak_of_a_real_server(server: ServerProcess, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    # With this seed, few requests cover almost every kind.
    flags = ["--requests", "36", "--clients", "8", "--longest", "128", "--burst", "16", "--seed", "1045"]
    assert main(["--url", server.url, *flags, "--report", str(tmp_path / "soak.md")]) == 0
    report = (tmp_path / "soak.md").read_text("utf-8")
    assert "| result | passed |" in report
    assert "to the last bit" in report
    assert "tokens compared, scored again" in report
    assert "| idle server | 4 | 0 |" in report
    assert "passed" in capsys.readouterr().out
