"""Progress and totals of a scoring."""

import io
import json
from logging import WARNING
from pathlib import Path

import pytest

from serve.cli.batch import run
from serve.cli.batch.run import Meter
from serve.cli.score.command import Scoring
from serve.cli.score.config import ScoreConfig
from serve.cli.score.rows import Sums
from serve.jobs.results import perplexity

SCORING = Scoring(ScoreConfig(file=Path("rows.jsonl")))
SUMS = Sums(lines=3, skipped=1, scored=10, tokens=13, logprob=-10.0, text_logprob=-9.0, bytes=20, rank_1=4)


class Terminal(io.StringIO):
    """A terminal that records its output."""

    def isatty(self) -> bool:
        return True


def test_meter_shows_a_bar_and_messages_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Meter(stream, "auto", SCORING, 0) as meter:
        meter.message("rows.jsonl:2: [bold]is broken", WARNING)
        meter.update(0.5, SUMS)
    output = stream.getvalue()
    assert "rows.jsonl:2: [bold]is broken" in output
    for part in ("scoring", "━", "50%", "4 lines", "10 tokens", "tokens/s", "perplexity 2.718"):
        assert part in output


def test_meter_writes_a_line_per_interval_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with Meter(stream, "auto", SCORING, 0) as meter:
        meter.update(0.25, SUMS)
        monkeypatch.setattr(run, "_INTERVAL", 0.0)
        meter.update(0.5, SUMS)
        meter.message("a message")
    first, second = stream.getvalue().splitlines()
    assert first.startswith("scoring  50.0%, 4 lines, 10 tokens, ")
    assert first.endswith(" tokens/s, perplexity 2.718")
    assert second == "a message"


def test_meter_writes_json_lines() -> None:
    stream = io.StringIO()
    with Meter(stream, "json", SCORING, 0) as meter:
        meter.message("broken", WARNING)
    line = json.loads(stream.getvalue())
    assert (line["level"], line["message"]) == ("warning", "broken")


def test_summary_has_entries_for_what_was_scored() -> None:
    entries = dict(SUMS.summary())
    assert entries["lines"] == "3 scored, 1 skipped"
    assert entries["tokens"] == "10 scored of 13"
    assert entries["log-prob"] == "-1.000000 per token"
    assert entries["perplexity"] == "2.71828"
    assert entries["bits/byte"] == "0.649213"
    assert entries["rank 1"] == "40.00% of the tokens"
    assert "completions" not in entries
    assert dict(Sums().summary()) == {"lines": "0 scored", "tokens": "0 scored of 0"}


def test_perplexity_is_none_if_it_overflows_or_has_no_tokens() -> None:
    assert perplexity(-9999.0, 1) is None
    assert perplexity(0.0, 0) is None
    assert dict(Sums(lines=1, scored=1, logprob=-9999.0).summary())["perplexity"] == "none"
