"""Clients of /v1/responses and /v1/messages: openai-python, openai-agents and anthropic.

The scripts in `responses` run in environments of their own and print what they got, which must be the server's numbers.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.server_process import ServerProcess
from tools.clients.conftest import MODEL
from tools.clients.environments import python_environment, run

pytestmark = pytest.mark.clients

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def base_url(compilation_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that stores responses."""
    store = tmp_path_factory.mktemp("responses") / "store.db"
    process = ServerProcess(
        *("--dtype", "float32", "--max-num-seqs", "4", "--max-model-len", "8192", "--response-store", str(store)),
        *("--compilation-cache-dir", str(compilation_cache)),
    )
    yield f"{process.url}/v1"
    assert process.terminate() == 0


def ask(name: str, script: str, base_url: str, home: Path) -> Any:
    """The JSON that a script prints."""
    path = f"tools/clients/responses/{script}.py"
    return json.loads(run("python", path, base_url=base_url, home=home, programs=python_environment(name)))


def chat(base_url: str, *messages: tuple[str, str], **fields: Any) -> tuple[str, list[Any]]:
    """Text and log-prob entries of a chat."""
    body = {
        "model": MODEL,
        "messages": [{"role": role, "content": content} for role, content in messages],
        "temperature": 0,
        "max_tokens": 16,
        "logprobs": True,
    }
    response = httpx2.post(f"{base_url}/chat/completions", json=body | fields, timeout=120)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return choice["message"]["content"], choice["logprobs"]["content"]


def test_openai_python(base_url: str, tmp_path: Path) -> None:
    printed = ask("openai_decisions", "ask_openai", base_url, tmp_path)
    text, entries = chat(base_url, ("user", QUESTION), top_logprobs=2)
    assert printed["text"] == text == "The capital of France is Paris."
    [part] = printed["response"]["output"][0]["content"]
    assert part["logprobs"] == entries
    assert printed["retrieved"] == printed["response"]
    deltas = [event for event in printed["events"] if event["type"] == "response.output_text.delta"]
    assert [entry["logprob"] for event in deltas for entry in event["logprobs"]] == [
        entry["logprob"] for entry in entries
    ]
    assert deltas[-1]["snapshot"] == text
    assert printed["final"]["output"][0]["content"][0]["logprobs"] == entries
    assert [event["type"] for event in printed["events"]][-1] == "response.completed"
    history = (("system", "Be brief."), ("user", QUESTION), ("assistant", text), ("user", "And of Italy?"))
    assert printed["follow_up"] == chat(base_url, *history)[0]
    assert [item["content"][0]["text"] for item in printed["items"]] == [QUESTION, text, "And of Italy?"]
    assert printed["deleted"] == "response_not_found"
    assert printed["refused"] == ["top_logprobs", "integer_above_max_value"]


def test_example(base_url: str, tmp_path: Path) -> None:
    programs = python_environment("openai_decisions")
    printed = run("python", "examples/responses_logprobs.py", base_url=base_url, home=tmp_path, programs=programs)
    first, second = [part.splitlines() for part in printed.split("\n== ")[1:]]
    text, entries = chat(base_url, ("user", QUESTION), max_tokens=32)
    assert first[0] == QUESTION
    assert first[1:-1] == [f"{json.dumps(entry['token'])} {entry['logprob']}" for entry in entries]
    weakest = min(entries, key=lambda entry: entry["logprob"])
    assert first[-1] == f"least certain: {json.dumps(weakest['token'])} {weakest['logprob']}"
    history = (("user", QUESTION), ("assistant", text), ("user", "And of Italy?"))
    _, entries = chat(base_url, *history, max_tokens=32)
    assert second[1:-1] == [f"{json.dumps(entry['token'])} {entry['logprob']}" for entry in entries]


def test_openai_agents(base_url: str, tmp_path: Path) -> None:
    printed = ask("openai_agents", "ask_agents", base_url, tmp_path)
    text, entries = chat(base_url, ("system", SYSTEM), ("user", QUESTION), top_logprobs=1)
    assert printed["text"] == printed["streamed"] == text
    assert printed["logprobs"] == entries
    assert printed["streamed_logprobs"] == [entry["logprob"] for entry in entries]


def test_anthropic(base_url: str, tmp_path: Path) -> None:
    printed = ask("anthropic", "ask_anthropic", base_url, tmp_path)
    text, entries = chat(base_url, ("system", SYSTEM), ("user", QUESTION), top_logprobs=2)
    [block] = printed["message"]["content"]
    assert (block["text"], block["logprobs"]) == (text, entries)
    assert printed["final"]["content"][0]["text"] == text
    assert printed["final"]["stop_reason"] == printed["message"]["stop_reason"] == "end_turn"
    deltas = [event for event in printed["events"] if event["type"] == "content_block_delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == entries
    usage = printed["final"]["usage"]
    assert printed["count"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert printed["again"] > printed["count"]
    assert printed["refused"] == ["invalid_request_error", "integer_below_min_value", True]
