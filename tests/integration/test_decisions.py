"""Decisions of the default model: transformers' numbers, and the same bits however they are computed."""

from pathlib import Path
from typing import Any

import pytest

from compiled.runner import ModelRunner
from compiled.shapes import Buckets
from model.weights.source import default_model_path
from serve.jobs.results import Decision
from serve.server.model_files import local_tokenizer
from serve.text.chat import ChatFormat
from serve.text.decisions.plan import DecisionFormat
from serve.text.decisions.questions import DecisionRequest, ScoringOptions, decision_request
from tests.support.decisions import assert_golden, decide, golden_cases, golden_request
from tests.support.runners import make_runner

BUCKETS = Buckets(decode_rows=(8,), prefill_chunks=(64,), score_rows=64, pages_per_row=16)
# Several sizes of a prefill, so that the same prompt is computed in different ones.
CROWD = Buckets(decode_rows=(8,), prefill_chunks=(16, 64, 256), score_rows=64, pages_per_row=16)


@pytest.fixture(scope="module")
def prompts() -> DecisionFormat:
    return DecisionFormat(ChatFormat(local_tokenizer(default_model_path())))


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    """Two of the default model's 30 layers, which are compiled alike."""
    return make_runner(default_model_path(), "bfloat16", CROWD, layers=2)


@pytest.fixture(scope="module")
def whole_runner() -> ModelRunner:
    """The default model."""
    return make_runner(default_model_path(), "bfloat16", CROWD)


@pytest.mark.slow
def test_probabilities_are_those_of_transformers(hf_directory: Path, prompts: DecisionFormat) -> None:
    assert_golden("smollm2-decisions-f32", make_runner(hf_directory, "float32", BUCKETS), prompts)


STATES = (
    "The lamp works and looks lovely.",
    {"order": 4711, "note": "wrong colour — grün statt blau"},
    "def f(a):\n    pass\n",
    "A" * 100,
)
QUESTIONS = {
    "tone": {"type": "choice", "instructions": "What is the tone?", "criteria": {"calm": "polite", "angry": None}},
    "team": {"type": "choice", "criteria": dict.fromkeys(("billing", "shipping", "bug", "other"))},
    "sad": {"type": "noul", "instructions": "Is the writer unhappy?"},
    "urgent": {"type": "score", "instructions": "How urgent is it?", "criteria": ["can wait", "this week", "today"]},
}


def requests_of(count: int, questions: dict[str, Any]) -> list[DecisionRequest]:
    """Requests of one question each, about states that begin alike."""
    names = [*questions]
    bodies = (
        {"state": {"id": i // 8, "text": STATES[i % len(STATES)]}, "questions": {name: questions[name]}}
        for i in range(count)
        for name in [names[i % len(names)]]
    )
    return [decision_request(body) for body in bodies]


def bits(decisions: list[list[Decision]]) -> list[tuple[float, ...]]:
    """What must not depend on what else runs: the log-probs and probabilities of each decision."""
    return [(*d.probabilities, *d.evidence.logprobs, d.evidence.label_mass) for [d] in decisions]


@pytest.mark.parametrize(
    "options",
    [
        ScoringOptions(),
        ScoringOptions(scoring="sequences"),
        ScoringOptions(scoring="permutations", permutations=2),
    ],
    ids=lambda options: options.scoring,
)
def test_bits_of_decisions(runner: ModelRunner, prompts: DecisionFormat, options: ScoringOptions) -> None:
    assert_same_bits(runner, prompts, options)


@pytest.mark.slow
def test_bits_of_decisions_of_the_whole_model(whole_runner: ModelRunner, prompts: DecisionFormat) -> None:
    assert_same_bits(whole_runner, prompts, ScoringOptions())


def assert_same_bits(runner: ModelRunner, prompts: DecisionFormat, options: ScoringOptions) -> None:
    """Decide alone, among 64 others at the same time, cached, and after a restart of the engine."""
    requests = requests_of(5, QUESTIONS)
    alone = [bits(decide(runner, prompts, [request], options))[0] for request in requests]
    crowd = requests_of(64, QUESTIONS)
    together = decide(runner, prompts, [*crowd, *requests, *requests], options, together=True)
    assert bits(together)[64:] == alone * 2
    assert any(decision.evidence.cached_tokens for [decision] in together)
    assert bits(decide(runner, prompts, requests * 2, options)) == alone * 2
    assert bits(decide(runner, prompts, requests, options, caches=False)) == alone


@pytest.mark.slow
def test_2000_decisions_have_the_same_bits_again(runner: ModelRunner, prompts: DecisionFormat) -> None:
    questions = {f"{name} {i}": question for i in range(10) for name, question in QUESTIONS.items()}
    requests = [decision_request({"state": f"Order {i} came late.", "questions": questions}) for i in range(50)]
    first = decide(runner, prompts, requests, together=True)
    second = decide(runner, prompts, requests[::-1], together=True)[::-1]
    decisions, again = ([[decision] for part in parts for decision in part] for parts in (first, second))
    assert len(decisions) == 2000
    assert bits(decisions) == bits(again)


def test_questions_of_one_request_have_the_bits_of_each_alone(runner: ModelRunner, prompts: DecisionFormat) -> None:
    state = "The parcel came late and the box was wet. " * 12
    whole = decision_request({"state": state, "questions": QUESTIONS})
    single = [decision_request({"state": state, "questions": {name: QUESTIONS[name]}}) for name in QUESTIONS]
    [decisions] = decide(runner, prompts, [whole])
    assert bits([[decision] for decision in decisions]) == bits(decide(runner, prompts, single, caches=False))


@pytest.mark.slow
def test_argmax_of_permutations_is_a_label_in_all_orders(whole_runner: ModelRunner, prompts: DecisionFormat) -> None:
    request = golden_request(golden_cases("smollm2-decisions-f32")[0])
    [decisions] = decide(whole_runner, prompts, [request], ScoringOptions(scoring="permutations", permutations=2))
    tops = list[set[bool]]()
    for decision in decisions:
        assert decision.evidence.orders is not None
        tops.append({order.argmax_is_label for order in decision.evidence.orders})
        assert decision.evidence.argmax_is_label == (tops[-1] == {True})
    assert {True, False} in tops
