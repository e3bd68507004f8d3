"""Prompts and labels of decisions: transformers' prompt ids, sharing of what prompts have in common, and errors."""

from typing import Any

import pytest

from model.weights.source import default_model_path
from serve.server.model_files import local_tokenizer
from serve.text.chat import ChatFormat
from serve.text.decisions.plan import DecisionFormat
from serve.text.decisions.questions import ScoringOptions
from tests.support.decisions import golden_cases, golden_request

ROOM = 4096  # tokens of a prompt


@pytest.fixture(scope="module")
def prompts() -> DecisionFormat:
    return DecisionFormat(ChatFormat(local_tokenizer(default_model_path())))


@pytest.mark.parametrize("case", golden_cases("smollm2-decisions-f32"))
def test_prompt_ids_are_those_of_transformers(prompts: DecisionFormat, case: dict[str, Any]) -> None:
    plan = prompts.plan(golden_request(case), ScoringOptions(), ROOM)
    assert [readout.prompt.token_ids for question in plan.questions for readout in question.readouts] == case[
        "prompt_token_ids"
    ]
