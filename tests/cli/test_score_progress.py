"""What is shown while a file is scored."""

import io
import json
from logging import WARNING

import pytest

from serve.cli.score import progress
from serve.cli.score.progress import open_meter
from serve.cli.score.totals import Sums, perplexity, summary

SUMS = Sums(lines=3, skipped=1, scored=10, tokens=13, logprob=-10.0, text_logprob=-9.0, bytes=20, rank_1=4)


class Terminal(io.StringIO):
    """A terminal of which all that is shown is kept."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_and_messages_stand_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with open_meter(stream, "auto", 0) as meter:
        meter.say("rows.jsonl:2: [bold]is broken", WARNING)
        meter.at(0.5, SUMS)
    shown = stream.getvalue()
    assert "rows.jsonl:2: [bold]is broken" in shown
    for part in ("scoring", "━", "50%", "4 lines", "10 tokens", "tokens/s", "perplexity 2.718"):
        assert part in shown


def test_elsewhere_there_are_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with open_meter(stream, "auto", 0) as meter:
        meter.at(0.25, SUMS)
        monkeypatch.setattr(progress, "_EVERY", 0.0)
        meter.at(0.5, SUMS)
        meter.say("a message")
    first, second = stream.getvalue().splitlines()
    assert first.startswith("scoring  50.0%, 4 lines, 10 tokens, ")
    assert first.endswith(" tokens/s, perplexity 2.718")
    assert second == "a message"


def test_lines_may_be_json() -> None:
    stream = io.StringIO()
    with open_meter(stream, "json", 0) as meter:
        meter.say("broken", WARNING)
    told = json.loads(stream.getvalue())
    assert (told["level"], told["message"]) == ("warning", "broken")


def test_the_summary_says_what_there_is() -> None:
    told = dict(summary(SUMS))
    assert told["lines"] == "3 scored, 1 skipped"
    assert told["tokens"] == "10 scored of 13"
    assert told["log-prob"] == "-1.000000 a token"
    assert told["perplexity"] == "2.71828"
    assert told["bits/byte"] == "0.649213"
    assert told["rank 1"] == "40.00% of the tokens"
    assert "completions" not in told
    assert dict(summary(Sums())) == {"lines": "0 scored", "tokens": "0 scored of 0"}


def test_a_perplexity_that_no_float_holds_is_none() -> None:
    assert perplexity(-9999.0, 1) is None
    assert perplexity(0.0, 0) is None
    assert dict(summary(Sums(lines=1, scored=1, logprob=-9999.0)))["perplexity"] == "none"
