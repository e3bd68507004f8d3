"""The soak as a command, and a short one that passes against a real server."""

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
from tools.soak.__main__ import _complaints, main
from tools.soak.ask import COMPLETIONS, Ask, Manner
from tools.soak.client import connect, send
from tools.soak.fake_answers import ERROR, ID, metrics_of
from tools.soak.idle import Idle
from tools.soak.soak import Soak

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """These servers have no memory to give back."""
    monkeypatch.setattr("tools.soak.idle._SETTLE_SECONDS", 0.0)


def test_what_a_server_says_at_its_end() -> None:
    assert list(_complaints(OwnServer("x", ["12:00 INFO serve: fine\n"], 0))) == []
    log = ["12:00 ERROR serve.engine.engine: a step failed\n", "Traceback (most recent call last):\n", "  x\n"]
    assert len(list(_complaints(OwnServer("x", log, 1)))) == 3


def test_a_server_that_does_not_come_up_ends_the_soak(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"), own_server(["--no-such-flag"]):
        pass
    assert "--no-such-flag" in capfd.readouterr().err


def test_flags_that_have_no_part_in_it_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--url", "http://s", "--dtype", "float32"])
    assert "--dtype float32 has no part in it" in capsys.readouterr().err


def test_no_server_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:1"]) == 1
    assert "does not answer" in capsys.readouterr().err


def failing_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of any: it tells what it is, is idle, and answers each request of a soak with 500."""
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


def test_a_server_that_fails_ends_the_soak(
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
    assert 200 <= int(failed[1]) < 1000  # it ends after two hundred, and what was on its way


def test_ctrl_c_ends_in_a_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    failing_server(monkeypatch)
    monkeypatch.setattr(Soak, "run", interrupted)
    assert main(["--url", "http://s"]) == 130
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "result"), [(0, 0), (-9, 1)])
def test_a_server_of_its_own_gets_the_other_flags_and_has_to_end_well(
    monkeypatch: pytest.MonkeyPatch, code: int, result: int
) -> None:
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
    assert started[-4:] == ["--max-num-seqs", "4", "--dtype", "float32"]  # after ours, so that they stand over them


async def test_clients_leave_and_dawdle(server: ServerProcess) -> None:
    body = {"prompt": "A long story:", "max_tokens": 60, "ignore_eos": True, "stream": True, "logprobs": 5}
    ask = Ask("any", COMPLETIONS, body)
    async with connect(server.url) as http:
        for manner, patience in ((Manner.LEAVES_WAITING, 0.005), (Manner.LEAVES_SENDING, 0.5)):
            answer = await send(http, replace(ask, manner=manner, patience=patience), ID, 20)
            assert (answer.left, answer.failure, answer.status) == (True, None, None)
        answer = await send(http, replace(ask, manner=Manner.LEAVES_READING, patience=3), ID, 20)
        assert (answer.left, answer.failure, answer.status, len(answer.pieces)) == (True, None, 200, 3)
        dawdling = replace(ask, manner=Manner.READS_SLOWLY, patience=0.1, body=body | {"max_tokens": 5})
        answer = await send(http, dawdling, ID, 20)
        assert answer.body.endswith(b"data: [DONE]\n\n")
        times = [at for at, _ in answer.pieces]
        assert all(after - before >= 0.09 for before, after in pairwise(times))
    async with connect(server.url) as http:
        assert await Idle().look(http, 0.0) == ([], [])


def test_a_short_soak_of_a_real_server(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Of this seed, so few requests are of almost every kind.
    flags = ["--requests", "36", "--clients", "8", "--longest", "128", "--burst", "16", "--seed", "1045"]
    assert main(["--url", server.url, *flags, "--report", str(tmp_path / "soak.md")]) == 0
    report = (tmp_path / "soak.md").read_text("utf-8")
    assert "| result | passed |" in report
    assert "to the last bit" in report
    assert "tokens compared, scored again" in report
    assert "| idle when nothing is asked | 4 | 0 |" in report
    assert "passed" in capsys.readouterr().out
