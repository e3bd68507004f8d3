"""Decisions on a runner, without HTTP, and the golden answers of transformers."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from compiled.runner import ModelRunner
from compiled.state import MAX_REQUESTED_IDS
from model.kv_cache import PAGE_SIZE
from serve.engine.engine import Engine
from serve.engine.request import EngineLimits, EngineOptions
from serve.jobs.decide import Decider
from serve.jobs.request_queue import RequestQueue
from serve.jobs.results import Decision
from serve.text.decisions.plan import DecisionFormat
from serve.text.decisions.questions import DecisionRequest, ScoringOptions, typesafe_questions

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_file(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))
    return values


def golden_cases(name: str) -> list[dict[str, Any]]:
    """Cases with a request in TypeSafe's form, the answers and the prompt_token_ids of transformers' pipeline."""
    cases: list[dict[str, Any]] = golden_file(name)["cases"]
    return cases


def golden_request(case: Mapping[str, Any]) -> DecisionRequest:
    """The request of a golden case; its state may be blank, which the wire refuses."""
    request = case["request"]
    return DecisionRequest(typesafe_questions(request["questions"]), state=request["state"])


def golden_probabilities(answer: Mapping[str, Any]) -> list[float]:
    """By option."""
    return [answer["noul"], 1 - answer["noul"]] if answer["type"] == "noul" else [*answer["probabilities"].values()]


def decide(
    runner: ModelRunner,
    prompts: DecisionFormat,
    requests: Iterable[DecisionRequest],
    options: ScoringOptions | None = None,
    *,
    max_requested_ids: int = MAX_REQUESTED_IDS,
    caches: bool = True,
    together: bool = False,
) -> list[list[Decision]]:
    """Decisions of a new engine, whose prefix cache is empty at the start.

    Requests run one after the other, or `together`.
    """
    limits = EngineLimits(
        max_model_len=runner.buckets.pages_per_row * PAGE_SIZE,
        max_logprobs=runner.max_logprobs,
        vocab_size=runner.vocab_size,
        cache_tokens=(runner.pages - 1) * PAGE_SIZE,
        max_requested_ids=max_requested_ids,
        full_vocab=False,
    )
    engine = Engine(runner, limits, EngineOptions(272, 1000, enable_prefix_caching=caches))
    engine.start()

    async def run() -> list[list[Decision]]:
        decider = Decider(RequestQueue(engine, 1000, 2**20), limits)
        settings = options or ScoringOptions()
        plans = [prompts.plan(request, settings, decider.max_prompt_tokens) for request in requests]
        if together:
            return await asyncio.gather(*map(decider.run, plans))
        return [await decider.run(plan) for plan in plans]

    try:
        return asyncio.run(run())
    finally:
        engine.stop()


def assert_golden(name: str, runner: ModelRunner, prompts: DecisionFormat) -> None:
    """Assert that prompt ids are those of a golden file, and probabilities within 5e-5."""
    cases = golden_cases(name)
    requests = [golden_request(case) for case in cases]
    answers = decide(runner, prompts, requests, ScoringOptions(return_token_ids=True))
    for case, decisions in zip(cases, answers, strict=True):
        expected = zip(case["answers"].values(), case["prompt_token_ids"], decisions, strict=True)
        for answer, token_ids, decision in expected:
            _assert_answer(answer, decision)
            assert decision.evidence.prompt_token_ids == (tuple(token_ids),)


def _assert_answer(answer: dict[str, float], decision: Decision) -> None:
    assert decision.probabilities == pytest.approx(golden_probabilities(answer), abs=5e-5)
    for name in ("confidence", "score", "choice"):
        value = getattr(decision, name)
        assert value == (answer[name] if name == "choice" and value else pytest.approx(answer.get(name), abs=5e-4))
