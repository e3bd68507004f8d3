"""`score` with a fake model whose log-probs can be computed by hand. As a program, it kills `score` at every fsync.

The tokenizer is that of tests.support.http_client: one token per byte.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import orjson

from compiled.runner import ModelRunner
from compiled.state import MAX_REQUESTED_IDS
from model.kv_cache import PAGE_SIZE
from serve import llm
from serve.cli.batch import journal
from serve.cli.batch import run as batch_run
from serve.cli.score import command
from serve.cli.score.config import parse_args
from serve.config.engine_config import EngineConfig
from serve.config.generation_config import GenerationDefaults
from serve.engine.request import EngineLimits
from serve.llm import LLM
from serve.server.console import Reporter
from serve.server.startup import Loaded
from serve.server.startup_events import Event
from tests.support.fake_runner import FakeRunner, K, hidden_after, numbers
from tests.support.http_client import VOCAB_SIZE, ScriptedRunner, byte_tokenizer

CONTEXT = 128  # tokens


def byte_runner() -> ScriptedRunner:
    """Return a runner for the byte tokenizer."""
    return ScriptedRunner(None, pages=64, pages_per_row=CONTEXT // PAGE_SIZE)


def scripted_runner(script: bytes) -> ScriptedRunner:
    """Return a runner for the byte tokenizer that generates `script`."""
    return ScriptedRunner(script, pages=64, pages_per_row=CONTEXT // PAGE_SIZE)


def fake_load(
    runner: FakeRunner, fingerprint: str = "fp", context: int = CONTEXT
) -> Callable[[EngineConfig, Reporter], Loaded]:
    """Return a replacement of serve.server.startup.load."""

    def load(config: EngineConfig, _: Reporter) -> Loaded:
        limits = EngineLimits(
            max_model_len=context,
            max_logprobs=K,
            vocab_size=VOCAB_SIZE,
            cache_tokens=(runner.pages - 1) * PAGE_SIZE,
            max_requested_ids=MAX_REQUESTED_IDS,
            full_vocab=False,
        )
        defaults = GenerationDefaults()
        model = cast("ModelRunner", runner)
        return Loaded("fake", model, byte_tokenizer(), limits, fingerprint, defaults, config)

    return load


def open_llm(runner: FakeRunner, config: EngineConfig, context: int = CONTEXT) -> LLM:
    """An LLM on a fake runner."""
    with patch.object(llm, "load", fake_load(runner, context=context)):
        return LLM.open(config, Reporter(None))


class RecordingReporter(Reporter):
    """A reporter that records events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def report(self, event: Event) -> None:
        self.events.append(event)


def expected_numbers(token_ids: Sequence[int]) -> tuple[list[Any], list[Any]]:
    """Return log-probs and ranks of a text without truncation; None for the first token."""
    hidden = [hidden_after(token_ids[:n]) for n in range(1, len(token_ids))]
    scores = numbers(hidden, token_ids[1:])
    return [None, *scores.logprob.tolist()], [None, *scores.rank.tolist()]


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """Write JSONL."""
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSONL."""
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def some_rows(number: int) -> list[dict[str, str]]:
    """Return rows with random printable ASCII texts."""
    random = np.random.default_rng(number)
    texts = [bytes(random.integers(32, 127, n).tolist()) for n in random.integers(2, 100, number)]
    return [{"id": f"row {i}", "text": text.decode()} for i, text in enumerate(texts)]


def _killed_at(number: int, run: Callable[[], int]) -> int:
    """Run, and kill the process at the (number + 1)th fsync."""
    remaining, real = number, os.fsync

    def fsync(handle: int) -> None:
        nonlocal remaining
        if remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        remaining -= 1
        real(handle)

    with patch.object(os, "fsync", fsync):
        return run()


def _in_a_fork(run: Callable[[], int]) -> int:
    """Run in a forked process and return its wait status."""
    process = os.fork()
    if process == 0:
        os._exit(run())
    return os.waitpid(process, 0)[1]


def _survived(rows: Path, output: Path, first: int) -> int:
    """Kill a run and its continuation at each fsync from `first` on, finish it, and return the number of kills."""
    paths = journal.Paths(output)
    uninterrupted = output.with_stem("uninterrupted")

    def run(to: Path = output) -> int:
        return command.main(parse_args([str(rows), "--output", str(to)]))

    assert _in_a_fork(lambda: run(uninterrupted)) == 0
    for number in count(first):
        for path in (paths.output, paths.partial, paths.meta):
            path.unlink(missing_ok=True)
        status = _in_a_fork(partial(_killed_at, number, run))
        if status == 0:
            return number
        assert status == signal.SIGKILL, status
        if paths.meta.exists() and paths.partial.exists():
            with paths.partial.open("ab") as file:
                file.write(b'{"line":9')  # a partially written row
        assert _in_a_fork(partial(_killed_at, 4, run)) in (0, signal.SIGKILL)
        assert _in_a_fork(run) == 0
        assert output.read_bytes() == uninterrupted.read_bytes(), f"killed at fsync {number}"
    raise AssertionError("the run never completed")


def main(folder: Path) -> None:
    """Print the number of survived kills per format, or raise."""
    with (
        patch.object(llm, "load", fake_load(byte_runner())),
        patch.object(batch_run, "start_reporting", lambda _: Reporter(sys.stderr)),
        patch.object(journal, "_INTERVAL", 0.0),  # a checkpoint after each line
    ):
        rows = write_lines(folder / "rows.jsonl", some_rows(3))
        kills = _survived(rows, folder / "out.jsonl", 0)
        print("jsonl", kills)
        print("parquet", _survived(rows, folder / "out.parquet", kills - 4))  # only the ends differ


if __name__ == "__main__":
    main(Path(sys.argv[1]))
