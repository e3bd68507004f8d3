"""Streams contain the same as complete answers, token by token."""

import asyncio
from typing import Any

import pytest

from model.token_logprobs import empty_logprobs
from serve.engine.request import TokenEvent
from tests.support.fake_runner import K
from tests.support.http_client import (
    END,
    Connection,
    Gate,
    Server,
    alter_events,
    body_of,
    chunks_of,
    events_of,
    serving,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "top_token_ids")


def choices_of(chunks: list[Any], index: int = 0) -> list[Any]:
    """The parts of the chunks that belong to one choice."""
    return [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


def text_of(choices: list[Any]) -> str:
    return "".join(choice["text"] if "text" in choice else choice["delta"]["content"] for choice in choices)


def joined(choices: list[Any], path: str) -> Any:
    """The chunks of a choice merged: text, log-probs, ids and finish reason."""
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    numbers: Any = [entry for part in logprobs for entry in part["content"]] if path == CHAT else None
    if path == COMPLETIONS:
        numbers = {name: [value for part in logprobs for value in part[name]] for name in COLUMNS}
    ids = [token for choice in choices for token in choice.get("token_ids", [])]
    return text_of(choices), numbers, ids, choices[-1]["finish_reason"], choices[-1]["stop_reason"]


def complete(choice: Any, path: str) -> Any:
    """A choice of a complete answer in the same form."""
    text = choice["message"]["content"] if path == CHAT else choice["text"]
    numbers = choice["logprobs"]["content"] if path == CHAT else choice["logprobs"]
    return text, numbers, choice["token_ids"], choice["finish_reason"], choice["stop_reason"]


async def test_stream_chunks_of_chat(server: Server) -> None:
    chunks = await server.chat_stream(max_tokens=2)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for chunk in chunks:
        assert chunk.pop("id").startswith("chatcmpl-")
        assert chunk.pop("created") > 1_700_000_000
        assert chunk.pop("model") == "org/bytes"
        assert chunk.pop("system_fingerprint") is None
        assert chunk.pop("object") == "chat.completion.chunk"
    entry = {"index": 0, "logprobs": None, "finish_reason": None}
    assert chunks == [
        {"choices": [entry | {"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [entry | {"delta": {"content": "H"}}]},
        {"choices": [entry | {"delta": {"content": "e"}, "finish_reason": "length", "stop_reason": None}]},
    ]


async def test_stream_chunks_of_completions(server: Server) -> None:
    chunks = await server.complete_stream(max_tokens=2, logprobs=0, return_token_ids=True)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    first, last = choices_of(chunks)
    assert first == {
        "index": 0,
        "text": "H",
        "logprobs": {
            "tokens": ["H"],
            "token_logprobs": [-0.1],
            "top_logprobs": [{"H": -0.1}],
            "text_offset": [0],
            "top_token_ids": [[]],
        },
        "finish_reason": None,
        "prompt_token_ids": [72, 105],
        "token_ids": [72],
    }
    assert (last["text"], last["logprobs"]["text_offset"], last["finish_reason"]) == ("e", [1], "length")
    assert "prompt_token_ids" not in last


@PATHS
async def test_stream_headers(server: Server, path: str) -> None:
    response = await server.post(path, body_of(path, stream=True))
    assert response.headers["cache-control"] == "no-cache"
    assert events_of(response)[-1] == "[DONE]"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 3},
        {"max_tokens": 0},
        {"stop": "el"},
        {"stop": "lox", "max_tokens": 5},
        {"stop": ["lo"], "include_stop_str_in_output": True},
        {"stop_token_ids": [108]},
        {"ignore_eos": True, "max_tokens": 9, "skip_special_tokens": False},
        {"return_tokens_as_token_ids": True},
    ],
)
@PATHS
async def test_stream_joined_chunks_equal_answer(server: Server, path: str, fields: dict[str, Any]) -> None:
    fields = {"return_token_ids": True, "logprobs": True if path == CHAT else 2} | fields
    fields |= {"top_logprobs": 2} if path == CHAT else {}
    answer = (await server.post(path, body_of(path, **fields))).json()
    chunks = chunks_of(await server.post(path, body_of(path, **fields, stream=True)))
    choices = choices_of(chunks)
    assert joined(choices, path) == complete(answer["choices"][0], path)
    assert all(choice["finish_reason"] is None for choice in choices[:-1])


@PATHS
async def test_stream_one_chunk_per_token(server: Server, path: str) -> None:
    chunks = chunks_of(await server.post(path, body_of(path, stream=True, return_token_ids=True)))
    ids = [choice["token_ids"] for choice in choices_of(chunks) if "token_ids" in choice]
    assert ids == [[token] for token in (*b"Hello", END)]


@pytest.mark.parametrize("text", ["😊é", "日本"])
@PATHS
async def test_stream_split_character_keeps_logprobs(path: str, text: str) -> None:
    fields: dict[str, Any] = {"logprobs": True if path == CHAT else 0, "max_tokens": len(text.encode())}
    async with serving(text.encode()) as server:
        chunks = chunks_of(await server.post(path, body_of(path, stream=True, return_token_ids=True, **fields)))
    choices = [choice for choice in choices_of(chunks) if choice["logprobs"]]
    texts, sizes = [text_of([part]) for part in choices], [len(character.encode()) for character in text]
    assert texts == [
        part for size, character in zip(sizes, text, strict=True) for part in [""] * (size - 1) + [character]
    ]
    key = "content" if path == CHAT else "tokens"
    assert [len(choice["logprobs"][key]) for choice in choices] == [1] * sum(sizes)
    if path == CHAT:
        assert bytes(b for c in choices for e in c["logprobs"]["content"] for b in e["bytes"]).decode() == text


async def test_stream_stop_string_prefix_held_back(server: Server) -> None:
    choices = choices_of(await server.chat_stream(stop="elx", logprobs=True))[1:]
    assert [text_of([part]) for part in choices] == ["H", "", "", "ell", "o", ""]
    assert [len(choice["logprobs"]["content"]) for choice in choices] == [1] * 6


async def test_stream_event_of_several_tokens(fresh_server: Server) -> None:
    scores = empty_logprobs(5, K)
    scores.logprob[:] = scores.top_logprobs[:] = -1
    alter_events(fresh_server, lambda _: TokenEvent(list(b"Hello"), scores))
    choices = choices_of(await fresh_server.chat_stream(stop="el", logprobs=True, return_token_ids=True))[1:]
    assert [text_of([part]) for part in choices] == ["H"]
    assert choices[0]["token_ids"] == list(b"Hel")
    assert [entry["token"] for entry in choices[0]["logprobs"]["content"]] == ["H", "e", "l"]
    answer = await fresh_server.complete(stop="el", logprobs=0)
    assert answer["choices"][0]["logprobs"]["tokens"] == ["H", "e", "l"]
    assert answer["usage"]["completion_tokens"] == 3


@PATHS
async def test_stream_usage_in_last_chunk(server: Server, path: str) -> None:
    fields = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3}
    *chunks, last = chunks_of(await server.post(path, body_of(path, **fields)))
    prompt = 9 if path == CHAT else 2
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == prompt
    assert last["usage"]["completion_tokens"] == 3
    assert last["usage"]["total_tokens"] == prompt + 3
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
    assert last["id"] == chunks[0]["id"]


