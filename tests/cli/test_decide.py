"""`logprobd decide` from its flags to its files, on a model whose arithmetic can be done by hand."""

import dataclasses
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve import llm
from serve.cli.batch import run as batch_run
from serve.cli.decide import command, config
from serve.cli.decide.config import parse_args
from serve.llm import LLM
from serve.text.decisions.questions import MAX_ORDERS, ScoringOptions
from tests.support.http_client import ScriptedRunner
from tests.support.scoring import RecordingReporter, fake_load, read_lines, write_lines

CONTEXT = 1024  # tokens
CHOICE = {"type": "choice", "instructions": "Which?", "criteria": {"aa": None, "b": "x", "ccc": None}}
# The tokenizer has a token per byte, so "Yes" and "No" are none.
NOUL = {"type": "noul", "instructions": "Good?", "labels": {"true": "Y", "false": "N"}}
SCORE = {"type": "score", "instructions": "How?", "criteria": ["low", "mid", "high"]}
QUESTIONS = {"which": CHOICE, "good": NOUL, "how": SCORE}
OPENAI = {
    "input": "It works.",
    "questions": [
        {"type": "predicate", "name": "good", "instructions": "Good?", "labels": {"true": "Y", "false": "N"}},
        {"type": "choice", "name": "pick", "instructions": "Which?", "choices": [{"value": True}, {"value": "true"}]},
    ],
}


