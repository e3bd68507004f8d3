"""`logprobd score` from its flags to its files, on a model whose arithmetic can be done by hand."""

import csv
import errno
import fcntl
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet
import pytest

from serve import llm
from serve.cli.batch import journal
from serve.cli.batch import run as batch_run
from serve.cli.score import command, rows
from serve.cli.score.config import parse_args
from serve.server.model_files import StartupError
from tests.support.fake_runner import hidden_after
from tests.support.fake_runner import numbers as numbers_of
from tests.support.http_client import BEGIN, IMPOSSIBLE, VOCAB_SIZE, ScriptedRunner
from tests.support.scoring import (
    CONTEXT,
    RecordingReporter,
    byte_runner,
    expected_numbers,
    fake_load,
    read_lines,
    some_rows,
    write_lines,
)


@dataclass(slots=True)
class Command:
    """Runs the command in a folder."""

    folder: Path
    patch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]
    runner: ScriptedRunner = field(default_factory=byte_runner)
    fingerprint: str = "fp"
    load: Callable[..., Any] | None = None  # replaces the fake's
    err: str = ""
    out: str = ""

    def __call__(self, file: Path, *flags: str) -> int:
        """Run the command and return its exit code; the output is in `out` and `err`."""
        reporter = RecordingReporter()
        self.patch.setattr(batch_run, "start_reporting", lambda _: reporter)
        self.patch.setattr(llm, "load", self.load or fake_load(self.runner, self.fingerprint))
        code = command.main(parse_args([str(file), *flags]))
        printed = self.capture.readouterr()
        self.out, self.err = printed.out, printed.err + "\n".join(event.line for event in reporter.events)
        return code

    def rows(self, rows: list[Any], name: str = "rows.jsonl") -> Path:
        """A file of rows."""
        return write_lines(self.folder / name, rows)

    @property
    def output(self) -> list[dict[str, Any]]:
        """The rows of rows.logprobs.jsonl."""
        return read_lines(self.folder / "rows.logprobs.jsonl")

    @property
    def names(self) -> set[str]:
        """Names of all files."""
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


def fail_if_loaded(*_: object) -> Any:
    raise AssertionError("the model is loaded")


def test_rows_have_logprobs_of_tokens_and_sums(score: Command) -> None:
    texts = ["Hello, world!", "é", "x" * CONTEXT]
    assert score(score.rows([{"id": i, "text": text} for i, text in enumerate(texts)])) == 0
    assert len(score.output) == len(texts)
    total = 0.0
    for i, (text, row) in enumerate(zip(texts, score.output, strict=True)):
        ids = list(text.encode())
        logprobs, ranks = expected_numbers(ids)
        assert row["line"] == i + 1
        assert row["id"] == i
        assert row["token_ids"] == ids
        assert row["byte_lengths"] == [1] * len(ids)
        assert row["logprobs"] == logprobs
        assert row["ranks"] == ranks
        assert row["num_tokens"] == len(ids) == row["num_scored"] + 1
        assert row["logprob"] == sum(logprobs[1:])
        assert row["perplexity"] == math.exp(-row["logprob"] / (len(ids) - 1))
        assert row["bits_per_byte"] == -row["logprob"] / math.log(2) / (len(ids) - 1)
        total += row["logprob"]
    assert score.output[1]["tokens"] == [r"\xc3", r"\xa9"]
    scored = sum(len(text.encode()) - 1 for text in texts)
    assert f"perplexity  {math.exp(-total / scored):.6g}" in score.out
    assert "lines       3 scored\n" in score.out


def test_top_logprobs_adds_alternatives(score: Command) -> None:
    assert score(score.rows(["Hello"]), "--top-logprobs", "2") == 0
    [row] = score.output
    ids = list(b"Hello")
    best = numbers_of([hidden_after(ids[:n]) for n in range(1, len(ids))], ids[1:])
    assert row["top_token_ids"] == [None, *best.top_ids[:, :2].tolist()]
    assert row["top_logprobs"] == [None, *best.top_logprobs[:, :2].tolist()]


def test_probability_of_0_is_written_as_the_server_does(score: Command) -> None:
    score.runner.script = []
    assert score(score.rows([{"token_ids": [72, IMPOSSIBLE]}])) == 0
    [row] = score.output
    assert row["logprobs"] == [None, -9999.0]
    assert row["perplexity"] is None


