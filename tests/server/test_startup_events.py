"""Reports of start-up as text, as JSON and on a terminal, and the command they print to try the server."""

import dataclasses
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from model.weights.checkpoint import TensorInfo
from model.weights.loader import StoredWeights
from serve.config.config import ServeConfig
from serve.config.flags import parse_args
from serve.server.console import Reporter, is_terminal, start_reporting
from serve.server.memory_plan import MemoryPlan
from serve.server.model_files import StartupError
from serve.server.startup_events import (
    all_compiled,
    curl_command,
    defaults_applied,
    memory_planned,
    model_found,
    server_started,
    weights_loaded,
)
from tests.support.http_client import serving
from tests.support.server_process import ROOT

ADDRESS = re.compile(r"serving .* at (http://127\.0\.0\.1:\d+)")  # parsed by tools that start a server
CONFIG = ServeConfig(dtype="bfloat16")
FACTS: dict[str, Any] = {
    "model": "org/[a] model",
    "family": "llama",
    "parameters": 134_515_008,
    "platform": "cpu",
    "device": "cpu",
    "max_model_len": 8192,
}
FILES: Any = SimpleNamespace(
    config=CONFIG,
    source=SimpleNamespace(name=FACTS["model"]),
    checkpoint=SimpleNamespace(
        config=SimpleNamespace(family="llama"),
        names=lambda: {"weight": TensorInfo((FACTS["parameters"],), "BF16", True, 0)},
        quantizes_activations=False,
    ),
    max_model_len=8192,
)
DEVICE: Any = SimpleNamespace(platform="cpu", device_kind="cpu")
MODEL = model_found(FILES, DEVICE)
TENSORS = {
    ("Q4_1", "Q4_1"): [f"blk.{i}.{name}.weight" for i in range(9) for name in ("attn_q", "attn_k")]
    + [f"blk.{i}.attn_v.weight" for i in (3, 6, 8)],
    ("Q8_0", "Q8_0"): [*(f"blk.{i}.attn_v.weight" for i in (0, 1, 2, 4, 5)), "blk.7.attn_v.weight", "output.weight"],
    ("Q2_K", "TQ1_0"): ["token_embd.weight", "blk.4.ffn_up.weight"],
}
STORED = StoredWeights(269_000_000, {"Q4_1": 106_200_000, "Q8_0": 28_311_552}, 5.5471, TENSORS)
PLAN = MemoryPlan(269_000_000, 694, 1_549_000, 33_000_000, 16_108_000_000)
URL = "http://127.0.0.1:8000"
SERVING = server_started(CONFIG, ("m", "alias"), URL, chats=True)
NAMES = ("zero_state", "decode_1", "prefill_16")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_activations_that_are_not_quantized_are_reported() -> None:
    checkpoint = SimpleNamespace(**vars(FILES.checkpoint) | {"quantizes_activations": True})
    line = model_found(SimpleNamespace(**vars(FILES) | {"checkpoint": checkpoint}), DEVICE).line  # type: ignore[arg-type]
    assert "bfloat16; activations are not quantized, although quantization_config asks for it on cpu" in line
    assert "activations" not in MODEL.line


def program(name: str) -> Any:
    return SimpleNamespace(name=name, lower_seconds=0.25, compile_seconds=0.5, temp_bytes=2**20)


def start(reporter: Reporter) -> None:
    """Report all events of a successful start."""
    reporter.report(defaults_applied({"temperature": 0.2, "top_p": 0.9}))
    reporter.report(MODEL)
    reporter.report(memory_planned(PLAN, 8192))
    with reporter.loading() as progress:
        progress(1_000_000, 96_600_000)
        progress(96_600_000, 96_600_000)
    reporter.report(weights_loaded(269_000_000, STORED, 3.1, ("avx2", "linear")))
    with reporter.compiling(NAMES) as ready:
        for name in NAMES:
            ready(program(name))
    reporter.report(all_compiled(3, 2, 4.2))
    reporter.report(SERVING)


def screen(*, verbose: bool = False) -> tuple[Reporter, Callable[[], str]]:
    """A reporter on a terminal, and its text without colors."""
    console = Console(file=io.StringIO(), force_terminal=True, record=True, width=100, highlight=False)
    return Reporter(console=console, verbose=verbose), console.export_text


def lines(*, as_json: bool = False, verbose: bool = False) -> tuple[Reporter, io.StringIO]:
    stream = io.StringIO()
    return Reporter(stream, as_json=as_json, verbose=verbose), stream