class Command:
    """Runs the command in a folder."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.patch, self.capture = folder, patch, capture
        self.runner = self.new_runner()
        self.load: Callable[..., Any] | None = None
        self.out = self.err = ""

    @staticmethod
    def new_runner() -> ScriptedRunner:
        return ScriptedRunner(None, pages=128, pages_per_row=CONTEXT // 64)

    def __call__(self, rows: list[Any], *flags: str) -> int:
        """Run the command on rows and return its exit code; the output is in `out` and `err`."""
        return self.run(write_lines(self.folder / "rows.jsonl", rows), *flags)

    def run(self, file: Path, *flags: str) -> int:
        reporter = RecordingReporter()
        self.patch.setattr(batch_run, "start_reporting", lambda _: reporter)
        self.patch.setattr(llm, "load", self.load or fake_load(self.runner, context=CONTEXT))
        code = command.main(parse_args([str(file), *flags]))
        printed = self.capture.readouterr()
        self.out, self.err = printed.out, printed.err + "\n".join(event.line for event in reporter.events)
        return code

    @property
    def output(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "rows.decisions.jsonl")


@pytest.fixture
def decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


def state(number: int, **fields: Any) -> dict[str, Any]:
    return {"state": f"State {number}.", "questions": QUESTIONS} | fields


def in_python(command: Command, rows: list[dict[str, Any]], **options: Any) -> list[Any]:
    """What `LLM.decide` returns."""
    command.patch.setattr(llm, "load", fake_load(command.new_runner(), context=CONTEXT))
    with LLM() as model:
        return model.decide(
            [{key: row[key] for key in row if key not in ("id", "expected")} for row in rows], **options
        )


def without_labels(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_labels(item) for key, item in value.items() if key != "labels"}
    return [*map(without_labels, value)] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"scoring": "permutations", "permutations": 2},
        {"scoring": "sequences", "normalize": "pmi"},
    ],
    ids=str,
)
def test_rows_have_the_answers_of_llm_decide(decide: Command, options: dict[str, Any]) -> None:
    rows: list[Any] = [state(1, id="x"), OPENAI, state(2)]
    if options.get("scoring") == "sequences":
        rows = without_labels(rows)
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert decide(rows, *flags) == 0
    first, openai, last = decide.output
    assert [(row["line"], row.get("id")) for row in decide.output] == [(1, "x"), (2, None), (3, None)]
    expected = in_python(decide, rows, **options)
    for row, (which, good, how) in ((first, expected[0]), (last, expected[2])):
        assert [*row["answers"]] == ["which", "good", "how"]
        answers = row["answers"]
        assert answers["which"]["probabilities"] == dict(zip(("aa", "b", "ccc"), which.probabilities, strict=True))
        assert answers["which"]["choice"] == which.choice
        assert answers["good"]["noul"] == good.probability
        assert [*answers["how"]["probabilities"].values()] == [*how.probabilities]
        assert answers["how"]["legend"] == {"0": "low", "1": "mid", "2": "high"}
        assert answers["how"]["evidence"]["logprobs"] == [*how.evidence.logprobs]
        assert answers["how"]["evidence"]["scoring"] == options.get("scoring", "labels")
    good, _ = expected[1]
    assert [answer["name"] for answer in openai["answers"]] == ["good", "pick"]
    assert openai["answers"][0]["probability"] == good.probability
    assert [item["value"] for item in openai["answers"][1]["probabilities"]] == [True, "true"]
    assert "lines       3 answered\n" in decide.out
    assert "decisions   8\n" in decide.out
    assert "accuracy" not in decide.out


def test_invalid_lines_get_a_row_that_names_the_field(decide: Command) -> None:
    noul = {"q": NOUL}
    rows: list[tuple[bytes, str | None, str]] = [
        (b'{"state": ', None, "is not JSON"),
        (b"[1]", None, "is not a JSON object"),
        (b'{"state": "a"}', "questions", "must be an object of questions"),
        (b'{"questions": {}}', "state", "`state` or `input` is missing"),
        (b'{"state": "a", "questions": {"q": {"type": "nuol"}}}', "questions.q.type", "must be one of"),
        (b'{"state": {"k": [{"a": 1, "a": 2}]}, "questions": {}}', "state.k[0].a", "'a' occurs more than once"),
        (b'{"state": "a", "questions": {"q": {}, "q": {}}}', "questions.q", "'q' occurs more than once"),
        (b'{"input": "a", "questions": [{"name": "q", "name": "q"}]}', "questions[0].name", "'name' occurs more"),
        (b'{"id": 1, "id": 2, "state": "a", "questions": {}}', "id", "'id' occurs more than once"),
    ]
    values: list[tuple[dict[str, Any], str, str]] = [
        ({"state": "a", "questions": noul, "expectd": {}}, "expectd", "did you mean 'expected'?"),
        ({"state": "a", "questions": noul, "temperature": 2}, "temperature", "use --temperature"),
        ({"state": "a", "questions": noul, "expected": True}, "expected", "must be an object"),
        ({"state": "a", "questions": noul, "expected": {"r": True}}, "expected.r", "no question has this name"),
        ({"state": "a", "questions": noul, "expected": {"q": "true"}}, "expected.q", "must be true or false"),
        ({"state": "a", "questions": {"q": CHOICE}, "expected": {"q": "d"}}, "expected.q", "must be an option"),
        ({"state": "a", "questions": {"q": SCORE}, "expected": {"q": 3}}, "expected.q", "must be a level, 0 to 2"),
        ({"state": "a", "questions": {"q": SCORE}, "expected": {"q": True}}, "expected.q", "must be a level, 0 to 2"),
        ({"state": "a" * CONTEXT, "questions": noul}, "questions.q", "room for"),
        ({"state": "a", "questions": {"q": NOUL | {"labels": {"true": "Yes"}}}}, "questions.q", "'Yes'"),
    ]
    file = write_lines(decide.folder / "rows.jsonl", [*(value for value, _, _ in values), state(1)])
    file.write_bytes(b"".join(line + b"\n" for line, _, _ in rows) + file.read_bytes())
    assert decide.run(file) == 0
    expected = [(param, text) for _, param, text in (*rows, *values)]
    assert len(decide.output) == len(expected) + 1
    for number, (row, (param, text)) in enumerate(zip(decide.output[:-1], expected, strict=True), 1):
        assert row["line"] == number
        assert "answers" not in row
        assert row["error"]["param"] == param
        assert text in row["error"]["message"]
        assert row["error"]["code"]
        assert f"{file}:{number}: {row['error']['message']}" in decide.err
    assert "answers" in decide.output[-1]
    assert f"lines       1 answered, {len(expected)} with errors" in decide.out


def test_fields_of_the_http_api_without_effect_are_accepted(decide: Command) -> None:
    fields = {"model": "m", "prompt_cache_key": "k", "prompt_cache_options": {}, "safety_identifier": "s"}
    assert decide([state(1), state(1) | fields]) == 0
    first, second = decide.output
    assert first["answers"] == second["answers"]


def test_an_engine_error_is_that_of_its_line(decide: Command) -> None:
    decide.runner.nan_token = ord("Y")
    assert decide([state(1), OPENAI | {"questions": OPENAI["questions"][1:]}]) == 0
    broken, whole = decide.output
    assert broken["error"] == {
        "message": "the engine failed: the model computed a log-probability that is not a number",
        "param": None,
        "code": "engine_error",
    }
    assert "answers" in whole


def test_right_answers_give_metrics(decide: Command) -> None:
    rows = [
        state(1, expected={"which": "b", "good": True, "how": 2}),
        state(2, expected={"which": "aa", "good": False}),
        state(3),
        OPENAI | {"expected": {"pick": "true", "good": True}},
    ]
    assert decide(rows) == 0
    assert [row.get("expected") for row in decide.output] == [row.get("expected") for row in rows]
    lines = decide.out[decide.out.index("question ") :].splitlines()
    found = {line.split()[0]: line.split()[1] for line in lines[1:]}
    assert found == {"which": "2", "good": "3", "how": "1", "pick": "1"}
    first, second, _, openai = decide.output
    chances = [
        first["answers"]["good"]["noul"],
        1 - second["answers"]["good"]["noul"],
        openai["answers"][0]["probability"],
    ]
    [line] = [line for line in lines if line.startswith("good")]
    assert f"  {-sum(map(math.log, chances)) / 3:.3f} [" in line


def test_plot_of_a_complete_output_needs_no_model(decide: Command) -> None:
    rows = [state(1, expected={"good": True})]
    assert decide(rows) == 0
    table = decide.out[decide.out.index("question ") :]

    def fail(*_: object) -> Any:
        raise AssertionError("the model is loaded")

    decide.load = fail
    plots = [decide.folder / "plot.png", decide.folder / "plot.html"]
    assert decide(rows, *(word for plot in plots for word in ("--plot", str(plot)))) == 0
    assert all(plot.stat().st_size > 1000 for plot in plots)
    assert "the output was complete" in decide.out
    assert decide.out.endswith(table)
    assert f"plot        {plots[1]}\n" in decide.out


def test_plot_without_right_answers_fails_and_keeps_the_output(decide: Command) -> None:
    assert decide([state(1)], "--plot", str(decide.folder / "plot.png")) == 1
    assert "--plot: no line has a right answer in `expected`" in decide.err
    assert len(decide.output) == 1


def test_signal_keeps_finished_rows_and_the_same_command_resumes(decide: Command) -> None:
    rows = [state(i, expected={"good": True}) for i in range(40)]

    def stop(_: str) -> None:
        if len(decide.runner.calls) > 60:
            os.kill(os.getpid(), signal.SIGTERM)

    # Sent at every later step. If the command did not handle it, it would end the tests.
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    decide.runner.before_call = stop
    try:
        assert decide(rows, "--max-num-seqs", "1") == 143
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert 0 < len(read_lines(decide.folder / "rows.decisions.jsonl.partial")) < 40
    decide.runner = decide.new_runner()
    assert decide(rows, "--max-num-seqs", "1") == 0
    assert "resuming after line" in decide.err
    assert [row["line"] for row in decide.output] == list(range(1, 41))
    table = decide.out[decide.out.index("question ") :]
    assert "  40 " in table
    resumed = (decide.folder / "rows.decisions.jsonl").read_bytes()
    assert decide(rows, "--max-num-seqs", "4", "--overwrite") == 0
    assert (decide.folder / "rows.decisions.jsonl").read_bytes() == resumed
    assert decide.out[decide.out.index("question ") :] == table


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temperature", "2"), "--temperature unset, not 2.0"),
        (("--scoring", "sequences"), "--scoring labels, not sequences"),
        (("--scoring", "sequences", "--normalize", "byte"), "--normalize unset, not byte"),
        (("--dtype", "float32"), "--dtype auto, not float32"),
        (("--limit", "1"), "--limit unset, not 1"),
        (("--bins", "10"), None),
    ],
    ids=str,
)
def test_resume_refuses_other_options(decide: Command, flags: tuple[str, ...], message: str | None) -> None:
    assert decide([state(1)]) == 0
    assert decide([state(1)], *flags) == (0 if message is None else 1)
    assert message is None or message in decide.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "FILE"),
        (("rows", "--normalize", "byte"), "--normalize: requires --scoring sequences"),
        (("rows", "--permutations", "2"), "--permutations: requires --scoring permutations"),
        (("rows", "--permutations", "121", "--scoring", "permutations"), "--permutations"),
        (("rows", "--temperature", "0"), "--temperature"),
        (("rows", "--plot", "x.pdf"), ".png nor .html"),
        (("rows.parquet",), "must be JSONL"),
        (("rows.txt.gz",), "must be JSONL"),
        (("rows", "--output", "rows"), "--output"),
        (("rows", "--seed", "1"), "--seed"),
    ],
    ids=str,
)
def test_parse_args_exits_with_code_2_and_names_the_flag(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args(flags)
    assert ended.value.code == 2
    assert message.lower() in capsys.readouterr().err.lower()


def test_plot_without_matplotlib_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config, "find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        parse_args(["rows", "--plot", "x.png"])
    assert "pip install 'logprobd[plot]'" in capsys.readouterr().err


def test_flags_have_the_names_and_bounds_of_scoring_options() -> None:
    fields = {field.name for field in dataclasses.fields(config.DecideConfig)}
    assert {*ScoringOptions.model_fields} - fields == {"return_token_ids"}
    for flags in (("--temperature", "1000"), ("--temperature", "0.001")):
        ScoringOptions.model_validate(parse_args(["rows", *flags]).scoring_options)
    words = ["rows", "--scoring", "permutations", "--permutations", str(MAX_ORDERS)]
    ScoringOptions.model_validate(parse_args(words).scoring_options)
