"""The requests of vLLM's `bench serve`, and what it reads of the answers, on both endpoints."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from tools.clients.conftest import MODEL

PROMPT = "Once upon a time there was a"
OUTPUT = 12  # tokens
ENDPOINTS = pytest.mark.parametrize("path", ["completions", "chat/completions"])
type Body = dict[str, Any]


@pytest.fixture
async def client(base_url: str) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=base_url, timeout=60) as client:
        yield client


@dataclass(slots=True)
class Output:
    """What the benchmark keeps of an answer; it takes times where we count."""

    text: str = ""
    firsts: int = 0  # a first chunk with choices: the time to first token
    others: int = 0  # each further one: an inter-token latency
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    logprobs: int = 0  # entries; the benchmark asks for them and drops them


def body_of(path: str, logprobs: int | None = None) -> Body:
    """A request as the benchmark builds it; nulls are sent."""
    common: Body = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0}
    if path == "completions":
        return common | {"prompt": PROMPT, "repetition_penalty": 1.0, "max_tokens": OUTPUT, "logprobs": logprobs}
    parts = [{"type": "text", "text": PROMPT}]
    return common | {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": OUTPUT}


async def ask(client: httpx2.AsyncClient, path: str, body: Body, request_id: str) -> Output:
    """Sends a request and reads its stream with the benchmark's rules."""
    output, text = Output(), ""
    # No content-type for completions but what the HTTP client adds; a key that nobody asks for.
    headers = {"x-request-id": request_id, "authorization": "Bearer none"}
    async with client.stream("POST", path, json=body, headers=headers) as response:
        assert response.status_code == 200  # it takes no other for success
        assert response.headers["x-request-id"] == request_id
        async for piece in response.aiter_text():
            text += piece
    *messages, last, rest = text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    for message in messages:
        chunk = json.loads(message.removeprefix("data: "))
        if choices := chunk.get("choices"):
            output.firsts, output.others = 1, output.others + output.firsts
            choice = choices[0]
            output.text += (choice["text"] if path == "completions" else choice["delta"].get("content")) or ""
            logprobs = choice.get("logprobs") or {}
            output.logprobs += len(logprobs.get("token_logprobs", logprobs.get("content", [])))
        elif usage := chunk.get("usage"):
            output.output_tokens, output.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
    return output


async def whole(client: httpx2.AsyncClient, path: str, body: Body) -> tuple[str, Any]:
    """The text and usage of the same request without a stream."""
    response = await client.post(path, json={**body, "stream": False, "stream_options": None})
    assert response.status_code == 200, response.text
    answer = response.json()
    choice = answer["choices"][0]
    return choice["text"] if path == "completions" else choice["message"]["content"], answer["usage"]


@ENDPOINTS
async def test_vllm_bench_counts_tokens(client: httpx2.AsyncClient, path: str) -> None:
    body = body_of(path) | {"ignore_eos": True}
    output = await ask(client, path, body, "bench-1")
    text, usage = await whole(client, path, body)
    assert text
    assert output.text == text
    assert (output.prompt_tokens, output.output_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert output.output_tokens == OUTPUT
    # A chat's first chunk says who speaks and has no token. A slow reader may be sent several tokens in one chunk.
    chunks = output.firsts + output.others
    assert 1 <= chunks - (path == "chat/completions") <= OUTPUT
    assert output.logprobs == 0


@pytest.mark.parametrize("logprobs", [0, 1, 5])
async def test_vllm_bench_with_logprobs(client: httpx2.AsyncClient, logprobs: int) -> None:
    output = await ask(client, "completions", body_of("completions", logprobs), f"bench-logprobs-{logprobs}")
    assert output.logprobs == output.output_tokens
    assert output.text == (await ask(client, "completions", body_of("completions"), "bench-none")).text


@ENDPOINTS
async def test_vllm_bench_with_more_requests_than_rows(client: httpx2.AsyncClient, path: str) -> None:
    body = body_of(path) | {"ignore_eos": True}
    outputs = await asyncio.gather(*[ask(client, path, body, f"bench-{i}") for i in range(10)])
    assert {output.output_tokens for output in outputs} == {OUTPUT}
    assert {output.text for output in outputs} == {outputs[0].text}


async def test_vllm_bench_finds_the_model(client: httpx2.AsyncClient) -> None:
    answer = (await client.get("models")).json()
    assert answer["data"][0]["id"] == MODEL