def test_completion_has_its_own_sums(score: Command) -> None:
    rows = [
        {"prompt": "ab", "completion": "cd"},
        {"prompt": [97, 98], "completion": [99, 100]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    assert score(score.rows(rows)) == 0
    text, ids, chat = score.output
    logprobs, ranks = expected_numbers(list(b"abcd"))
    assert text["token_ids"] == ids["token_ids"] == list(b"abcd")
    assert text["completion_start"] == ids["completion_start"] == 2
    assert text["completion_logprob"] == sum(logprobs[2:])
    assert text["completion_perplexity"] == math.exp(-sum(logprobs[2:]) / 2)
    assert text["is_greedy"] is (ranks[2:] == [1, 1])
    assert bytes(chat["token_ids"]) == b"user:a;assistant:b;"
    assert chat["completion_start"] == len("user:a;")
    assert "completions 3" in score.out


def test_no_per_token_writes_only_sums(score: Command) -> None:
    assert score(score.rows(["Hello"]), "--no-per-token") == 0
    assert set(score.output[0]) == {"line", "num_tokens", "num_scored", "logprob", "perplexity", "bits_per_byte"}


@pytest.mark.parametrize("flags", [(), ("--stride", "50")], ids=str)
def test_windows_score_a_long_text_once(score: Command, flags: tuple[str, ...]) -> None:
    ids = [i * 7 % VOCAB_SIZE for i in range(3 * CONTEXT + 5)]
    assert score(score.rows([{"token_ids": ids}, "short"]), "--long", "window", *flags) == 0
    long, short = score.output
    stride = int(flags[1]) if flags else CONTEXT // 2
    expected, _ = expected_numbers(ids[:CONTEXT])
    end = CONTEXT
    while end < len(ids):
        start, end = end, min(len(ids), end + stride)
        window, _ = expected_numbers(ids[end - CONTEXT : end])
        expected += window[start - end :]
    assert long["logprobs"] == expected
    assert long["windows"] == 1 + -(-(len(ids) - CONTEXT) // stride)
    assert short["windows"] == 1


def test_truncated_row_has_no_sums_of_its_completion(score: Command) -> None:
    rows = [{"token_ids": [1] * (CONTEXT + 3)}, {"prompt": "a", "completion": "b" * CONTEXT}]
    assert score(score.rows(rows), "--long", "truncate") == 0
    plain, pair = score.output
    assert plain["num_tokens"] == CONTEXT
    assert plain["truncated"] == 3
    assert len(plain["logprobs"]) == CONTEXT
    assert pair["completion_logprob"] is None
    assert pair["is_greedy"] is None
    assert "completions" not in score.out


def test_broken_line_stops_the_run_and_the_corrected_file_resumes(score: Command) -> None:
    rows = some_rows(5)
    file = score.rows([*rows[:3], {"tex": 1}, *rows[3:]])
    assert score(file) == 1
    assert f"{file}:4: has no text" in score.err
    assert "rows.logprobs.jsonl" not in score.names
    score.rows([*rows[:3], "repaired", *rows[3:]])
    assert score(file) == 0
    assert "resuming after line 3" in score.err
    assert [row["line"] for row in score.output] == [1, 2, 3, 4, 5, 6]
    assert bytes(score.output[3]["token_ids"]) == b"repaired"


def test_on_error_skip_leaves_broken_lines_out(score: Command) -> None:
    file = score.folder / "rows.jsonl"
    file.write_bytes(b'"one"\n\n{"text": \n[]\n"two"\n' + b"x" * 3 + b'\n{"text": "\xff"}\n"three"')
    assert score(file, "--on-error", "skip") == 0
    assert [row["line"] for row in score.output] == [1, 5, 8]
    for number in (3, 4, 6, 7):
        assert f"{file}:{number}: is " in score.err
    assert "3 scored, 4 skipped" in score.out


def test_text_above_the_context_is_an_error_that_names_long(score: Command) -> None:
    assert score(score.rows(["x" * (CONTEXT + 1)])) == 1
    assert "rows.jsonl:1: has 129 tokens, above the context of 128: use --long window" in score.err


def test_nan_is_the_error_of_its_line(score: Command) -> None:
    score.runner.nan_token = ord("b")
    assert score(score.rows(["aaa", "abc", "ccc"]), "--on-error", "skip") == 0
    assert [row["line"] for row in score.output] == [1, 3]
    assert "rows.jsonl:2: the engine failed: the model computed a log-probability that is not a number" in score.err


def test_parquet_has_the_rows_of_jsonl(score: Command) -> None:
    file = score.rows([*some_rows(7), {"id": 3, "prompt": "é", "completion": "b"}, "x"])
    flags = ("--top-logprobs", "2")
    assert score(file, *flags) == 0
    assert score(file, *flags, "--output", str(score.folder / "out.parquet")) == 0
    table = pyarrow.parquet.read_table(score.folder / "out.parquet")
    rows = [{name: value for name, value in row.items() if value is not None} for row in table.to_pylist()]
    expected = [row | ({"id": str(row["id"])} if "id" in row else {}) for row in score.output]
    assert rows == [{name: value for name, value in row.items() if value is not None} for row in expected]
    assert str(table.schema.field("logprobs").type) == "list<element: float>"
    assert orjson.loads(table.schema.metadata[b"logprobd"])["fingerprint"] == "fp"
    assert not [name for name in score.names if name.endswith((".partial", ".tmp"))]


def test_csv_has_the_sums_of_each_line(score: Command) -> None:
    file = score.rows([{"id": "x, y", "text": "Hello"}, {"prompt": "a", "completion": "bc"}, {"text": "é"}])
    assert score(file) == 0
    assert score(file, "--output", str(score.folder / "out.csv")) == 0
    with (score.folder / "out.csv").open(encoding="utf-8", newline="") as stream:
        rows = [*csv.DictReader(stream)]
    assert [row["id"] for row in rows] == ["x, y", "", ""]
    for row, expected in zip(rows, score.output, strict=True):
        assert (int(row["line"]), int(row["num_tokens"])) == (expected["line"], expected["num_tokens"])
        assert float(row["logprob"]) == expected["logprob"]
        assert float(row["perplexity"]) == expected["perplexity"]
    assert float(rows[1]["completion_logprob"]) == score.output[1]["completion_logprob"]
    assert rows[0]["completion_logprob"] == ""
    assert "token_ids" not in rows[0]


def test_complete_output_is_kept_without_loading_a_model(score: Command) -> None:
    file = score.rows(some_rows(3))
    assert score(file) == 0
    previous, summary = score.output, score.out.splitlines()[:3]
    score.load = fail_if_loaded
    assert score(file) == 0
    assert score.output == previous
    assert score.out.splitlines()[:3] == summary
    assert "the output was complete" in score.out
    before_text = file.read_bytes()
    file.write_bytes(before_text + b'\n"one more"')
    assert score(file) == 1
    assert "rows.jsonl has a new line 5; use --overwrite" in score.err
    file.write_bytes(before_text.replace(b"row 1", b"row 7"))  # as long as before
    assert score(file) == 1
    assert "rows.jsonl has changed up to line" in score.err
    assert score.output == previous


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_keeps_finished_rows_and_the_same_command_resumes(score: Command, number: int) -> None:
    file = score.rows(some_rows(40))
    flags = ("--max-num-seqs", "1")

    def stop(name: str) -> None:
        if name == "score" and len(score.runner.calls) > 60:
            os.kill(os.getpid(), number)

    # Sent at every later step. If the command did not handle it, it would end the tests.
    previous = signal.signal(number, lambda *_: None)
    score.runner.before_call = stop
    try:
        assert score(file, *flags) == 128 + number
    finally:
        signal.signal(number, previous)
    assert "run the same command again to resume" in score.err
    partial = score.folder / "rows.logprobs.jsonl.partial"
    assert 0 < len(read_lines(partial)) < 40
    score.runner.before_call = lambda _: None
    assert score(file, *flags) == 0
    assert [row["line"] for row in score.output] == list(range(1, 41))
    assert score(file, *flags, "--output", str(score.folder / "whole.jsonl")) == 0
    assert read_lines(score.folder / "whole.jsonl") == score.output


def stopped_run(score: Command) -> Path:
    """A file whose scoring stopped after its second line."""
    file = score.rows(["one", "two", 3])
    assert score(file) == 1
    return file


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dtype", "float32"), "started with --dtype auto, not float32"),
        (("--kv-cache-dtype", "float32"), "--kv-cache-dtype auto, not float32"),
        (("--top-logprobs", "1"), "--top-logprobs 0, not 1"),
        (("--long", "window"), "--long error, not window"),
        (("--no-per-token",), "--per-token True, not False"),
        (("--format", "parquet", "--output", "{}/rows.logprobs.jsonl"), "format jsonl, not parquet"),
        (("--limit", "1"), "--limit unset, not 1"),
    ],
    ids=" ".join,
)
def test_resume_refuses_other_options(score: Command, flags: tuple[str, ...], message: str) -> None:
    file = stopped_run(score)
    assert score(file, *(flag.format(score.folder) for flag in flags)) == 1
    assert message in score.err
    assert len(read_lines(score.folder / "rows.logprobs.jsonl.partial")) == 2


def test_resume_refuses_other_weights_programs_or_lines(score: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    file = stopped_run(score)
    score.fingerprint = "other"
    assert score(file) == 1
    assert "fingerprint fp, not other" in score.err
    score.fingerprint = "fp"
    score.rows(["one", "too", "three"])
    assert score(file) == 1
    assert "has changed up to line 2" in score.err
    monkeypatch.setattr(batch_run, "files_digest", lambda *_: "other")
    assert score(file) == 1
    assert "started with weights " in score.err


def test_overwrite_starts_again(score: Command) -> None:
    file = stopped_run(score)
    score.rows(["four"])
    assert score(file, "--overwrite", "--top-logprobs", "1") == 0
    assert [bytes(row["token_ids"]) for row in score.output] == [b"four"]


def test_overwrite_changes_no_file_before_the_model_is_loaded(score: Command) -> None:
    file = score.rows(["one"])
    assert score(file) == 0
    previous = score.output

    def refuse(*_: object) -> Any:
        raise StartupError("it does not fit")

    score.load = refuse
    for flags in ((), ("--model", str(score.folder / "none")), ("--long", "window", "--stride", "1000000")):
        assert score(file, "--overwrite", *flags) == 1
        assert score.output == previous
    score.load = fail_if_loaded
    assert score(file) == 0
    assert "the output was complete" in score.out
    score.load = None
    score.rows([1])
    assert score(file, "--overwrite") == 1
    assert "rows.jsonl:1: is neither" in score.err
    assert score.output == previous


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--long", "window"), "context 128, not 64, context stride 64, not 32"),
        (("--long", "window", "--stride", "20"), "context 128, not 64"),
        (("--long", "truncate"), "context 128, not 64"),
        ((), None),  # a text that fits has the same numbers in any context
    ],
    ids=str,
)
def test_resume_refuses_another_context(score: Command, flags: tuple[str, ...], message: str | None) -> None:
    file = score.rows(["one", 2])
    assert score(file, *flags) == 1
    score.rows(["one", "two"])
    score.load = fake_load(score.runner, context=64)
    assert score(file, *flags) == (0 if message is None else 1)
    assert message is None or message in score.err


