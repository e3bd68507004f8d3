"""One handler for the logs of all modules, and start-up errors in the same format."""

import io
import json
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import httpx2
import pytest
from rich.console import Console

from serve.config.flags import parse_args
from serve.server.console import JsonFormatter, json_line, set_up_logs
from serve.server.lifecycle import Served
from serve.server.server import main
from tests.server.test_bad_models import directory
from tests.support.server_process import ROOT, ServerProcess

# Logs, warnings and uncaught exceptions of a process, in the format of its argument.
LOGS = """
import gc, logging, sys, threading, warnings
from serve.server.console import set_up_logs
set_up_logs("info", stream=sys.stderr, as_json=sys.argv[1] == "json")
logging.getLogger("serve.engine").info("two\\nlines", extra={"request": 7, "odd": {1: float("nan")}})
logging.getLogger("serve.engine").debug("hidden")
logging.getLogger("jax").info("hidden")
logging.getLogger("uvicorn.error").warning("of %s", "another library", extra={"color_message": "in colors"})
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


def logged(form: str) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "always", "-c", LOGS, form], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stdout == ""
    return run.stderr


def test_json_logs_have_one_object_per_line() -> None:
    records = [json.loads(line) for line in logged("json").splitlines()]
    assert [record["logger"] for record in records] == [
        *("serve.engine", "uvicorn.error", "py.warnings", "serve.api", "serve", "serve", "serve")
    ]
    assert [record["level"] for record in records] == [
        *("info", "warning", "warning", "error", "critical", "error", "critical")
    ]
    first, second, third, fourth, *uncaught = records
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"]) for record in records)
    assert (first["message"], first["request"]) == ("two\nlines", "7")  # as text, since the record is not JSON
    assert second == {key: second[key] for key in ("time", "level", "logger")} | {"message": "of another library"}
    assert "DeprecationWarning: old" in third["message"]
    assert fourth["exception"].startswith("Traceback (most recent call last):")
    assert fourth["exception"].endswith("ZeroDivisionError: division by zero")
    errors = ("IndexError", "ValueError: in a finalizer", "KeyError: 'at the end'")
    assert all(error in record["exception"] for error, record in zip(errors, uncaught, strict=True))


def test_plain_logs_have_time_level_and_name() -> None:
    lines = logged("plain").splitlines()
    head = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
    assert re.fullmatch(head + "INFO serve.engine: two", lines[0])
    assert re.fullmatch(head + "WARNING uvicorn.error: of another library", lines[2])
    assert not any("hidden" in line for line in lines)


def test_json_formatter_keeps_extra_fields() -> None:
    record = logging.LogRecord("serve.a", logging.WARNING, "file.py", 1, "%d %s", (1, "é\u2028"), None)
    record.tokens, record.time, record.where = 3, "mine", Path("/x")
    line = json.loads(JsonFormatter().format(record))
    assert line.pop("time") != "mine"
    assert line == {
        "level": "warning",
        "logger": "serve.a",
        "message": "1 é\u2028",
        "tokens": 3,
        "extra_time": "mine",
        "where": "/x",
    }


def test_json_line_of_values_that_json_lacks() -> None:
    circle: list[Any] = []
    circle.append(circle)
    for odd in (float("inf"), circle, {(1, 2): 3}, "\ud800"):
        line = json_line(logging.INFO, "m", odd=odd)
        assert "\n" not in line
        fields = json.loads(line, parse_constant=lambda name: pytest.fail(name))
        assert (fields["message"], "odd" in fields) == ("m", True)


@pytest.mark.usefixtures("own_logging")
def test_console_logs_appear_above_the_bars() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="truecolor", no_color=False, width=40)
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
@pytest.mark.parametrize("name", ["serve.api", "compiled.program_cache", "model.weights"])
def test_level_applies_to_our_packages_and_not_to_libraries(name: str) -> None:
    for level, messages in (("debug", ["detail", "warning"]), ("error", [])):
        set_up_logs(level, stream=(stream := io.StringIO()), as_json=True)
        logging.getLogger(name).debug("detail")
        logging.getLogger(name).warning("warning")
        logging.getLogger("library").debug("not shown")
        assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == messages


@pytest.mark.usefixtures("own_logging")
def test_set_up_logs_replaces_the_first_handler() -> None:
    first, second = io.StringIO(), io.StringIO()
    set_up_logs("info", stream=first)
    set_up_logs("error", stream=second, as_json=True)
    logging.getLogger("serve").warning("too low")
    logging.getLogger("serve").error("shown")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("low, too", stacklevel=1)
    assert first.getvalue() == ""
    assert [json.loads(line)["message"].split(": ")[-1].split("\n")[0] for line in second.getvalue().splitlines()] == [
        *("shown", "low, too")
    ]


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize("log_format", ["auto", "plain", "json"])
def test_main_error_has_the_log_format(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(parse_args(["--uds", "/nowhere/socket", "--log-format", log_format])) == 1
    error = capsys.readouterr().err
    message = "--uds /nowhere/socket: No such file or directory"
    if log_format != "json":
        assert error == f"error: {message}\n"
        return
    event = json.loads(error)
    assert (event["level"], event["event"], event["message"]) == ("error", "failed", message)


@pytest.mark.usefixtures("own_logging")
def test_main_rejects_an_invalid_certificate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cert.pem"
    files = ["--ssl-certfile", str(file), "--ssl-keyfile", str(file)]
    assert main(parse_args([*files, "--port", "0"])) == 1
    file.write_text("no certificate")
    assert main(parse_args([*files, "--port", "0"])) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: --ssl-certfile {file}: No such file or directory"
    assert second.startswith(f"error: --ssl-certfile {file}: [SSL")


@pytest.mark.usefixtures("own_logging")
def test_main_interrupted_returns_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> Served:
        raise KeyboardInterrupt

    assert main(parse_args(["--port", "0"]), interrupted) == 130
    assert capsys.readouterr().err == "interrupted during start-up\n"


@pytest.mark.slow
def test_server_process_writes_only_json(tmp_path: Path) -> None:
    model = directory(tmp_path / "model")
    flags = ["--max-num-seqs", "1", "--max-num-batched-tokens", "17", "--max-model-len", "64", "--log-format", "json"]
    flags += ["--uvicorn-log-level", "info"]
    server = ServerProcess(
        str(model), *flags, "--enable-log-requests", "--compilation-cache-dir", str(tmp_path / "xla"), "--api-key", "k7"
    )
    body = {"prompt": "abc", "max_tokens": 2}
    assert httpx2.post(f"{server.url}/v1/completions", json=body, headers={"Authorization": "Bearer k7"}).is_success
    assert server.terminate() == 0
    lines = [json.loads(line) for line in server.log]
    events = [line["event"] for line in lines if "event" in line]
    assert events == [*("model_found", "memory_planned", "weights_loaded", "compile_begun", "all_compiled", "serving")]
    (logged,) = [line for line in lines if line.get("logger") == "serve.api.job"]
    assert "prompts ['abc']" in logged["message"]
    assert any(line.get("logger") == "uvicorn.error" for line in lines)
    assert "k7" not in "".join(server.log)
    compiled = next(line for line in lines if line.get("event") == "all_compiled")
    assert (compiled["programs"], compiled["cached"]) == (6, 0)
