"""Clients of decisions: openai-python, typesafe-sdk, LangChain, pydantic-ai and LiteLLM.

The scripts in `decisions` run in environments of their own and print what they got, which must be the server's numbers.
"""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tools.clients.conftest import MODEL
from tools.clients.environments import python_environment, run

pytestmark = pytest.mark.clients

TEXT = "I was charged twice. Please help!"
PREDICATE = {"type": "predicate", "name": "billing", "instructions": "Is the message about billing?"}
TONE = {
    "type": "choice",
    "name": "tone",
    "instructions": "What is the tone?",
    "choices": [{"value": "calm"}, {"value": True, "description": "angry"}, {"value": "true"}],
}
ANGRY = TONE | {"choices": [{"value": "calm"}, {"value": "angry", "description": "loud"}]}
URGENCY = {
    "type": "score",
    "name": "urgency",
    "instructions": "How urgent?",
    "levels": [{"label": "low"}, {"label": "high"}],
}


def ask(name: str, script: str, base_url: str, home: Path, **variables: str) -> Any:
    """The JSON that a script prints."""
    path = f"tools/clients/decisions/{script}.py"
    printed = run("python", path, base_url=base_url, home=home, programs=python_environment(name), variables=variables)
    return json.loads(printed)


def decide(base_url: str, *questions: dict[str, Any], **fields: Any) -> Any:
    body = {"input": TEXT, "questions": [*questions]} | fields
    response = httpx2.post(f"{base_url}/decisions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def probabilities(answer: dict[str, Any]) -> list[float]:
    if answer["type"] == "predicate":
        return [answer["probability"]]
    return [option["probability"] for option in answer["probabilities"]]


def test_openai_python(base_url: str, tmp_path: Path) -> None:
    printed = ask("openai_decisions", "ask_openai", base_url, tmp_path)
    expected = decide(base_url, PREDICATE, TONE, URGENCY)["answers"]
    assert [probabilities(answer) for answer in printed["answers"]] == [probabilities(answer) for answer in expected]
    assert [answer["evidence"]["logprobs"] for answer in printed["answers"]] == [
        answer["evidence"]["logprobs"] for answer in expected
    ]
    assert [option["value"] for option in printed["answers"][1]["probabilities"]] == ["calm", True, "true"]
    assert [answer["evidence"]["scoring"] for answer in printed["sequences"]] == ["sequences"] * 3
    assert printed["usage"]["input_tokens"] > 100
    run, async_run = printed["runs"]
    assert run["status"] == "unverified"
    assert set(run["completed"]) <= {"key", "lamp", "map"}
    assert async_run == run
    assert printed["error"] == {"param": "questions[1].name", "code": "invalid_value"}
    assert printed["models"] == [MODEL]


def test_typesafe_sdk(base_url: str, tmp_path: Path) -> None:
    printed = ask("typesafe", "ask_typesafe", base_url, tmp_path)
    assert printed["same"]
    assert [*printed["answers"]] == ["billing", "tone.of voice", "urgency", "single"]
    assert sum(printed["answers"]["tone.of voice"]["probabilities"].values()) == pytest.approx(1)
    assert printed["answers"]["urgency"]["legend"] == {"0": "low", "1": {"when": "today"}}
    assert printed["answers"]["single"]["confidence"] == 1
    assert printed["usage"]["input_tokens"] > 1000
    assert printed["models"] == [MODEL]
    assert "questions.odd" in printed["error"]
    assert "request_id=" in printed["error"]


def test_langchain(base_url: str, tmp_path: Path) -> None:
    printed = ask("langchain", "ask_langchain", base_url, tmp_path)
    billing, tone, urgency = decide(base_url, PREDICATE, TONE, URGENCY)["answers"]
    assert printed["billing"] == billing["probability"]
    assert printed["tone"] == probabilities(tone)
    assert printed["urgency"] == probabilities(urgency)
    assert printed["messages"] == ["billing", "tone", "urgency"]
    assert printed["request_id"]


def test_pydantic_ai(base_url: str, tmp_path: Path) -> None:
    printed = ask("pydantic_ai", "ask_pydantic_ai", base_url, tmp_path)
    # Its model for OpenAI's form numbers the levels.
    numbered = [{"label": "0", "description": "low"}, {"label": "1", "description": "high"}]
    for name, levels in (("openai", numbered), ("system_one", URGENCY["levels"])):
        tone, urgency = decide(base_url, ANGRY, URGENCY | {"levels": levels})["answers"]
        answers = printed[name]["answers"]
        assert [*answers["tone"]["probabilities"].values()] == probabilities(tone)
        assert answers["urgency"]["score"] == urgency["score"]
        assert 0 <= answers["billing"]["noul"] <= 1
        assert printed[name]["model"] == MODEL
        assert printed[name]["input_tokens"] > 100
        assert printed[name]["agent"]["tone"] in ("calm", "angry")


def test_litellm(base_url: str, tmp_path: Path) -> None:
    # Without the variable it asks for newer prices when it is imported.
    printed = ask("litellm", "ask_litellm", base_url, tmp_path, LITELLM_LOCAL_MODEL_COST_MAP="True")
    billing, tone = decide(base_url, PREDICATE, ANGRY)["answers"]
    answers = printed["decisions"]["answers"]
    assert probabilities(answers[0]) == probabilities(billing)
    assert probabilities(answers[1]) == probabilities(tone)
    assert printed["systemone"]["answers"]["billing"]["noul"] == billing["probability"]
    assert [*printed["systemone"]["answers"]["tone"]["probabilities"].values()] == probabilities(tone)