def test_special_tokens_do_not_count_as_text(score: Command) -> None:
    ids = [*b"ab", BEGIN, *b"c"]
    assert score(score.rows([{"token_ids": ids}])) == 0
    [row] = score.output
    logprobs, _ = expected_numbers(ids)
    assert row["logprob"] == pytest.approx(sum(logprobs[1:]))
    assert row["byte_lengths"] == [1, 1, len("<begin>"), 1]
    assert row["bits_per_byte"] == pytest.approx(-(logprobs[1] + logprobs[3]) / math.log(2) / 2)


def test_write_error_names_the_output(score: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal.Journal, "save", full)
    assert score(score.rows(["one"])) == 1
    assert score.err == f"error: {score.folder}/rows.logprobs.jsonl: No space left on device"


def test_config_file_may_name_the_input(score: Command) -> None:
    file, flags = score.rows(["Hello"]), score.folder / "flags.yaml"
    flags.write_text("top-logprobs: 1\n")
    assert parse_args([str(file), "--config", str(flags)]).top_logprobs == 1
    flags.write_text(f"file: {file}\n")
    assert parse_args(["--config", str(flags)]).file == file
    assert parse_args(["other.jsonl", "--config", str(flags)]).file == Path("other.jsonl")


def test_output_without_a_checkpoint_is_not_touched(score: Command) -> None:
    file = score.rows(["one"])
    mine = score.folder / "rows.logprobs.jsonl"
    mine.write_text("mine")
    assert score(file) == 1
    assert "--overwrite" in score.err
    assert mine.read_text() == "mine"


