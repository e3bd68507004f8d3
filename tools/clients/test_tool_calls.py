"""Tools by openai-python, LangChain, pydantic-ai, openai-agents and smolagents.

The model knows no tools, so what it calls is arbitrary; the form is what counts.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolUnionParam

from tools.clients.conftest import MODEL
from tools.clients.environments import python_environment, run

pytestmark = pytest.mark.clients

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the weather in Oslo?"}]
WEATHER: list[ChatCompletionToolUnionParam] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "minimum": 1}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    }
]


def printed_by(environment: str, script: str, base_url: str, home: Path) -> Any:
    path = f"tools/clients/tool_calls/{script}.py"
    return json.loads(run("python", path, base_url=base_url, home=home, programs=python_environment(environment)))


def is_weather(arguments: Any) -> bool:
    """True for the required arguments; the schemas of most clients allow others beside them."""
    return isinstance(arguments["city"], str) and type(arguments["days"]) is int


def is_city(value: Any) -> bool:
    return len(value["name"]) <= 20 and 0 <= value["population"] <= 100_000_000


def test_openai_python_helpers(base_url: str) -> None:
    with OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        fields: dict[str, Any] = {
            "model": MODEL,
            "messages": QUESTION,
            "tools": WEATHER,
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "temperature": 0,
            "max_tokens": 200,
            "logprobs": True,
        }
        parsed = client.chat.completions.parse(**fields).choices[0]
        assert parsed.message.tool_calls
        (call,) = parsed.message.tool_calls
        assert is_weather(call.function.parsed_arguments)
        spans = (call.model_extra or {})["logprobs"]["arguments"]
        assert [span["name"] for span in spans] == ["city", "days"]
        deltas, done = "", list[Any]()
        with client.chat.completions.stream(**fields) as stream:
            for event in stream:
                if event.type == "tool_calls.function.arguments.delta":
                    deltas += event.arguments_delta
                elif event.type == "tool_calls.function.arguments.done":
                    done.append(event.parsed_arguments)
            final = stream.get_final_completion().choices[0]
        assert final.message.tool_calls
        assert (final.message.tool_calls[0].function.arguments, final.finish_reason) == (deltas, "tool_calls")
        assert (deltas, done) == (call.function.arguments, [call.function.parsed_arguments])
        assert final.logprobs
        assert parsed.logprobs
        assert final.logprobs.content == parsed.logprobs.content
        history: list[Any] = [
            *QUESTION,
            parsed.message.model_dump(exclude={"parsed"}),
            {"role": "tool", "tool_call_id": call.id, "content": "Rain."},
        ]
        answer = client.chat.completions.create(model=MODEL, messages=history, max_tokens=8).choices[0]
        assert answer.message.content


def test_langchain(base_url: str, tmp_path: Path) -> None:
    printed = printed_by("langchain", "ask_langchain", base_url, tmp_path)
    (call,) = printed["calls"]
    assert call["name"] == "weather"
    assert is_weather(call["args"])
    assert printed["streamed"] == printed["calls"]
    assert printed["finish_reason"] == "tool_calls"
    assert printed["streamed_logprobs"] == printed["logprobs"] > 20
    assert printed["answer"]
    assert is_city(printed["city"])


def test_pydantic_ai(base_url: str, tmp_path: Path) -> None:
    printed = printed_by("pydantic_ai", "ask_pydantic_ai", base_url, tmp_path)
    assert is_city(printed["city"])
    assert printed["streamed"] == printed["arguments"] == printed["city"]
    assert printed["logprobs"] > 20
    assert printed["finish_reason"] == "tool_call"


def test_openai_agents(base_url: str, tmp_path: Path) -> None:
    printed = printed_by("openai_agents", "ask_agents", base_url, tmp_path)
    assert printed["made"] == printed["streamed"]
    assert printed["calls"] == printed["made"] * 2
    assert all(map(is_weather, printed["made"]))
    assert printed["text"]


def test_smolagents(base_url: str, tmp_path: Path) -> None:
    printed = printed_by("smolagents", "ask_smolagents", base_url, tmp_path)
    assert printed["name"] == "weather"
    assert is_weather(printed["arguments"])
    assert printed["streamed"] == printed["arguments"]
