"""Errors of requests: OpenAI's envelope, and the next request is answered."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve.api.errors import APIError
from serve.api.request_body import json_object
from serve.api.requests import ChatCompletionRequest, CompletionRequest, StreamOptions
from serve.api.validation import check_answers
from tests.support.fake_runner import MAX_MODEL_LEN, K
from tests.support.http_client import (
    VOCAB_SIZE,
    ExactRunner,
    Server,
    body_of,
    chat_body,
    completion_body,
    error_of,
    serving,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


async def refused(server: Server, path: str, body: Any, status: int = 400) -> tuple[str | None, str | None]:
    """The param and code of an error; also checks that the server still answers."""
    error = error_of(await server.post(path, body), status)
    assert error["type"] == "invalid_request_error"
    assert (await server.complete())["choices"][0]["text"] == "Hello"
    return error["param"], error["code"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "decimal_above_max_value"),
        ({"temperature": -0.5}, "temperature", "decimal_below_min_value"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"top_p": 0}, "top_p", "decimal_below_min_value"),
        ({"top_p": 1.5}, "top_p", "decimal_above_max_value"),
        ({"top_k": -2}, "top_k", "integer_below_min_value"),
        ({"min_p": 2}, "min_p", "decimal_above_max_value"),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 129}, "n", "integer_above_max_value"),
        ({"n": 1.0}, "n", "invalid_type"),
        ({"n": True}, "n", "invalid_type"),
        ({"max_tokens": "1"}, "max_tokens", "invalid_type"),
        ({"max_tokens": True}, "max_tokens", "invalid_type"),
        ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": 2**63}, "max_tokens", "integer_above_max_value"),
        ({"min_tokens": 4, "max_tokens": 3}, "min_tokens", "invalid_value"),
        ({"seed": 2**63}, "seed", "integer_above_max_value"),
        ({"seed": 2**70}, "seed", "integer_above_max_value"),
        ({"seed": -(2**70)}, "seed", "integer_below_min_value"),
        ({"max_tokens": MAX_MODEL_LEN}, "max_tokens", "context_length_exceeded"),
        ({"max_tokens": 2**62}, "max_tokens", "context_length_exceeded"),
        ({"stop_token_ids": [1, 2**70]}, "stop_token_ids[1]", "integer_above_max_value"),
        ({"stream": 1}, "stream", "invalid_type"),
        ({"stream": "true"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a", ""]}, "stop", "invalid_value"),
        ({"stop": ["x"] * 10_001}, "stop", "array_above_max_length"),
        ({"stop": ["x" * 50_000, "y" * 50_001]}, "stop", "string_above_max_length"),
        ({"stop": 5}, "stop", "invalid_type"),
        ({"n": 2, "best_of": 3}, "best_of", "unsupported_parameter"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "integer_below_min_value"),
        ({"stop_token_ids": [1, 2.0]}, "stop_token_ids[1]", "invalid_type"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", "invalid_value"),
        ({"prompt_logprobs": -2}, "prompt_logprobs", "integer_below_min_value"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "invalid_value"),
        ({"prompt_logprobs": K + 1}, "prompt_logprobs", "integer_above_max_value"),
        ({"prompt_logprobs": True}, "prompt_logprobs", "invalid_type"),
        ({"model": 5}, "model", "invalid_type"),
        ({"logprobs_mode": "raw_logits"}, "logprobs_mode", "invalid_value"),
        ({"logprobs_mode": 1}, "logprobs_mode", "invalid_value"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "integer_below_min_value"),
        ({"truncate_prompt_tokens": MAX_MODEL_LEN + 1}, "truncate_prompt_tokens", "invalid_value"),
        ({"truncation_side": "middle"}, "truncation_side", "invalid_value"),
        ({"prompt_logprobs_format": "rows", "prompt_logprobs": 1}, "prompt_logprobs_format", "invalid_value"),
        ({"prompt_logprobs_format": "columns"}, "prompt_logprobs_format", "invalid_value"),
        ({"request_id": "a b"}, "request_id", "invalid_value"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_error_names_field(server: Server, path: str, fields: dict[str, Any], param: str, code: str) -> None:
    body = chat_body(**fields) if path == CHAT else completion_body(**fields)
    assert await refused(server, path, body) == (param, code)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"logprobs": 1}, "logprobs", "invalid_type"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": K + 1}, "top_logprobs", "integer_above_max_value"),
        ({"logprobs": True, "top_logprobs": -2}, "top_logprobs", "integer_below_min_value"),
        ({"logprobs": True, "top_logprobs": "1"}, "top_logprobs", "invalid_type"),
        ({"chat_template": "{{ messages }}"}, "chat_template", "unsupported_parameter"),
        ({"chat_template": 5}, "chat_template", "invalid_type"),
        ({"documents": ["text"]}, "documents[0]", "invalid_type"),
        ({"reasoning_effort": 5}, "reasoning_effort", "invalid_type"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"prompt_token_ids": []}, "prompt_token_ids", "empty_array"),
        ({"prompt_token_ids": [4, VOCAB_SIZE]}, "prompt_token_ids", "invalid_value"),
        ({"prompt_token_ids": [2**32]}, "prompt_token_ids", "invalid_value"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids[0]", "integer_below_min_value"),
        ({"prompt_token_ids": [1.0]}, "prompt_token_ids[0]", "invalid_type"),
        ({"prompt_token_ids": [4] * (MAX_MODEL_LEN + 1)}, "prompt_token_ids", "context_length_exceeded"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": "Hi"}, "messages", "invalid_type"),
        ({"messages": ["Hi"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "pope", "content": "Hi"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": 1, "content": "Hi"}]}, "messages[0].role", "invalid_type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "messages[0].content[0]", "invalid_type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "unsupported_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0].text",
            "invalid_type",
        ),
        ({"messages": [{"role": "user", "content": "refuse"}]}, "messages", "invalid_value"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "invalid_value",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "messages", "invalid_value"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs", "invalid_type"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "integer_below_min_value"),
        ({"max_completion_tokens": MAX_MODEL_LEN}, "max_completion_tokens", "context_length_exceeded"),
        ({"messages": [{"role": "tool"}, {"role": "user"}]}, "messages[1].content", "missing_required_parameter"),
        (
            {"messages": [{"role": "assistant", "content": None, "audio": {"id": "1"}}]},
            "messages[0].audio",
            "unsupported_parameter",
        ),
        ({"max_tokens": MAX_MODEL_LEN - 8}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * MAX_MODEL_LEN}]}, "messages", "context_length_exceeded"),
    ],
)
async def test_error_names_chat_field(server: Server, fields: dict[str, Any], param: str, code: str) -> None:
    assert await refused(server, CHAT, chat_body(**fields)) == (param, code)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"logprobs": -1}, "logprobs", "integer_below_min_value"),
        ({"logprobs": K + 1}, "logprobs", "integer_above_max_value"),
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": ""}, "prompt", "missing_required_parameter"),
        ({"prompt": []}, "prompt", "missing_required_parameter"),
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": {"text": "Hi"}}, "prompt", "invalid_type"),
        ({"prompt": ["Hi", ""]}, "prompt[1]", "invalid_value"),
        ({"prompt": ["Hi", []]}, "prompt[1]", "invalid_type"),
        ({"prompt": ["Hi", None]}, "prompt[1]", "invalid_type"),
        ({"prompt": [1, -1]}, "prompt[1]", "invalid_value"),
        ({"prompt": [1, VOCAB_SIZE]}, "prompt[1]", "invalid_value"),
        ({"prompt": [1, 2.0]}, "prompt[1]", "invalid_type"),
        ({"prompt": [1, "2"]}, "prompt[1]", "invalid_type"),
        ({"prompt": [True]}, "prompt[0]", "invalid_type"),
        ({"prompt": [1.0]}, "prompt[0]", "invalid_type"),
        ({"prompt": [[1], [2, 2**70]]}, "prompt[1][1]", "invalid_value"),
        ({"prompt": ["a"] * 2049}, "prompt", "array_above_max_length"),
        ({"max_tokens": MAX_MODEL_LEN - 1}, "prompt", "context_length_exceeded"),
        ({"prompt": [1] * (MAX_MODEL_LEN + 1), "max_tokens": 0}, "prompt", "context_length_exceeded"),
    ],
)
async def test_error_names_completions_field(server: Server, fields: dict[str, Any], param: str, code: str) -> None:
    assert await refused(server, COMPLETIONS, completion_body(**fields)) == (param, code)


@pytest.mark.parametrize(("path", "param"), [(CHAT, "messages"), (COMPLETIONS, "prompt")])
async def test_error_required_field_missing(server: Server, path: str, param: str) -> None:
    assert await refused(server, path, {}) == (param, "missing_required_parameter")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_error_unknown_model(server: Server, path: str) -> None:
    body = (chat_body if path == CHAT else completion_body)(model="gpt-9")
    assert await refused(server, path, body, 404) == ("model", "model_not_found")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"Hi",
        b"\xff",
        b"[]",
        b"null",
        b'"messages"',
        b'{"prompt": "Hi", "temperature": NaN}',
        b'{"prompt": "Hi", "temperature": Infinity}',
        b'{"prompt": "Hi", "temperature": 1e400}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=range(13),
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_error_body_not_json_object(server: Server, path: str, body: bytes) -> None:
    assert await refused(server, path, body) == (None, "invalid_json")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_error_content_type(server: Server, kind: str) -> None:
    body = json.dumps(completion_body())
    response = await server.client.post(COMPLETIONS, content=body, headers={"content-type": kind})
    assert error_of(response, 400)["code"] == "invalid_content_type"


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"])
async def test_json_content_types_accepted(server: Server, kind: str) -> None:
    body = json.dumps(completion_body())
    response = await server.client.post(COMPLETIONS, content=body, headers={"content-type": kind})
    assert response.status_code == 200


async def test_error_body_too_large() -> None:
    async def pieces() -> AsyncIterator[bytes]:  # sent without a Content-Length
        for _ in range(4):
            yield b" " * 100

    async with serving(max_body_bytes=300) as server:
        assert await refused(server, COMPLETIONS, b" " * 301, 413) == (None, "request_too_large")
        headers = {"content-type": "application/json"}
        response = await server.client.post(COMPLETIONS, content=pieces(), headers=headers)
        assert error_of(response, 413)["code"] == "request_too_large"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_body_of_50_megabytes(path: str) -> None:
    param = "messages" if path == CHAT else "prompt"
    text = "x" * 50_000_000
    body = chat_body(messages=[{"role": "user", "content": text}]) if path == CHAT else completion_body(prompt=text)
    async with serving(max_body_bytes=64 << 20) as server:
        assert await refused(server, path, body) == (param, "context_length_exceeded")
        assert await refused(server, path, body | {"truncate_prompt_tokens": 1}) == (param, "string_above_max_length")
        if path == COMPLETIONS:
            ids = b'{"prompt": [' + b"1," * 5_000_000 + b"1]}"
            assert await refused(server, path, ids) == (param, "context_length_exceeded")


@pytest.mark.parametrize("truncates", [{}, {"truncate_prompt_tokens": 1}])
async def test_error_too_many_ids_before_ids_are_checked(server: Server, truncates: dict[str, int]) -> None:
    for path, param in ((COMPLETIONS, "prompt"), (CHAT, "prompt_token_ids")):
        fields = {param: [1] * 10_000 + [10**6]} | truncates
        body = completion_body(**fields) if path == COMPLETIONS else chat_body(messages=None, **fields)
        error_fields = (f"{param}[10000]" if path == COMPLETIONS else param, "invalid_value") if truncates else None
        assert await refused(server, path, body) == (error_fields or (param, "context_length_exceeded"))


async def test_error_more_than_10000_messages(server: Server) -> None:
    message, part = {"role": "user", "content": "a"}, {"type": "text", "text": "a"}
    for fields, param in (
        ({"messages": [message] * 10_001}, "messages"),
        ({"messages": [message | {"content": [part] * 10_001}]}, "messages[0].content"),
        ({"documents": [{}] * 10_001}, "documents"),
    ):
        assert await refused(server, CHAT, chat_body(**fields)) == (param, "array_above_max_length")


@pytest.mark.parametrize(
    ("item", "count"),
    [
        (b"[]", 300_000),
        (b"{}", 300_000),
        (b'"a"', 300_000),
        (b'"\\\\"', 300_000),  # ends in an escaped backslash, not in an escaped quote
        (b'{"a":"b"}', 100_000),
    ],
)
async def test_error_more_than_300000_items(
    server: Server, item: bytes, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays, objects, keys and strings take more memory and time than their bytes, so they are counted unparsed."""
    body = b'{"prompt": "a", "max_tokens": 1, "user": [' + b",".join([item] * count) + b"]}"
    assert await refused(server, COMPLETIONS, body) == (None, "invalid_json")
    with monkeypatch.context() as patch:
        patch.setattr("serve.api.request_body.orjson.loads", lambda _: pytest.fail("parsed"))
        with pytest.raises(APIError, match="more than 300000"):
            json_object(body)


