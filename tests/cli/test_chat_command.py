"""`python -m serve chat` without a terminal: what goes where, and how it ends. The model is a script."""

import io
from types import SimpleNamespace
from typing import Any

import pytest

from serve.cli.chat import command
from serve.cli.chat.config import parse_args
from serve.config.generation_config import GenerationDefaults
from serve.engine.engine import Engine
from serve.server.model_files import StartupError
from serve.server.startup_events import failed, interrupted
from tests.cli.test_chat_session import scripted_engine
from tests.support.http_client import byte_tokenizer


class Told:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def report(self, event: Any) -> None:
        self.events.append(event)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()
    monkeypatch.setattr(command, "start_reporting", lambda _: told)
    return told


def run(monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: str) -> tuple[int, Engine]:
    """The exit code of a chat into which `typed` is piped."""
    engine, _ = scripted_engine(b"Hello, you")
    engine.start()
    loaded = SimpleNamespace(
        name="m",
        tokenizer=byte_tokenizer(),
        chat_template=None,
        limits=engine.limits,
        defaults=GenerationDefaults(max_new_tokens=5),
        fingerprint="fp",
        start_engine=lambda: engine,
    )
    monkeypatch.setattr(command, "load", lambda *_: loaded)
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    try:
        return command.main(parse_args(arguments)), engine
    finally:
        if engine.ready:
            engine.stop()


@pytest.mark.usefixtures("told")
def test_replies_go_to_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, engine = run(monkeypatch, "Hi\nand\\\nmore", "--system", "S")
    assert (code, engine.ready) == (0, False)
    assert capsys.readouterr() == ("Hello\nHello\n", "")  # five tokens each: the model's own default


@pytest.mark.usefixtures("told")
def test_what_fails_goes_to_stderr_and_into_the_exit_code(
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
def test_how_a_start_ends(
    monkeypatch: pytest.MonkeyPatch, told: Told, error: BaseException, code: int, event: object
) -> None:
    monkeypatch.setattr(command, "load", fails_with(error))
    assert (command.main(parse_args([])), told.events) == (code, [event])
