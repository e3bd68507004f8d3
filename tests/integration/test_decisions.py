"""Decisions of the default model: transformers' numbers, and the same bits however they are computed."""

from pathlib import Path

import pytest

from compiled.runner import ModelRunner
from compiled.shapes import Buckets
from model.weights.source import default_model_path
from serve.jobs.results import Decision
from serve.server.model_files import local_tokenizer
from serve.text.chat import ChatFormat
from serve.text.decisions.plan import DecisionFormat
from serve.text.decisions.questions import ScoringOptions
from tests.support.decisions import decide, golden_cases, golden_probabilities, golden_request
from tests.support.runners import make_runner

BUCKETS = Buckets(decode_rows=(8,), prefill_chunks=(64,), score_rows=64, pages_per_row=16)


@pytest.fixture(scope="module")
def prompts() -> DecisionFormat:
    return DecisionFormat(ChatFormat(local_tokenizer(default_model_path())))


def assert_golden(name: str, runner: ModelRunner, prompts: DecisionFormat) -> None:
    cases = golden_cases(name)
    requests = [golden_request(case) for case in cases]
    answers = decide(runner, prompts, requests, ScoringOptions(return_token_ids=True))
    for case, decisions in zip(cases, answers, strict=True):
        expected = zip(case["answers"].values(), case["prompt_token_ids"], decisions, strict=True)
        for answer, token_ids, decision in expected:
            assert_answer(answer, decision)
            assert decision.evidence.prompt_token_ids == (tuple(token_ids),)


def assert_answer(answer: dict[str, float], decision: Decision) -> None:
    assert decision.probabilities == pytest.approx(golden_probabilities(answer), abs=5e-5)
    for name in ("confidence", "score", "choice"):
        value = getattr(decision, name)
        assert value == (answer[name] if name == "choice" and value else pytest.approx(answer.get(name), abs=5e-4))


@pytest.mark.slow
def test_probabilities_are_those_of_transformers(hf_directory: Path, prompts: DecisionFormat) -> None:
    assert_golden("smollm2-decisions-f32", make_runner(hf_directory, "float32", BUCKETS), prompts)