@PATHS
@pytest.mark.parametrize("options", [{}, {"include_usage": False}, {"continuous_usage_stats": True}])
async def test_stream_usage_only_if_requested(server: Server, path: str, options: dict[str, Any]) -> None:
    chunks = chunks_of(await server.post(path, body_of(path, stream=True, stream_options=options)))
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


@PATHS
async def test_stream_usage_in_every_chunk(server: Server, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = chunks_of(await server.post(path, body_of(path, stream=True, stream_options=options, max_tokens=3)))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == ([0, 1, 2, 3, 3] if path == CHAT else [1, 2, 3, 3])


@PATHS
async def test_stream_prompt_logprobs_in_first_chunk(server: Server, path: str) -> None:
    fields = {"prompt_logprobs": 2, "max_tokens": 2}
    answer = (await server.post(path, body_of(path, **fields))).json()
    chunks = chunks_of(await server.post(path, body_of(path, **fields, stream=True)))
    where, expected = (chunks, answer) if path == CHAT else (choices_of(chunks), answer["choices"][0])
    assert where[0]["prompt_logprobs"] == expected["prompt_logprobs"]
    assert where[0]["prompt_logprobs"][0] is None
    assert all("prompt_logprobs" not in other for other in where[1:])


@PATHS
async def test_stream_scoring_without_generation(server: Server, path: str) -> None:
    fields = {"prompt_logprobs": 0, "max_tokens": 0, "stream": True, "return_token_ids": True}
    chunks = chunks_of(await server.post(path, body_of(path, **fields)))
    choices = choices_of(chunks)
    assert (text_of(choices), choices[-1]["finish_reason"], choices[-1]["token_ids"]) == ("", "length", [])
    first = chunks[0] if path == CHAT else choices[0]
    assert len(first["prompt_logprobs"]) == len(first["prompt_token_ids"]) > 1


@pytest.mark.parametrize("logprobs", [None, 0, 2])
async def test_stream_echo(server: Server, logprobs: int | None) -> None:
    fields: dict[str, Any] = {"echo": True, "logprobs": logprobs, "max_tokens": 3, "return_token_ids": True}
    (choice,) = (await server.complete(**fields))["choices"]
    choices = choices_of(await server.complete_stream(**fields))
    assert [text_of([part]) for part in choices] == ["HiH", "e", "l"]
    if logprobs is not None:
        assert joined(choices, COMPLETIONS) == complete(choice, COMPLETIONS)
        assert [len(part["logprobs"]["tokens"]) for part in choices] == [3, 1, 1]
        assert choices[0]["prompt_logprobs"] == choice["prompt_logprobs"]


async def test_stream_echo_without_generation(server: Server) -> None:
    (choice,) = choices_of(await server.complete_stream(echo=True, logprobs=1, max_tokens=0))
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert len(choice["logprobs"]["tokens"]) == 2


async def test_stream_two_chats() -> None:
    fields = {"n": 2, "seed": 3, "temperature": 1, "max_tokens": 6, "logprobs": True, "return_token_ids": True}
    async with serving(None) as server:
        answer = await server.chat(**fields)
        chunks = await server.chat_stream(**fields, prompt_logprobs=0)
    for index in range(2):
        choices = choices_of(chunks, index)
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in choices[1:])
        assert [choice["finish_reason"] for choice in choices] == [None] * 6 + ["length"]
        assert joined(choices, CHAT) == complete(answer["choices"][index], CHAT)
    assert len([chunk for chunk in chunks if "prompt_token_ids" in chunk]) == 2
    assert len([chunk for chunk in chunks if "prompt_logprobs" in chunk]) == 1


