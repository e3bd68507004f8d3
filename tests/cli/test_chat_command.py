"""`logprobd chat` without a terminal: output streams and exit codes, with a scripted model."""

import io
import logging
from dataclasses import replace
from typing import Any

import pytest

from serve import llm
from serve.cli.chat import command
from serve.cli.chat.config import parse_args
from serve.config.generation_config import GenerationDefaults
from serve.engine.client import RequestHandle
from serve.engine.engine import Engine
from serve.engine.request import Request
from serve.server.console import Reporter
from serve.server.model_files import StartupError
from serve.server.startup import Loaded
from serve.server.startup_events import Event, failed
from tests.support.http_client import END
from tests.support.scoring import RecordingReporter, fake_load, scripted_runner


@pytest.fixture
def reporter(monkeypatch: pytest.MonkeyPatch) -> RecordingReporter:
    reporter = RecordingReporter()
    monkeypatch.setattr(command, "start_reporting", lambda _: reporter)
    return reporter


def run(
    monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: str, defaults: dict[str, Any] | None = None
) -> tuple[int, Engine]:
    """The exit code of a chat with this input, and its engine."""
    config = parse_args(arguments)
    loaded = fake_load(scripted_runner(b"Hello, you"))(config, Reporter(None))
    loaded = replace(loaded, defaults=GenerationDefaults(**{"max_new_tokens": 5} | (defaults or {})))
    engine = loaded.start_engine()
    monkeypatch.setattr(Loaded, "start_engine", lambda _: engine)
    monkeypatch.setattr(llm, "load", lambda *_: loaded)
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return command.main(config), engine


@pytest.mark.usefixtures("reporter")
def test_main_writes_replies_to_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, engine = run(monkeypatch, "Hi\nand\\\nmore", "--system", "S")
    assert (code, engine.ready) == (0, False)
    assert capsys.readouterr() == ("Hello\nHello\n", "")  # five tokens each, the model's default


@pytest.mark.usefixtures("reporter")
def test_main_writes_errors_to_stderr_and_returns_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run(monkeypatch, "refuse\nHi\n", "--max-tokens", "2")
    out, error = capsys.readouterr()
    assert (code, out) == (1, "He\n")
    assert error.startswith("error: The chat template refused the messages: It is refused. Use /reset")


def fails_with(error: BaseException) -> Any:
    def load(*_: object) -> None:
        raise error

    return load


@pytest.mark.parametrize(
    ("error", "code", "event"),
    [
        (StartupError("why"), 1, failed("why")),
        (KeyboardInterrupt(), 130, Event("interrupted", "interrupted during start-up", level=logging.ERROR)),
    ],
)
def test_main_reports_a_failed_start(
    monkeypatch: pytest.MonkeyPatch, reporter: RecordingReporter, error: BaseException, code: int, event: object
) -> None:
    monkeypatch.setattr(llm, "load", fails_with(error))
    assert (command.main(parse_args([])), reporter.events) == (code, [event])


@pytest.mark.usefixtures("reporter")
@pytest.mark.parametrize(
    ("arguments", "defaults", "expected"),
    [
        ([], {}, [1.0, 1.0, 0, 0.0]),
        ([], {"temperature": 0.6, "top_k": -1, "presence_penalty": 0.5}, [0.6, 1.0, 0, 0.5]),
        (["--temperature", "0", "--top-k", "5", "--top-p", "0.5"], {"temperature": 0.6}, [0.0, 0.5, 5, 0.0]),
        (["--temperature", "0.001"], {}, [0.01, 1.0, 0, 0.0]),  # as the server does
    ],
)
def test_main_prefers_options_to_the_models_defaults(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], defaults: dict[str, Any], expected: list[float]
) -> None:
    requests: list[Request] = []
    admit = Engine.admit

    def record(engine: Engine, request: Request, *, bypass_limits: bool = False) -> RequestHandle:
        requests.append(request)
        return admit(engine, request, bypass_limits=bypass_limits)

    monkeypatch.setattr(Engine, "admit", record)
    run(monkeypatch, "Hi\n", "--max-tokens", "2", *arguments, defaults=defaults)
    [request] = requests
    params = request.params
    assert [params.temperature, params.top_p, params.top_k, params.presence_penalty] == expected
    assert (params.max_tokens, params.stop_token_ids) == (2, frozenset({END}))
