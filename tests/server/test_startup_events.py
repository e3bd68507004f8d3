"""What start-up tells: lines, JSON objects and a screen, and the command that it gives to try the server with."""

import dataclasses
import io
import json
import re
import shlex
from collections.abc import Callable

import pytest
from rich.console import Console

from serve.server.console import ScreenReporter
from serve.server.report import Reporter, is_terminal, reporter_for
from serve.server.report_curl import curl_command
from serve.server.report_lines import LineReporter
from serve.server.startup_events import (
    AllCompiled,
    DefaultsTaken,
    Failed,
    Interrupted,
    MemoryPlanned,
    ModelFound,
    ProgramCompiled,
    Serving,
    WeightsLoaded,
)
from tests.support.http_client import serving

ADDRESS = re.compile(r"serving .* at (http://127\.0\.0\.1:\d+)")  # how tests and the bench find a server
MODEL = ModelFound("org/[a] model", "llama", 134_515_008, "bfloat16", "cpu", "cpu", 1, 8192, 16)
PLAN = MemoryPlanned(269_000_000, 1_075_000_000, 44_352, 33_000_000, 16_108_000_000, 8192)
SERVING = Serving(("m", "alias"), "http://127.0.0.1:8000", keyed=False, chats=True, documented=True)
NAMES = ("zero_state", "decode_1", "prefill_16")


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def program(name: str) -> ProgramCompiled:
    return ProgramCompiled(name, 0.25, 0.5, 2**20)


def start(reporter: Reporter) -> None:
    """All that a good start tells."""
    reporter.tell(DefaultsTaken({"temperature": 0.2, "top_p": 0.9}))
    reporter.tell(MODEL)
    reporter.tell(PLAN)
    with reporter.loading() as progress:
        progress(1_000_000, 96_600_000)
        progress(96_600_000, 96_600_000)
    reporter.tell(WeightsLoaded(269_000_000, 3.1, ("avx2", "linear")))
    with reporter.compiling(NAMES) as ready:
        for name in NAMES:
            ready(program(name))
    reporter.tell(AllCompiled(3, 2, 4.2))
    reporter.tell(SERVING)


def screen(*, width: int = 100, verbose: bool = False) -> tuple[ScreenReporter, Callable[[], str]]:
    """A reporter on a forced terminal, and what is on it in the end, without colours."""
    console = Console(
        file=io.StringIO(), force_terminal=True, record=True, width=width, highlight=False, color_system="truecolor"
    )
    return ScreenReporter(console, verbose=verbose), console.export_text


def test_plain_lines_each_mean_something_alone() -> None:
    stream = io.StringIO()
    start(LineReporter(stream))
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == [
        *("defaults", "model", "memory", "weights", "compiling", "compiled", "serving")
    ]
    assert "org/[a] model: llama, 134.5 M parameters, bfloat16 on cpu" in lines[1]
    assert "weights 269 MB, cache 1,075 MB, workspace about 33 MB: 1,377 MB of 16,108 MB" in lines[2]
    assert lines[5] == "compiled 3 programs in 4.2 s, 2 of them from the cache"
    found = ADDRESS.search(lines[6])
    assert found is not None
    assert found[1] == "http://127.0.0.1:8000"


def test_json_lines_have_all_fields() -> None:
    stream = io.StringIO()
    start(LineReporter(stream, as_json=True))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert all({"time", "level", "message", "event"} <= event.keys() for event in events)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"]) for event in events)
    by_name = {event["event"]: event for event in events}
    assert len(by_name) == 7
    for told in (MODEL, PLAN):
        assert dataclasses.asdict(told).items() <= by_name[told.name].items()
    assert by_name["serving"]["models"] == ["m", "alias"]
    assert ADDRESS.search(stream.getvalue())


def test_failures_in_every_form() -> None:
    error = "m: [bold]2 tensors[/bold] are missing:\n  a\n  b"
    plain, as_json = io.StringIO(), io.StringIO()
    LineReporter(plain).tell(Failed(error))
    assert plain.getvalue() == f"error: {error}\n"
    LineReporter(as_json, as_json=True).tell(Failed(error))
    (line,) = as_json.getvalue().splitlines()
    told = json.loads(line)
    assert (told["level"], told["event"], told["message"]) == ("error", "failed", error)
    reporter, shown = screen()
    reporter.tell(Failed(error))
    reporter.tell(Interrupted())
    assert shown() == f"error: {error}\n{Interrupted().line}\n"