async def test_stream_several_prompts_and_n() -> None:
    fields: dict[str, Any] = {"prompt": ["ab", [3]], "n": 2, "seed": 3, "temperature": 1, "max_tokens": 4, "echo": True}
    fields |= {"logprobs": 1, "return_token_ids": True}
    async with serving(None) as server:
        answer = await server.complete(**fields)
        chunks = await server.complete_stream(**fields, stream_options={"include_usage": True})
    for index in range(4):
        choices = choices_of(chunks, index)
        expected = answer["choices"][index]
        assert joined(choices, COMPLETIONS) == complete(expected, COMPLETIONS)
        assert choices[0]["prompt_logprobs"] == expected["prompt_logprobs"]
        assert choices[0]["prompt_token_ids"] == expected["prompt_token_ids"]
    assert [name for name, _ in server.runner.calls].count("score") == 2  # once an answer: [3] has no second token
    assert chunks[-1]["usage"] == answer["usage"]


@PATHS
async def test_stream_sends_each_token_at_once(fresh_server: Server, path: str) -> None:
    """Benchmarks take the first chunk for the first token."""
    gate = fresh_server.runner.before_call = Gate("read")
    connection = Connection(path, body_of(path, stream=True))
    run = asyncio.create_task(connection.run(fresh_server.app))
    await gate.reached()
    assert connection.sent.empty()
    next_gate = fresh_server.runner.before_call = Gate("read")
    gate.open()
    await next_gate.reached()
    if path == CHAT:
        assert b'"role":"assistant"' in await connection.data()
    assert b'"H"' in await connection.data()
    assert connection.sent.empty()
    next_gate.open()
    await run