def test_reporter_text_has_one_line_per_event() -> None:
    reporter, stream = lines()
    start(reporter)
    text = stream.getvalue().splitlines()
    assert [line.split()[0] for line in text] == [
        *("defaults", "model", "memory", "weights", "Q4_1:", "Q8_0:", "Q2_K", "compiling", "compiled", "serving")
    ]
    assert "org/[a] model: llama, 134.5 M parameters, bfloat16 on cpu" in text[1]
    assert "weights 269 MB, cache 1,075 MB, workspace about 33 MB: 1,377 MB of 16,108 MB" in text[2]
    assert "weights  269 MB in 3.1 s, 5.55 bits each: 106.2 M Q4_1, 28.3 M Q8_0; kernels: avx2, linear" in text[3]
    assert text[4:7] == [
        "  Q4_1: blk.*.{attn_k,attn_q}, blk.{3,6,8}.attn_v",
        "  Q8_0: blk.{0-2,4-5,7}.attn_v, output",
        "  Q2_K from TQ1_0: token_embd, blk.4.ffn_up",
    ]
    assert text[8] == "compiled 3 programs in 4.2 s, 2 from the cache"
    match = ADDRESS.search(text[9])
    assert match is not None
    assert match[1] == "http://127.0.0.1:8000"


@pytest.mark.parametrize("form", ["Q4_K", "BF16"])
def test_weights_in_the_one_format_of_their_file_are_one_line(form: str) -> None:
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    event = weights_loaded(1, StoredWeights(1, {form: 3}, 4.5, {(form, form): names}), 1.0, ())
    assert "\n" not in event.line
    assert event.fields["tensors"] == {form: ["model.layers.*.mlp.up_proj"]}


def test_weights_that_are_not_served_are_counted() -> None:
    skipped = {"vision_tower.a.weight": 2_000_000, "model.vision_tower.b.weight": 500_000, "mmproj-F16.gguf": 500_000}
    event = weights_loaded(1, StoredWeights(1, {"BF16": 3}, 16, {}, skipped), 1.0, ())
    assert event.line.endswith("\n  not served, for images or audio: 3 of mmproj-F16.gguf, vision_tower, 3 MB")
    assert event.fields["skipped"] == {"count": 3, "bytes": 3_000_000}


def test_reporter_json_has_all_fields() -> None:
    reporter, stream = lines(as_json=True)
    start(reporter)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert all({"time", "level", "message", "event"} <= event.keys() for event in events)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"]) for event in events)
    by_name = {event["event"]: event for event in events}
    assert len(by_name) == 7
    assert FACTS.items() <= by_name["model_found"].items()
    assert {"weights_as": "bfloat16", "devices": 1, "max_num_seqs": 16}.items() <= by_name["model_found"].items()
    plan = {"weights": 269_000_000, "cache_tokens": 44_352, "free": 16_108_000_000, "max_model_len": 8192}
    assert plan.items() <= by_name["memory_planned"].items()
    loaded = {"bytes": 269_000_000, "bits_per_weight": 5.547, "formats": {"Q4_1": 106_200_000, "Q8_0": 28_311_552}}
    loaded["message"] = "weights  269 MB in 3.1 s, 5.55 bits each: 106.2 M Q4_1, 28.3 M Q8_0; kernels: avx2, linear"
    assert loaded.items() <= by_name["weights_loaded"].items()
    assert by_name["weights_loaded"]["tensors"]["Q8_0"] == ["blk.{0-2,4-5,7}.attn_v", "output"]
    served = {"models": ["m", "alias"], "url": URL, "keyed": False, "chats": True, "documented": True}
    assert served.items() <= by_name["serving"].items()
    assert ADDRESS.search(stream.getvalue())


def test_reporter_failure_in_every_form() -> None:
    error = "m: [bold]2 tensors[/bold] are missing:\n  a\n  b"
    reporter, stream = lines()
    assert reporter.fail(StartupError(error)) == 1
    assert stream.getvalue() == f"error: {error}\n"
    reporter, stream = lines(as_json=True)
    reporter.fail(StartupError(error))
    event = json.loads(stream.getvalue())
    assert (event["level"], event["event"], event["message"]) == ("error", "failed", error)
    reporter, text = screen()
    reporter.fail(StartupError(error))
    assert reporter.fail(KeyboardInterrupt()) == 130
    assert text() == f"error: {error}\ninterrupted during start-up\n"


@pytest.mark.parametrize("verbose", [False, True])
def test_reporter_programs_only_if_verbose(verbose: bool) -> None:
    reporter, stream = lines(verbose=verbose)
    start(reporter)
    assert ("  decode_1 " in stream.getvalue()) is verbose
    reporter, text = screen(verbose=verbose)
    start(reporter)
    assert ("  decode_1 " in text()) is verbose


