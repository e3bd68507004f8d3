"""Decisions on a fake model, whose log-probs can be computed by hand: the arithmetic of each way of scoring."""

import asyncio
import dataclasses
import math
import random
import threading
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from serve import llm as llm_module
from serve.jobs import score as score_module
from serve.jobs.decide import Decider, softmax, summing_to_one
from serve.jobs.request_queue import RequestError
from serve.jobs.results import Decision
from serve.jobs.score import checked_logprobs
from serve.llm import LLM
from serve.text.chat import ChatFormat, PromptError
from serve.text.decisions.plan import DecisionFormat
from serve.text.decisions.questions import Question, ScoringOptions, decision_request
from tests.support.engines import TIMEOUT
from tests.support.fake_runner import hidden_after
from tests.support.http_client import ScriptedRunner, byte_tokenizer
from tests.support.scoring import fake_load

CONTEXT = 1024  # tokens
CHOICE = {"type": "choice", "instructions": "Which?", "criteria": {"aa": None, "b": "x", "ccc": None}}
# The tokenizer has a token per byte, so "Yes" and "No" are none.
NOUL = {"type": "noul", "instructions": "Good?", "labels": {"true": "Y", "false": "N"}}
QUESTION = Question("questions.q", "choice", (), name="q")
SCORE = {"type": "score", "instructions": "How?", "criteria": ["low", "mid", "high"]}


