"""Structured output of the default model: answers are valid, and log-probs are those of scoring, to the bit."""

from typing import Any

import httpx2
import pytest

from tests.support.server_process import ServerProcess
from tools.schema_answers import check

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
pytestmark = pytest.mark.slow


def test_answers_end_and_are_valid(server: ServerProcess) -> None:
    counts = check(server.url, 10, 3)
    assert counts.invalid == 0
    assert counts.ended >= 0.95 * counts.answers


def complete(server: ServerProcess, **fields: Any) -> Any:
    response = httpx2.post(f"{server.url}/v1/completions", json=fields, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


@pytest.mark.parametrize("temperature", [0, 1])
def test_logprobs_equal_scoring_to_the_bit(server: ServerProcess, temperature: float) -> None:
    choice = complete(
        server,
        prompt="A record of a person:\n",
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
        max_tokens=80,
        temperature=temperature,
        seed=3,
        logprobs=2,
        return_token_ids=True,
    )
    assert choice["finish_reason"] == "stop"
    ids, generated = choice["prompt_token_ids"], choice["token_ids"]
    scored = complete(server, prompt=ids + generated, max_tokens=0, logprobs=2, echo=True, return_token_ids=True)
    columns, expected = choice["logprobs"], scored["logprobs"]
    assert columns["token_logprobs"] == expected["token_logprobs"][len(ids) :]
    assert columns["top_token_ids"] == expected["top_token_ids"][len(ids) :]
    assert len(columns["allowed_mass"]) == len(columns["forced"]) == len(generated)
    assert all(0 < mass <= 1.001 for mass in columns["allowed_mass"])
