"""`logprobd kl`: statistics against numpy, and the whole command on scripted runners with a token per byte."""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import orjson
import pytest
from numpy.typing import NDArray

from model.kv_cache import PAGE_SIZE
from serve import llm as llm_module
from serve.cli import divergence
from serve.cli.divergence import Comparison, passages_of, targets_of
from serve.cli.kl import KlConfig, parse_args
from serve.cli.main import main
from serve.config.engine_config import EngineConfig
from serve.jobs.score import Window
from serve.server.console import Reporter
from serve.server.startup import Loaded
from tests.support.fake_runner import hidden_after
from tests.support.http_client import VOCAB_SIZE, ScriptedRunner, byte_tokenizer
from tests.support.scoring import CONTEXT, fake_load, write_lines

TEXTS = ["The quick brown fox.", "a", "x" * (CONTEXT + 50)]


def logprobs_of(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return values


@pytest.fixture
def file() -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as file:
        yield file


def test_comparison_equals_numpy(file: BinaryIO) -> None:
    random = np.random.default_rng(1)
    p, q = (logprobs_of(random.standard_normal((50, 300)) * 3) for _ in range(2))
    q[7] = p[7]
    targets = random.integers(0, 300, 50)
    comparison = Comparison(file, targets, 300)
    for start, stop in ((20, 50), (0, 20)):
        comparison.add_reference(start, p[start:stop].astype(np.float32))
    for start, stop in ((0, 9), (9, 10), (10, 50)):
        comparison.add(start, q[start:stop].astype(np.float32) + np.float32(1e-3))  # a normalizer has no effect
    summary = comparison.summary()
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    assert comparison.kl == pytest.approx(kl, abs=2e-6)
    assert abs(comparison.kl[7]) < 1e-7
    assert summary.tokens == 50
    assert summary.mean == pytest.approx(kl.mean(), abs=1e-6)
    assert summary.quantiles["max"] == pytest.approx(kl.max(), abs=2e-6)
    assert summary.quantiles["p90"] == pytest.approx(np.sort(kl)[44], abs=2e-6)
    assert summary.quantiles["median"] == pytest.approx(np.sort(kl)[24], abs=2e-6)
    assert summary.same_best == (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    perplexities = [math.exp(-values[np.arange(50), targets].mean()) for values in (p, q)]
    assert summary.perplexities == pytest.approx(perplexities, rel=1e-6)
    assert summary.perplexity_ratio == pytest.approx(perplexities[1] / perplexities[0], rel=1e-6)


def test_equal_models_have_no_divergence_and_impossible_tokens_an_infinite_one(file: BinaryIO) -> None:
    comparison = Comparison(file, np.array([0, 0]), 3)
    rows = np.array([[-math.log(2), -math.log(2), -math.inf]] * 2, np.float32)
    comparison.add_reference(0, rows)
    comparison.add(0, np.array([rows[0], [-0.0, -np.inf, -np.inf]], np.float32))
    assert comparison.kl.tolist() == [0.0, math.inf]
    assert comparison.summary().quantiles["median"] == 0.0


def test_rows_of_windows_are_numbered_in_order() -> None:
    first, second = [*range(10)], [20, 21]
    windows = (Window(0, 6, 1), Window(4, 10, 6))
    passages = passages_of([(first, windows), ([5], ()), (second, (Window(0, 2, 1),))])
    found = [(passage.token_ids, passage.first, passage.row) for passage in passages]
    assert found == [(first[:6], 1, 0), (first[4:], 2, 5), (second, 1, 9)]
    assert targets_of(passages).tolist() == [*first[1:], 21]


class ScaledRunner(ScriptedRunner):
    """A runner whose rows over the full vocabulary have the FakeRunner's values times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__(None, pages=64, pages_per_row=CONTEXT // PAGE_SIZE)
        self.factor = factor

    def full_vocab_logprobs(self, cache_indices: NDArray[np.int32]) -> NDArray[np.float32]:
        rows = super().full_vocab_logprobs(cache_indices)[:, np.arange(VOCAB_SIZE) % 7]  # they repeat
        return rows * np.float32(self.factor)


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> dict[str, ScaledRunner]:
    """Runners by model; the command opens them instead of models."""
    runners = {"a": ScaledRunner(1.0), "b": ScaledRunner(0.5)}
    loaders = {name: fake_load(runner) for name, runner in runners.items()}

    def load(config: EngineConfig, reporter: Reporter) -> Loaded:
        assert (config.max_logprobs, config.dtype) == (-1, "float32")
        return loaders[config.model or ""](config, reporter)

    monkeypatch.setattr(llm_module, "load", load)
    monkeypatch.setattr(divergence, "open_model", opened({}))
    return runners


def opened(changes: dict[str, Any]) -> Callable[..., Any]:
    """A replacement of open_model; the changes are to the second model."""

    @contextmanager
    def open_model(config: EngineConfig, _: Any) -> Iterator[Any]:
        values = {"tokenizer": byte_tokenizer(), "max_model_len": CONTEXT, "vocab_size": VOCAB_SIZE}
        values |= changes if config.model == "b" else {}
        sizes = SimpleNamespace(config=SimpleNamespace(vocab_size=values["vocab_size"]))
        yield SimpleNamespace(**values, checkpoint=sizes)

    return open_model


def row_of(tokens: list[int]) -> NDArray[np.float64]:
    """Values of the fake runner after tokens, before they are normalized."""
    return np.array([-((token + hidden_after(tokens)) % 7) / 8 for token in range(VOCAB_SIZE)])


@pytest.mark.usefixtures("runners")
def test_command_compares_every_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_lines(tmp_path / "texts.jsonl", TEXTS)
    output = tmp_path / "new" / "report"
    assert main(["kl", "a", "--json", "b", str(file), "--output", str(output)]) == 0
    printed = orjson.loads(capsys.readouterr().out)
    contexts = []
    for text in TEXTS:
        for i in range(1, len(text)):
            begin = 0 if i < CONTEXT else min(CONTEXT // 2 * ((i - CONTEXT) // (CONTEXT // 2) + 1), len(text) - CONTEXT)
            contexts.append(([*text[begin:i].encode()], ord(text[i])))
    p = logprobs_of(np.array([row_of(tokens) for tokens, _ in contexts]))
    q = logprobs_of(np.array([row_of(tokens) / 2 for tokens, _ in contexts]))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    targets = np.arange(len(contexts)), [target for _, target in contexts]
    assert printed["tokens"] == len(kl) == sum(len(text) - 1 for text in TEXTS)
    assert printed["texts"] == 3
    assert printed["mean"] == pytest.approx(kl.mean(), rel=1e-6)
    assert printed["quantiles"]["p99.9"] == pytest.approx(kl.max(), rel=1e-6)
    assert printed["same_best"] == 1.0
    assert printed["perplexities"] == pytest.approx([np.exp(-p[targets].mean()), np.exp(-q[targets].mean())], rel=1e-6)
    assert orjson.loads((output / "kl.json").read_bytes()) == printed
    assert "same best   100.000%" in (output / "kl.txt").read_text("utf-8")
    assert (output / "kl.svg").read_text("utf-8").count("KL divergence (nats)") == 1


@pytest.mark.parametrize(
    ("changes", "lines", "message"),
    [
        ({"vocab_size": 300}, TEXTS, "the vocabularies of a and b have 260 and 300 tokens"),
        ({"tokenizer": byte_tokenizer(add_bos=True)}, TEXTS, "texts.jsonl:1: a and b tokenize this text differently"),
        ({}, ["a", "b"], "no text has two tokens"),
        ({}, ["ab", {"body": "x"}], "texts.jsonl:2: has no text"),
    ],
    ids=["vocabulary", "tokenizer", "short", "malformed"],
)
@pytest.mark.usefixtures("runners")
def test_errors_before_a_result(
    changes: dict[str, Any],
    lines: list[Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(divergence, "open_model", opened(changes))
    file = write_lines(tmp_path / "texts.jsonl", lines)
    assert main(["kl", "a", "b", str(file)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_nan_an_interrupt_and_a_full_disk_are_errors(
    runners: dict[str, ScaledRunner],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_lines(tmp_path / "texts.jsonl", TEXTS)
    runners["b"].factor = math.nan
    assert main(["kl", "a", "b", str(file)]) == 1
    assert "a log-prob is NaN" in capsys.readouterr().err
    monkeypatch.setattr(Comparison, "add", interrupt)
    runners["b"].factor = 1.0
    assert main(["kl", "a", "b", str(file)]) == 130
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert main(["kl", "a", "b", str(file)]) == 1
    assert "use --limit, or another folder (TMPDIR)" in capsys.readouterr().err


def test_flags_may_stand_between_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_args(["a", "--max-model-len", "64", "b", "--limit=3", "c.jsonl"])
    assert (config.model, config.model_b, config.file, config.limit) == ("a", "b", Path("c.jsonl"), 3)
    assert parse_args(["--model", "a", "--model-b", "b", "--file", "c"]) == KlConfig(
        model="a", model_b="b", file=Path("c")
    )
    for words, message in (
        (["a", "b"], "the following arguments are required: FILE"),
        (["a", "b", "c", "d"], "unrecognized argument d"),
        (["a", "b", "c", "--limits", "3"], "did you mean '--limit'?"),
        (["a", "b", "c", "--model", "d"], "MODEL is given twice"),
    ):
        with pytest.raises(SystemExit):
            parse_args(words)
        assert message in capsys.readouterr().err