def test_two_processes_cannot_write_one_output(score: Command) -> None:
    file = stopped_run(score)
    paths = journal.Paths(score.folder / "rows.logprobs.jsonl")
    with journal.open_rows(paths):
        for flags in ((), ("--overwrite",)):
            assert score(file, *flags) == 1
            assert "another process writes" in score.err
    assert len(read_lines(paths.partial)) == 2


def test_output_is_locked_until_it_is_converted(score: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    file, flags = score.rows(["one"]), ("--output", str(score.folder / "out.parquet"))
    other = Command(score.folder, score.patch, score.capture)
    write, others = rows.write_parquet, []

    def write_beside_another(*arguments: Any, **options: Any) -> None:
        others.append(other(file, *flags))
        write(*arguments, **options)

    monkeypatch.setattr(command, "write_parquet", write_beside_another)
    assert score(file, *flags) == 0
    assert others == [1]
    assert "another process writes" in other.err


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=str)
def test_process_that_waits_for_the_lock_does_not_reuse_the_output(
    score: Command, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    file = stopped_run(score)
    score.rows(["one", "two", "three"])
    other = Command(score.folder, score.patch, score.capture)
    flock, calls = fcntl.flock, []

    def finished_before(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            assert other(file) == 0
            if flags:  # the new run fails and leaves no output
                score.rows([1])
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", finished_before)
    assert score(file, *flags) == (1 if flags else 0)
    assert [row["line"] for row in score.output] == [1, 2, 3]
    assert "the output was complete" in score.out or flags
    assert "rows.logprobs.jsonl.partial" not in score.names


def test_resume_refuses_missing_rows(score: Command) -> None:
    file = stopped_run(score)
    partial = score.folder / "rows.logprobs.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:-1])
    assert score(file) == 1
    assert "lacks rows that rows.logprobs.jsonl.meta.json lists" in score.err
    partial.unlink()
    assert score(file) == 1
    assert "lacks rows that rows.logprobs.jsonl.meta.json lists" in score.err
    assert not partial.exists()


def test_failed_start_leaves_no_files(score: Command) -> None:
    file = score.rows(["one"])

    def refuse(*_: object) -> Any:
        raise StartupError("it does not fit")

    score.load = refuse
    assert score(file) == 1
    assert score.err == "error: it does not fit"
    assert score.names == {"rows.jsonl"}


def test_unusable_file_is_reported_in_one_line(score: Command) -> None:
    assert score(score.folder / "none.jsonl") == 1
    assert score.err == f"error: {score.folder}/none.jsonl: cannot be read: No such file or directory"
    file = score.rows(["one"])
    assert score(file, "--output", str(score.folder / "no" / "out.jsonl")) == 1
    assert "there is no folder" in score.err
    assert score(file, "--long", "window", "--stride", str(CONTEXT)) == 1
    assert "--stride 128: must be below the context of 128 tokens" in score.err


def test_empty_file_has_an_empty_output(score: Command) -> None:
    file = score.rows([])
    for name in ("out.jsonl", "out.parquet"):
        assert score(file, "--output", str(score.folder / name)) == 0
    assert (score.folder / "out.jsonl").read_bytes() == b""
    assert pyarrow.parquet.read_table(score.folder / "out.parquet").num_rows == 0


def test_limit_scores_the_first_lines(score: Command) -> None:
    assert score(score.rows(["one", "two", "three"]), "--limit", "2") == 0
    assert [row["line"] for row in score.output] == [1, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "FILE"),
        (("rows", "--stride", "5"), "--stride"),
        (("rows", "--top-logprobs", "1", "--no-per-token"), "--top-logprobs"),
        (("rows", "--top-logprobs", "1", "--output", "x.csv"), "write .jsonl or .parquet"),
        (("rows", "--output", "rows"), "--output"),
        (("rows", "--long", "never"), "--long"),
        (("rows", "--seed", "1"), "--seed"),
        (("rows", "--generation-config", "vllm"), "--generation-config"),
        (("rows", "--max-num-queued-reqs", "2"), "--max-num-queued-reqs"),
    ],
    ids=str,
)
def test_parse_args_exits_with_code_2_and_names_the_flag(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(parse_args(flags))
    assert ended.value.code == 2
    assert message.lower() in capsys.readouterr().err.lower()


def test_killed_run_resumes_without_gaps_or_duplicates(tmp_path: Path) -> None:
    """At each fsync, in forks of one process: tests.support.scoring says how."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.scoring", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    kills = dict(line.split() for line in run.stdout.splitlines() if line.startswith(("jsonl ", "parquet ")))
    assert int(kills["jsonl"]) > 10
    assert int(kills["parquet"]) > 10


def test_add_special_tokens_applies_to_texts_only(score: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support import scoring
    from tests.support.http_client import byte_tokenizer

    monkeypatch.setattr(scoring, "byte_tokenizer", lambda: byte_tokenizer(add_bos=True))
    file = score.rows(["ab", {"prompt": "a", "completion": "b"}, {"messages": [{"role": "user", "content": "x"}]}])
    assert score(file) == 0
    text, pair, chat = score.output
    assert text["token_ids"] == pair["token_ids"] == [BEGIN, 97, 98]
    assert pair["completion_start"] == 2
    assert chat["token_ids"] == list(b"user:x;")
    assert score(file, "--no-add-special-tokens", "--overwrite") == 0
    assert score.output[0]["token_ids"] == [97, 98]
