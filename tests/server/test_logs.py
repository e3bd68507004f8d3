"""Logs of every module go one way, and start-up errors are said in the form that was chosen."""

import io
import json
import logging
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from rich.console import Console

from serve.config.flags import parse_args
from serve.server.assembly import Served
from serve.server.logs import JsonFormatter, json_line, set_up_logs
from serve.server.server import main
from tests.server.test_bad_models import directory
from tests.support.server_process import ROOT, ServerProcess

# What a process logs, warns of and lets slip, in the form that its argument names.
LOGS = """
import gc, logging, sys, threading, warnings
from serve.server.logs import set_up_logs
set_up_logs("info", stream=sys.stderr, form=sys.argv[1])
logging.getLogger("serve.engine").info("two\\nlines", extra={"request": 7, "odd": {1: float("nan")}})
logging.getLogger("serve.engine").debug("not said")
logging.getLogger("jax").info("not said")
logging.getLogger("uvicorn.error").warning("of %s", "another library", extra={"color_message": "in colours"})
warnings.warn("old", DeprecationWarning)
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("serve.api").exception("a request failed")
thread = threading.Thread(target=lambda: [][0], name="worker")
thread.start()
thread.join()
class Odd:
    def __del__(self):
        raise ValueError("in a finalizer")
Odd()
gc.collect()
raise KeyError("at the end")
"""


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Puts back what set_up_logs changes in this process."""
    root, ours = logging.getLogger(), logging.getLogger("serve")
    before = (root.handlers[:], root.level, ours.level)
    hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook)
    root.handlers[:] = []  # or they would be closed
    yield
    logging.captureWarnings(False)
    (root.handlers[:], root.level, ours.level) = before
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks


def logged(form: str) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "always", "-c", LOGS, form], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stdout == ""
    return run.stderr


def test_json_logs_are_an_object_a_line_whatever_happens() -> None:
    records = [json.loads(line) for line in logged("json").splitlines()]
    assert [record["logger"] for record in records] == [
        *("serve.engine", "uvicorn.error", "py.warnings", "serve.api", "serve", "serve", "serve")
    ]
    assert [record["level"] for record in records] == [
        *("info", "warning", "warning", "error", "critical", "error", "critical")
    ]
    first, second, third, fourth, *uncaught = records
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"]) for record in records)
    assert (first["message"], first["request"]) == ("two\nlines", "7")  # as text, for the sake of what is no JSON
    assert second == {key: second[key] for key in ("time", "level", "logger")} | {"message": "of another library"}
    assert "DeprecationWarning: old" in third["message"]
    assert fourth["exception"].startswith("Traceback (most recent call last):")
    assert fourth["exception"].endswith("ZeroDivisionError: division by zero")
    errors = ("IndexError", "ValueError: in a finalizer", "KeyError: 'at the end'")
    assert all(error in record["exception"] for error, record in zip(errors, uncaught, strict=True))


def test_plain_logs_are_lines_with_time_level_and_name() -> None:
    lines = logged("plain").splitlines()
    head = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
    assert re.fullmatch(head + "INFO serve.engine: two", lines[0])
    assert re.fullmatch(head + "WARNING uvicorn.error: of another library", lines[2])
    assert not any("not said" in line for line in lines)


def test_a_record_keeps_its_fields_and_no_other() -> None:
    record = logging.LogRecord("serve.a", logging.WARNING, "file.py", 1, "%d %s", (1, "é\u2028"), None)
    record.tokens, record.time, record.where = 3, "mine", Path("/x")
    told = json.loads(JsonFormatter().format(record))
    assert told.pop("time") != "mine"
    assert told == {
        "level": "warning",
        "logger": "serve.a",
        "message": "1 é\u2028",
        "tokens": 3,
        "extra_time": "mine",
        "where": "/x",
    }


def test_a_line_is_json_even_of_what_json_has_not() -> None:
    circle: list[Any] = []
    circle.append(circle)
    for odd in (float("inf"), circle, {(1, 2): 3}, "\ud800"):
        line = json_line(logging.INFO, "m", odd=odd)
        assert "\n" not in line
        told = json.loads(line, parse_constant=lambda name: pytest.fail(name))
        assert (told["message"], "odd" in told) == ("m", True)


@pytest.mark.usefixtures("own_logging")
def test_on_a_terminal_logs_go_above_the_bars() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="truecolor", width=40)
    set_up_logs("info", stream=io.StringIO(), console=console)
    long = "a message that is much longer than [bold] a line of this terminal"
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("serve.x").exception(long)
    text = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert re.match(rf"\d\d:\d\d:\d\d ERROR serve\.x: {re.escape(long)}\nTraceback", text)
    assert text.endswith("ValueError: why\n")
    assert "\x1b[31mERROR" in stream.getvalue()


@pytest.mark.usefixtures("own_logging")
def test_a_second_set_up_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    set_up_logs("info", stream=first)
    set_up_logs("error", stream=second, form="json")
    logging.getLogger("serve").warning("too low")
    logging.getLogger("serve").error("said")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("low, too", stacklevel=1)
    assert first.getvalue() == ""
    assert [json.loads(line)["message"].split(": ")[-1].split("\n")[0] for line in second.getvalue().splitlines()] == [
        *("said", "low, too")
    ]


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize("log_format", ["auto", "plain", "json"])
def test_a_start_up_error_is_said_in_the_form_that_was_chosen(
    log_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(parse_args(["--uds", "/nowhere/socket", "--log-format", log_format])) == 1
    said = capsys.readouterr().err
    message = "--uds /nowhere/socket: No such file or directory"
    if log_format != "json":
        assert said == f"error: {message}\n"
        return
    told = json.loads(said)
    assert (told["level"], told["event"], told["message"]) == ("error", "failed", message)


@pytest.mark.usefixtures("own_logging")
def test_a_certificate_that_is_none_is_said_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cert.pem"
    files = ["--ssl-certfile", str(file), "--ssl-keyfile", str(file)]
    assert main(parse_args([*files, "--port", "0"])) == 1
    file.write_text("no certificate")
    assert main(parse_args([*files, "--port", "0"])) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: --ssl-certfile {file}: No such file or directory"
    assert second.startswith(f"error: --ssl-certfile {file}: [SSL")


@pytest.mark.usefixtures("own_logging")
def test_ctrl_c_while_it_starts_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> Served:
        raise KeyboardInterrupt

    assert main(parse_args(["--port", "0"]), interrupted) == 130
    assert capsys.readouterr().err == "interrupted before it was ready\n"


def test_all_that_a_real_server_writes_is_json(tmp_path: Path) -> None:
    model = directory(tmp_path / "model")
    flags = ["--max-num-seqs", "1", "--max-num-batched-tokens", "17", "--max-model-len", "64", "--log-format", "json"]
    flags += ["--uvicorn-log-level", "info"]
    server = ServerProcess(
        str(model), *flags, "--enable-log-requests", "--compilation-cache-dir", str(tmp_path / "xla"), "--api-key", "k7"
    )
    body = {"prompt": "abc", "max_tokens": 2}
    assert httpx2.post(f"{server.url}/v1/completions", json=body, headers={"Authorization": "Bearer k7"}).is_success
    assert server.terminate() == 0
    told = [json.loads(line) for line in server.log]
    events = [each["event"] for each in told if "event" in each]
    assert events == [*("model_found", "memory_planned", "weights_loaded", "compile_begun", "all_compiled", "serving")]
    (logged,) = [each for each in told if each.get("logger") == "serve.api.context"]
    assert "prompts ['abc']" in logged["message"]
    assert any(each.get("logger") == "uvicorn.error" for each in told)
    assert "k7" not in "".join(server.log)
    compiled = next(each for each in told if each.get("event") == "all_compiled")
    assert (compiled["programs"], compiled["cached"]) == (5, 0)
