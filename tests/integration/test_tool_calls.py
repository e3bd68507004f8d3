"""Tool calls of the default model, which knows no tools: they are valid, and their log-probs are those of scoring."""

import json
import math
from typing import Any

import httpx2
import jsonschema
import pytest

from tests.support.server_process import ServerProcess

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Forecast.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}
pytestmark = pytest.mark.slow


def post(server: ServerProcess, path: str, **fields: Any) -> Any:
    response = httpx2.post(f"{server.url}/v1/{path}", json=fields, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_forced_calls_are_valid(server: ServerProcess, choice: Any, temperature: float) -> None:
    answer = post(
        server,
        "chat/completions",
        messages=[{"role": "user", "content": "What is the weather in Oslo tomorrow?"}],
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=temperature,
        seed=5,
        logprobs=True,
        return_token_ids=True,
        max_tokens=200,
    )
    assert len(answer["warnings"]) == 1
    (made,) = answer["choices"]
    (call,) = made["message"]["tool_calls"]
    assert (made["message"]["content"], made["finish_reason"]) == (None, "tool_calls")
    arguments = json.loads(call["function"]["arguments"])
    if choice is NAMED:
        assert call["function"]["name"] == "weather"
    if call["function"]["name"] == "weather":
        jsonschema.validate(arguments, WEATHER)
        assert [item["name"] for item in call["logprobs"]["arguments"]] == list(arguments)
    else:
        assert arguments == {}
    prompt, generated = answer["prompt_token_ids"], made["token_ids"]
    scored = post(server, "completions", prompt=prompt + generated, max_tokens=0, logprobs=0, echo=True)
    values = scored["choices"][0]["logprobs"]["token_logprobs"][len(prompt) :]
    assert [entry["logprob"] for entry in made["logprobs"]["content"]] == values
    for item in (call["logprobs"], *call["logprobs"]["arguments"]):
        assert item["logprob"] == pytest.approx(math.fsum(values[item["start"] : item["end"]]), abs=1e-4)


def test_streamed_call_equals_the_whole(server: ServerProcess) -> None:
    fields = {
        "messages": [{"role": "user", "content": "What is the weather in Oslo?"}],
        "tools": TOOLS,
        "tool_choice": NAMED,
        "temperature": 0,
        "logprobs": True,
        "max_tokens": 200,
    }
    (whole,) = post(server, "chat/completions", **fields)["choices"]
    arguments, entries, spans = "", list[Any](), list[Any]()
    with httpx2.stream(
        "POST", f"{server.url}/v1/chat/completions", json=fields | {"stream": True}, timeout=120
    ) as stream:
        for line in stream.iter_lines():
            if not line.startswith("data: {"):
                continue
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            entries += (choice["logprobs"] or {}).get("content", [])
            for call in choice["delta"].get("tool_calls", ()):
                arguments += call.get("function", {}).get("arguments", "")
                spans += [call["logprobs"]] if "logprobs" in call else []
    (call,) = whole["message"]["tool_calls"]
    assert (arguments, spans) == (call["function"]["arguments"], [call["logprobs"]])
    assert entries == whole["logprobs"]["content"]
