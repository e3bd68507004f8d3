"""`logprobd chat` without a terminal: output streams and exit codes, with a scripted model."""

import io
from dataclasses import replace
from typing import Any

import pytest

from serve import llm
from serve.cli.chat import command
from serve.cli.chat.config import parse_args
from serve.config.generation_config import GenerationDefaults
from serve.engine.engine import Engine
from serve.server.console import Reporter
from serve.server.model_files import StartupError
from serve.server.startup import Loaded
from serve.server.startup_events import failed, interrupted
from tests.support.scoring import fake_load, scripted_runner


class RecordingReporter(Reporter):
    """A reporter that records events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    def report(self, event: Any) -> None:
        self.events.append(event)


@pytest.fixture
def reporter(monkeypatch: pytest.MonkeyPatch) -> RecordingReporter:
    reporter = RecordingReporter()
    monkeypatch.setattr(command, "start_reporting", lambda _: reporter)
    return reporter


def run(monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: str) -> tuple[int, Engine]:
    """The exit code of a chat with this input, and its engine."""
    config = parse_args(arguments)
    loaded = fake_load(scripted_runner(b"Hello, you"))(config, Reporter(None))
    loaded = replace(loaded, defaults=GenerationDefaults(max_new_tokens=5))
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
    [(StartupError("why"), 1, failed("why")), (KeyboardInterrupt(), 130, interrupted())],
)
def test_main_reports_a_failed_start(
    monkeypatch: pytest.MonkeyPatch, reporter: RecordingReporter, error: BaseException, code: int, event: object
) -> None:
    monkeypatch.setattr(llm, "load", fails_with(error))
    assert (command.main(parse_args([])), reporter.events) == (code, [event])