@pytest.fixture
def runner() -> ScriptedRunner:
    return ScriptedRunner(None, pages=128, pages_per_row=CONTEXT // 64)


@pytest.fixture
def llm(runner: ScriptedRunner, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    monkeypatch.setattr(llm_module, "load", fake_load(runner, context=CONTEXT))
    with LLM() as llm:
        yield llm


def decide(llm: LLM, *questions: dict[str, Any], state: str = "It works.", **options: Any) -> list[Decision]:
    body = {"state": state, "questions": {f"q{i}": question for i, question in enumerate(questions)}}
    [decisions] = llm.decide(body, return_token_ids=True, **options)
    return decisions


def logprob(tokens: Sequence[int], token: int) -> float:
    """Of the fake model, for a token after others."""
    return -((token + hidden_after(tokens)) % 7) / 8


def sequence_logprob(tokens: Sequence[int], sequence: Sequence[int]) -> float:
    return sum(logprob([*tokens, *sequence[:i]], token) for i, token in enumerate(sequence))


def prompts_of(decision: Decision) -> tuple[tuple[int, ...], ...]:
    assert decision.evidence.prompt_token_ids is not None
    return decision.evidence.prompt_token_ids


def shares(values: Sequence[float], temperature: float = 1.0) -> list[float]:
    weights = [math.exp(value / temperature) for value in values]
    return [weight / sum(weights) for weight in weights]


def test_labels(llm: LLM) -> None:
    [decision] = decide(llm, CHOICE)
    [prompt] = prompts_of(decision)
    assert bytes(prompt).decode() == (
        "user:It works.\n\nWhich?\nA. aa\nB. b: x\nC. ccc\n"
        "Answer with the letter of the option that fits best (A to C) only.;>"
    )
    values = [logprob(prompt, token) for token in b"ABC"]
    assert decision.options == ("aa", "b", "ccc")
    assert decision.probabilities == pytest.approx(shares(values))
    assert sum(decision.probabilities) == pytest.approx(1, abs=1e-12)
    assert decision.choice == decision.options[max(range(3), key=values.__getitem__)]
    best = max(decision.probabilities)
    assert decision.confidence == pytest.approx((best - 1 / 3) / (1 - 1 / 3))
    assert decision.score is None
    evidence = decision.evidence
    assert evidence.logprobs == tuple(values)
    assert evidence.label_mass == pytest.approx(sum(map(math.exp, values)))
    assert evidence.argmax_is_label == any((token + hidden_after(prompt)) % 5 == 0 for token in b"ABC")
    assert (evidence.labels, evidence.label_token_ids) == ((("A",), ("B",), ("C",)), ((65,), (66,), (67,)))
    assert (evidence.prompt_tokens, evidence.cached_tokens) == (len(prompt), 0)
    assert (evidence.scoring, evidence.temperature) == ("labels", 1.0)


def test_the_most_likely_token_is_not_always_a_label(llm: LLM) -> None:
    found = {decide(llm, NOUL, state="x" * n)[0].evidence.argmax_is_label for n in range(1, 6)}
    assert found == {True, False}


def test_types_of_questions_in_order(llm: LLM) -> None:
    noul, choice, score = decide(llm, NOUL, CHOICE, SCORE)
    assert [d.name for d in (noul, choice, score)] == ["q0", "q1", "q2"]
    assert noul.options == (True, False)
    assert (noul.choice, noul.score, noul.confidence, noul.confidence_formula) == (None, None, None, None)
    values = [logprob(prompts_of(noul)[0], token) for token in b"YN"]
    assert noul.probability == noul.probabilities[0] == pytest.approx(shares(values)[0])
    p = score.probabilities
    assert score.options == ("low", "mid", "high")
    assert score.score == pytest.approx(p[1] + 2 * p[2])
    best = max(range(3), key=p.__getitem__)
    assert score.confidence == pytest.approx(max(0, 1 - sum(x * abs(i - best) for i, x in enumerate(p)) / (2 / 3)))
    assert score.choice is None
    assert choice.confidence_formula == "max(0, (max(p) - 1/n) / (1 - 1/n))"
    assert score.score_formula == "sum(i * p[i])"


def test_temperature(llm: LLM) -> None:
    [decision] = decide(llm, CHOICE, temperature=0.5)
    values = [logprob(prompts_of(decision)[0], token) for token in b"ABC"]
    assert decision.probabilities == pytest.approx(shares(values, 0.5))
    assert decision.evidence.logprobs == tuple(values)


def test_group_of_labels_adds_their_probabilities(llm: LLM) -> None:
    labels = {"aa": ["x", "y", "x"], "ccc": "z"}
    [decision] = decide(llm, CHOICE | {"labels": labels})
    [prompt] = prompts_of(decision)
    x, y, b, z = (math.exp(logprob(prompt, token)) for token in b"xyBz")
    total = x + y + b + z
    assert decision.probabilities == pytest.approx([(x + y) / total, b / total, z / total])
    assert decision.evidence.label_mass == pytest.approx(total)
    assert decision.evidence.label_token_ids == ((*b"xy",), (*b"B",), (*b"z",))


def test_many_ids_are_split_over_requests(llm: LLM) -> None:
    request = decision_request({"state": "It works.", "questions": {"q": CHOICE}})
    plan = llm.decisions.plan(request, ScoringOptions(), CONTEXT)
    limits = dataclasses.replace(llm.loaded.limits, max_requested_ids=2)
    [split] = llm._worker.run(Decider(llm._queue, limits).run(plan))
    [whole] = llm._worker.run(Decider(llm._queue, llm.loaded.limits).run(plan))
    assert split.evidence == dataclasses.replace(whole.evidence, cached_tokens=split.evidence.cached_tokens)
    assert split.probabilities == whole.probabilities


@pytest.mark.parametrize("normalize", [None, "sum", "token", "byte", "pmi"])
def test_sequences(llm: LLM, normalize: Any) -> None:
    [decision] = decide(llm, CHOICE, scoring="sequences", normalize=normalize)
    prompt, *prior = prompts_of(decision)
    assert (
        bytes(prompt)
        .decode()
        .endswith("- aa\n- b: x\n- ccc\nAnswer with the text of the option that fits best only.;>")
    )
    sequences = [[*b"aa"], [*b"b"], [*b"ccc"]]
    sums = [sequence_logprob(prompt, sequence) for sequence in sequences]
    values = sums
    if normalize == "pmi":
        assert bytes(prior[0]).decode().startswith("user:\n\nWhich?\n- aa")
        priors = [sequence_logprob(prior[0], sequence) for sequence in sequences]
        assert decision.evidence.prior_logprobs == pytest.approx(priors)
        values = [x - y for x, y in zip(sums, priors, strict=True)]
    elif normalize in ("token", "byte"):
        values = [x / len(sequence) for x, sequence in zip(sums, sequences, strict=True)]
    assert decision.evidence.logprobs == pytest.approx(sums)
    assert decision.evidence.normalized == pytest.approx(values)
    assert decision.probabilities == pytest.approx(shares(values))
    assert decision.evidence.normalize == (normalize or "sum")
    assert decision.evidence.label_token_ids == tuple(map(tuple, sequences))
    assert decision.evidence.counts_end_of_turn is False  # the template writes ";", which is no control token
    assert decision.evidence.encoded_apart == (False,) * 3


def test_sequences_differ_in_bytes_and_tokens(llm: LLM) -> None:
    """The end of the turn is a token, and no byte of the option's text."""
    template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    prompts = DecisionFormat(ChatFormat(byte_tokenizer(chat_template=template)))
    request = decision_request({"state": "x", "questions": {"q": CHOICE}})
    decider = Decider(llm._queue, llm.loaded.limits)
    values = {}
    for normalize in ("token", "byte"):
        options = ScoringOptions(scoring="sequences", normalize=normalize)
        [decision] = llm._worker.run(decider.run(prompts.plan(request, options, CONTEXT)))
        assert decision.evidence.counts_end_of_turn
        assert decision.evidence.label_token_ids[0] == (*b"aa", 257)
        assert decision.evidence.normalized is not None
        values[normalize] = decision.evidence.normalized[0], decision.evidence.logprobs[0]
    assert values["token"][0] == pytest.approx(values["token"][1] / 3)
    assert values["byte"][0] == pytest.approx(values["byte"][1] / 2)


@pytest.mark.parametrize("count", [None, 2])
def test_permutations(llm: LLM, count: int | None) -> None:
    [decision] = decide(llm, CHOICE, scoring="permutations", permutations=count)
    evidence = decision.evidence
    assert evidence.orders is not None
    assert len(evidence.orders) == len(prompts_of(decision)) == (count or 6)
    assert [order.order for order in evidence.orders][:3] == [(0, 1, 2), (1, 2, 0), (2, 0, 1)][: count or 3]
    columns = list[list[float]]()
    for order, prompt in zip(evidence.orders, prompts_of(decision), strict=True):
        by_place = [logprob(prompt, token) for token in b"ABC"]
        values = [by_place[order.order.index(option)] for option in range(3)]
        assert order.logprobs == tuple(values)
        assert order.probabilities == pytest.approx(shares(values))
        assert order.label_mass == pytest.approx(sum(map(math.exp, values)))
        columns.append(shares(values))
    means = [sum(column) / len(column) for column in zip(*columns, strict=True)]
    assert decision.probabilities == pytest.approx(means)
    assert evidence.spread == pytest.approx([max(c) - min(c) for c in zip(*columns, strict=True)])
    assert evidence.argmax_is_label == all(order.argmax_is_label for order in evidence.orders)
    assert evidence.prompt_tokens == sum(map(len, prompts_of(decision)))


def test_cached_tokens_of_questions_on_one_state(llm: LLM) -> None:
    first = decide(llm, NOUL, state="x" * 200)[0].evidence
    second = decide(llm, CHOICE, NOUL, state="x" * 200)
    assert first.cached_tokens == 0
    choice, noul = (decision.evidence.cached_tokens for decision in second)
    assert 192 <= choice < noul <= first.prompt_tokens  # the state, and the whole prompt


def test_requests_of_both_forms(llm: LLM) -> None:
    own = {"state": "It works.", "questions": {"q": NOUL}}
    openai = {
        "input": "It works.",
        "questions": [{"type": "predicate", "instructions": "Good?", "labels": NOUL["labels"]}],
    }
    [[first], [second]] = llm.decide([own, openai])
    assert first.probabilities == second.probabilities
    assert (first.name, second.name) == ("q", None)


def test_longest_prompt(llm: LLM) -> None:
    """A prompt may have one token less than the context, since a token is scored after it."""
    [decision] = decide(llm, NOUL, state="x")
    room = CONTEXT - 1 - decision.evidence.prompt_tokens
    [decision] = decide(llm, NOUL, state="x" * (room + 1))
    assert decision.evidence.prompt_tokens == CONTEXT - 1
    with pytest.raises(PromptError, match=r"Question 'q0' .* has 1024 tokens; .* room for 1023") as caught:
        decide(llm, NOUL, state="x" * (room + 2))
    assert caught.value.param == "requests[0].questions.q0"
    with pytest.raises(PromptError, match=r"Question 'q1' .* its prompt and an option have"):
        decide(llm, SCORE, CHOICE | {"criteria": {"a": None, "b" * 500: None}}, state="x" * 100, scoring="sequences")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scorings": "labels"}, TypeError, "did you mean 'scoring'"),
        ({"scoring": "logits"}, PromptError, "`scoring`"),
        ({"normalize": "sum"}, PromptError, "`normalize`: needs `scoring` sequences"),
        ({"permutations": 2}, PromptError, "`permutations`: needs `scoring` permutations"),
        ({"scoring": "permutations", "permutations": 0}, PromptError, "`permutations`"),
        ({"scoring": "permutations", "permutations": 121}, PromptError, "`permutations`"),
        ({"temperature": 0}, PromptError, "`temperature`"),
        ({"temperature": float("nan")}, PromptError, "`temperature`"),
    ],
)
def test_bad_options(llm: LLM, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        llm.decide([], **options)


def test_more_options_than_labels(llm: LLM) -> None:
    many = {"type": "choice", "criteria": {f"{i:03}": None for i in range(27)}}
    with pytest.raises(PromptError, match="0 labels for 27 options; use `scoring` sequences"):
        decide(llm, many)
    [decision] = decide(llm, many, scoring="sequences")
    assert len(decision.probabilities) == 27


def test_permutations_of_many_options_need_a_number(llm: LLM) -> None:
    six = {"type": "choice", "criteria": dict.fromkeys("abcdef")}
    with pytest.raises(PromptError, match="required for more than 5 options; this question has 6"):
        decide(llm, six, scoring="permutations")
    assert len(prompts_of(decide(llm, six, scoring="permutations", permutations=8)[0])) == 8


def test_option_without_probability() -> None:
    assert softmax(QUESTION, [-math.inf, 0.0], 1.0) == (0.0, 1.0)
    for values, message in (
        ([-math.inf, -math.inf], "all its options have the probability 0"),
        ([math.inf, 0.0], "the probability 0 after an empty state"),
    ):
        with pytest.raises(PromptError, match=rf"Question 'q' .*{message}"):
            softmax(QUESTION, values, 1.0)
    with pytest.raises(RequestError, match="not a number"):
        softmax(QUESTION, [math.nan, 0.0], 1.0)


def test_option_that_is_impossible_after_both_states(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log-prob minus its prior is no number; its probability is 0."""

    def impossible(logprobs: Any, count: int) -> Any:
        rows = checked_logprobs(logprobs, count)
        return (
            dataclasses.replace(rows, logprob=np.full_like(rows.logprob, -np.inf)) if len(rows.logprob) == 3 else rows
        )

    monkeypatch.setattr(score_module, "checked_logprobs", impossible)
    [decision] = decide(llm, CHOICE, scoring="sequences", normalize="pmi")
    assert decision.probabilities[2] == 0
    assert decision.evidence.prior_logprobs is not None
    assert decision.evidence.prior_logprobs[2] == -math.inf
    assert sum(decision.probabilities) == pytest.approx(1)


@pytest.mark.parametrize(
    ("request_", "param", "code"),
    [
        ("x", "requests[1]", "invalid_type"),
        (
            {"state": "x", "questions": {"q": NOUL}, "scoring": "sequences"},
            "requests[1].scoring",
            "unsupported_parameter",
        ),
        ({"state": "x", "questions": {"q": NOUL}, "stat": "y"}, "requests[1].stat", "unknown_parameter"),
    ],
)
def test_bad_requests_are_named(llm: LLM, request_: Any, param: str, code: str) -> None:
    with pytest.raises(PromptError) as caught:
        llm.decide([{"state": "x", "questions": {"q": NOUL}, "model": "any"}, request_])
    assert (caught.value.param, caught.value.code) == (param, code)


def test_decimals_sum_to_one_and_give_the_score() -> None:
    """Some number within half a unit of the last place of each decimal makes the sum 1, and the mean the score."""
    draw = random.Random(0)
    for _ in range(2000):
        spread = draw.choice((0.1, 1, 10, 100))
        exact = softmax(QUESTION, [draw.gauss(0, spread) for _ in range(draw.randint(1, 10))], 1)
        probabilities, score = summing_to_one(exact)
        assert max(map(abs, np.subtract(probabilities, exact))) < 1e-15
        values = [Decimal(repr(value)) for value in probabilities]
        largest = values.index(max(values))
        missing = 1 - sum(values, Decimal(0))
        assert abs(missing) <= half_unit(values[largest])
        values[largest] += missing
        mean = sum((i * value for i, value in enumerate(values)), Decimal(0))
        assert abs(mean - Decimal(repr(score))) <= half_unit(Decimal(repr(score)))


def half_unit(value: Decimal) -> Decimal:
    return Decimal(1).scaleb(int(value.as_tuple().exponent)) / 2


def test_nan_fails_the_request(llm: LLM, runner: ScriptedRunner) -> None:
    runner.nan_token = ord("A")  # is scored after the prompt
    with pytest.raises(RequestError):
        decide(llm, CHOICE)


@pytest.mark.parametrize("requests", [1, 6])
def test_questions_run_at_the_same_time(llm: LLM, runner: ScriptedRunner, requests: int) -> None:
    """No call of the runner returns before all requests are in the engine."""
    all_admitted = threading.Event()

    def before_call(_: str) -> None:
        all_admitted.wait(TIMEOUT)

    runner.before_call = before_call
    questions = {f"q{i}": NOUL for i in range(6 // requests)}
    request = decision_request({"state": "x", "questions": questions})
    plans = [llm.decisions.plan(request, ScoringOptions(), CONTEXT)] * requests

    async def run() -> list[Decision]:
        stream = Decider(llm._queue, llm.loaded.limits).stream(plans)

        async def collect() -> list[Decision]:
            return [decision async for decisions in stream for decision in decisions]

        task = asyncio.create_task(collect())
        async with asyncio.timeout(TIMEOUT):
            while llm.engine.num_requests < 6:
                await asyncio.sleep(0)
        all_admitted.set()
        return await task

    decisions = llm._worker.run(run())
    assert len(decisions) == 6
    assert len({decision.probabilities for decision in decisions}) == 1