def test_reporter_phase_follows_progress() -> None:
    reporter, _ = lines()
    with reporter.loading() as progress:
        progress(1, 4)
        assert reporter.phase == "loading weights: 25%"
    with reporter.compiling(NAMES) as ready:
        ready(program("decode_1"))
        assert reporter.phase == "compiling: 1 of 3 programs"


def test_screen_shows_every_fact() -> None:
    reporter, screen_text = screen()
    start(reporter)
    text = screen_text()
    for part in (
        "org/[a] model",
        "llama, 134.5 M parameters, bfloat16",
        "up to 16 of 8,192 tokens each",
        "temperature 0.2, top_p 0.9",
        "weights 269 MB",
        "cache 1,075 MB",
        "free 14,731 MB",
        "44,352 tokens",
        "96.6/96.6 MB",
        "269 MB in 3.1 s, 5.55 bits each",
        "3/3",
        "compiled 3 programs in 4.2 s, 2 from the cache",
        "API       http://127.0.0.1:8000/v1",
        "docs      http://127.0.0.1:8000/docs",
        curl_command(URL, keyed=False, chats=True),
    ):
        assert part in text, part
    assert ADDRESS.search(text)


def test_screen_bar_shows_the_first_unfinished_program() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    stream = console.file
    assert isinstance(stream, io.StringIO)
    with Reporter(console=console).compiling(NAMES) as ready:
        ready(program("decode_1"))
        ready(program("zero_state"))
    assert "prefill_16" in stream.getvalue()


def test_memory_planned_warns_if_the_cache_is_below_one_request() -> None:
    small = memory_planned(dataclasses.replace(PLAN, pages=2), 8192)
    assert "less than one request" in small.line
    assert "less than one request" not in memory_planned(PLAN, 8192).line
    reporter, text = screen()
    reporter.report(small)
    assert "less than one request" in text()


def test_screen_cursor_is_restored_after_a_failure() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    stream = console.file
    assert isinstance(stream, io.StringIO)
    with pytest.raises(KeyboardInterrupt), Reporter(console=console).loading():
        raise KeyboardInterrupt
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize(
    ("log_format", "stream", "term", "draws"),
    [
        ("auto", Terminal(), "xterm", True),
        ("auto", Terminal(), "dumb", False),
        ("auto", io.StringIO(), "xterm", False),
        ("plain", Terminal(), "xterm", False),
        ("json", Terminal(), "xterm", False),
    ],
)
def test_start_reporting_depends_on_format_and_stream(
    log_format: str, stream: io.StringIO, term: str, draws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stderr", stream)
    reporter = start_reporting(parse_args(["--log-format", log_format], {}))
    assert (reporter._console is not None) is draws


def test_is_terminal_ignores_forced_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert not is_terminal(io.StringIO())


@pytest.mark.parametrize("chats", [True, False])
async def test_curl_request_is_answered_with_logprobs(chats: bool) -> None:
    words = shlex.split(curl_command(URL, keyed=False, chats=chats).replace("\\\n", ""))
    path = words[1].removeprefix(URL)
    async with serving() as server:
        answer = await server.post(path, words[words.index("-d") + 1].encode())
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["logprobs"] is not None
    assert ("message" in choice) is chats


@pytest.mark.parametrize(
    ("url", "keyed", "words"),
    [
        ("http://0.0.0.0:80", False, ["curl", "http://127.0.0.1:80/v1/chat/completions"]),
        ("http://[::]:80", False, ["curl", "http://[::1]:80/v1/chat/completions"]),
        ("https://127.0.0.1:80", False, ["curl", "--insecure", "https://127.0.0.1:80/v1/chat/completions"]),
        ("unix:/a b/s", False, ["curl", "--unix-socket", "/a b/s", "http://localhost/v1/chat/completions"]),
        ("http://127.0.0.1:80", True, ["curl", "http://127.0.0.1:80/v1/chat/completions"]),
    ],
)
def test_curl_reaches_the_server(url: str, keyed: bool, words: list[str]) -> None:
    command = curl_command(url, keyed=keyed, chats=True)
    assert shlex.split(command.replace("\\\n", ""))[: len(words)] == words
    assert ('"Authorization: Bearer $LOGPROBD_API_KEY"' in command) is keyed  # the shell expands it in double quotes


def test_startup_does_not_import_the_api() -> None:
    code = "import sys, serve.server.startup; print(*(name for name in sys.modules if name.startswith('serve.')))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = run.stdout.split()
    assert "serve.server.startup" in modules
    assert not [name for name in modules if name.startswith("serve.api")]