def test_programs_are_told_only_where_it_is_asked_for() -> None:
    for verbose in (False, True):
        stream = io.StringIO()
        start(LineReporter(stream, verbose=verbose))
        assert ("  decode_1 " in stream.getvalue()) is verbose
        reporter, shown = screen(verbose=verbose)
        start(reporter)
        assert ("  decode_1 " in shown()) is verbose


def test_the_screen_shows_everything() -> None:
    reporter, shown = screen()
    start(reporter)
    text = shown()
    for part in (
        "org/[a] model",
        "llama, 134.5 M parameters, bfloat16",
        "16 at once, of at most 8,192 tokens",
        "temperature 0.2, top_p 0.9",
        "█ weights       269 MB",
        "▓ cache       1,075 MB  44,352 tokens",
        "░ left free  14,731 MB",
        "96.6/96.6 MB",
        "269 MB of weights in 3.1 s; kernels: avx2, linear",
        "3/3",
        "3 programs compiled in 4.2 s (2 from the cache)",
        "API       http://127.0.0.1:8000/v1",
        "inspector http://127.0.0.1:8000/",
        "docs      http://127.0.0.1:8000/docs",
        curl_command(SERVING),
    ):
        assert part in text, part
    assert ADDRESS.search(text)


def test_each_part_of_the_memory_has_its_share_of_the_bar() -> None:
    reporter, shown = screen(width=60)
    reporter.tell(dataclasses.replace(PLAN, weights=500, cache=250, workspace=1, free=1000))
    bar = shown().splitlines()[0].removeprefix("memory    ")
    assert [bar.count(shade) for shade in "█▓▒░"] == [25, 12, 1, 12]
    reporter, shown = screen(width=60)
    reporter.tell(dataclasses.replace(PLAN, weights=500, cache=500, workspace=0, free=None))
    bar, *rows = shown().splitlines()
    assert [bar.count(shade) for shade in "█▓▒░"] == [25, 25, 0, 0]
    assert "not told" in rows[3]


def test_a_cache_below_one_request_is_a_warning() -> None:
    small = dataclasses.replace(PLAN, cache_tokens=64)
    assert "less than one request" in small.line
    assert "less than one request" not in PLAN.line
    reporter, shown = screen()
    reporter.tell(small)
    assert "less than one request" in shown()


def test_the_bar_names_a_program_that_is_in_work() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    stream = console.file
    assert isinstance(stream, io.StringIO)
    with ScreenReporter(console).compiling(NAMES) as ready:
        ready(program("decode_1"))
        ready(program("zero_state"))
    assert "prefill_16" in stream.getvalue()  # the one that was not ready when the bar was drawn for the last time


def test_the_cursor_comes_back_after_a_failure() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    stream = console.file
    assert isinstance(stream, io.StringIO)
    with pytest.raises(KeyboardInterrupt), ScreenReporter(console).loading():
        raise KeyboardInterrupt
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize(
    ("log_format", "stream", "term", "kind"),
    [
        ("auto", Terminal(), "xterm", ScreenReporter),
        ("auto", Terminal(), "dumb", LineReporter),
        ("auto", io.StringIO(), "xterm", LineReporter),
        ("plain", Terminal(), "xterm", LineReporter),
        ("json", Terminal(), "xterm", LineReporter),
    ],
)
def test_the_form_follows_the_stream(
    log_format: str, stream: io.StringIO, term: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    assert isinstance(reporter_for(log_format, stream=stream), kind)


def test_forced_colours_make_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert not is_terminal(io.StringIO())


@pytest.mark.parametrize("chats", [True, False])
async def test_the_command_asks_what_the_server_answers(chats: bool) -> None:
    words = shlex.split(curl_command(dataclasses.replace(SERVING, chats=chats)).replace("\\\n", ""))
    path = words[1].removeprefix(SERVING.url)
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
def test_the_command_reaches_the_server(url: str, keyed: bool, words: list[str]) -> None:
    command = curl_command(dataclasses.replace(SERVING, url=url, keyed=keyed))
    assert shlex.split(command.replace("\\\n", ""))[: len(words)] == words
    assert ('"Authorization: Bearer $LOGPROBD_API_KEY"' in command) is keyed  # in double quotes: the shell fills it in