def test_bound_of_items_counts_no_quote_within_a_text() -> None:
    text, ids = '\\"' * 400_000, range(262_144)
    body: dict[str, Any] = {"prompt": text, "logit_bias": dict.fromkeys(map(str, ids), 1)}
    assert json_object(json.dumps(body).encode()) == body


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"prompt_logprobs": 3, "n": 2}, "prompt_logprobs"),
        (COMPLETIONS, {"echo": True, "logprobs": 3}, "logprobs"),
        (COMPLETIONS, {"prompt_logprobs": 3, "stream": True, "prompt": [[1] * 400] * 2}, "prompt_logprobs"),
        (CHAT, {"prompt_logprobs": 3, "messages": None, "prompt_token_ids": [1] * 400}, None),
        (COMPLETIONS, {"prompt_logprobs": 3, "n": 2, "stream": True}, None),
        (COMPLETIONS, {"n": 128, "logprobs": 3}, None),
        (COMPLETIONS, {"prompt_logprobs": -1, "n": 128}, None),  # written once, as they are sent
        (COMPLETIONS, {"prompt_logprobs": -1, "echo": True, "logprobs": 1, "n": 2}, "logprobs"),
        (COMPLETIONS, {"prompt_logprob_token_ids": list(range(8))}, "prompt_logprobs"),
    ],
)
async def test_error_too_many_prompt_logprobs(
    path: str, fields: dict[str, Any], param: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several prompts or choices multiply the log-probs. One full-length prompt is always accepted."""
    monkeypatch.setattr("serve.api.validation._MAX_PROMPT_LOGPROBS", 2000)
    async with serving(max_model_len=410, full_vocab=True, runner=ExactRunner) as server:
        monkeypatch.setattr("serve.api.validation._FULL_LENGTHS", 0)
        body = {"prompt": [1] * 400, **fields} if path == COMPLETIONS else fields
        body = body_of(path, max_tokens=1, **body)
        if param is None:
            assert (await server.post(path, body)).status_code == 200
        else:
            assert await refused(server, path, body) == (param, "too_many_logprobs")


async def test_prompt_logprobs_one_full_length_prompt_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.api.validation._MAX_PROMPT_LOGPROBS", 1)
    async with serving(max_model_len=410) as server:
        for fields in ({"logprobs": 3}, {"logprobs": 0, "prompt_logprob_token_ids": list(range(20))}):
            body = completion_body(prompt=[1] * 409, max_tokens=1, echo=True, **fields)
            assert (await server.post(COMPLETIONS, body)).status_code == 200


async def test_error_many_invalid_ids_is_short(server: Server) -> None:
    for bad in (-1, 10**6, 1.5, "x", None, [1]):
        body = completion_body(prompt=[1] + [bad] * 200_000, truncate_prompt_tokens=1)
        response = await server.post(COMPLETIONS, body)
        assert error_of(response, 400)["param"] == "prompt[1]"
        response = await server.post(COMPLETIONS, completion_body(stop_token_ids=[1] + [bad] * 200_000))
        assert error_of(response, 400)["param"].startswith("stop_token_ids")


async def test_error_does_not_echo_long_input(server: Server) -> None:
    for fields in ({"model": "x" * 100_000}, {"messages": [{"role": "x" * 100_000, "content": "Hi"}]}):
        response = await server.post(CHAT, chat_body(**fields))
        assert response.status_code in (400, 404)
        assert len(response.content) < 2000


async def test_error_deep_nesting_within_json_limits(server: Server) -> None:
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    assert await refused(server, CHAT, chat_body(messages=deep)) == ("messages[0]", "invalid_type")
    assert await refused(server, COMPLETIONS, completion_body(prompt=deep)) == ("prompt[0][0]", "invalid_type")
    assert await refused(server, COMPLETIONS, completion_body(tools=deep)) == ("tools", "unsupported_parameter")


def objects(levels: int) -> Any:
    """Nested lists."""
    return {"x": objects(levels - 1)} if levels else "leaf"


def with_levels(param: str, levels: int) -> dict[str, Any]:
    """A chat with a field that is nested `levels` deep."""
    first = {"role": "user", "content": "Hi"}
    match param:
        case "documents":
            return chat_body(documents=[objects(levels - 1)])
        case "messages[1].content":
            part = {"type": "text", "text": "Hi", "more": objects(levels - 2)}
            return chat_body(messages=[first, {"role": "user", "content": [part]}])
        case "messages[1].name":
            return chat_body(messages=[first, first | {"name": objects(levels)}])
    return chat_body(**{param: objects(levels)})


@pytest.mark.parametrize(
    "param",
    ["chat_template_kwargs", "documents", "messages[1].content", "messages[1].name", "metadata", "x" * 100],
)
async def test_error_more_than_64_levels(server: Server, param: str) -> None:
    await server.chat(**with_levels(param, 64))
    assert await refused(server, CHAT, with_levels(param, 65)) == (param, "invalid_value")
    assert await refused(server, CHAT, with_levels(param, 900)) == (param, "invalid_value")


async def test_error_more_than_64_levels_in_tokenize(server: Server) -> None:
    for body in ({"prompt": "Hi"}, {"messages": [{"role": "user", "content": "Hi"}]}):
        assert await refused(server, "/tokenize", body | {"more": objects(65)}) == ("more", "invalid_value")
    assert await refused(server, "/detokenize", {"tokens": [1], "more": objects(65)}) == ("more", "invalid_value")


async def test_error_more_than_4096_answers(server: Server) -> None:
    for prompts, n in ((2048, 3), (33, 128)):
        body = completion_body(prompt=["a"] * prompts, n=n)
        assert await refused(server, COMPLETIONS, body) == ("n", "integer_above_max_value")
    body = completion_body(prompt=["a"] * 4097)
    assert await refused(server, COMPLETIONS, body) == ("prompt", "array_above_max_length")
    check_answers(2048, 2)
    check_answers(32, 128)


async def test_null_is_default_of_every_field(server: Server) -> None:
    nulls = dict.fromkeys(CompletionRequest.model_fields.keys() - {"prompt", "temperature"})
    assert (await server.complete(**nulls))["choices"] == (await server.complete())["choices"]
    nulls = dict.fromkeys(ChatCompletionRequest.model_fields.keys() - {"messages", "temperature"})
    assert (await server.chat(**nulls))["choices"] == (await server.chat())["choices"]
    await server.complete(temperature=None)
    assert await server.chat_stream(stream_options=dict.fromkeys(StreamOptions.model_fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 3}, "`temperature`: 3 is out of range; it must be at most 2."),
        ({"top_p": 0}, "`top_p`: 0 is out of range; it must be above 0."),
        ({"n": 129}, "`n`: 129 is out of range; it must be at most 128."),
        ({"seed": 2**63}, f"`seed`: {2**63} is out of range; it must be below {2**63}."),
        ({"seed": 2**70}, f"`seed`: {2**70} is out of range; it does not fit into 64 bits."),
        ({"seed": 1.5}, "`seed`: Input should be a valid integer."),
    ],
)
async def test_error_of_range_says_range(server: Server, fields: dict[str, Any], message: str) -> None:
    for path in (CHAT, COMPLETIONS):
        assert error_of(await server.post(path, body_of(path, **fields)), 400)["message"] == message
