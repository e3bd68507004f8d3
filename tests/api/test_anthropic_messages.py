"""/v1/messages: Anthropic's answers, events and errors, with log-probs."""

import json
from typing import Any

import pytest

from serve.api.messages.requests import MessagesPromptFields, chat_messages
from serve.api.messages.responses import MessageAnswer, MessageErrorAnswer, MessageEvent, TokenCount
from serve.engine.request import FinishReason, TokenEvent
from serve.text.chat import PromptError
from tests.support.events import named_events, types_of, without
from tests.support.http_client import END, MODEL, Server, alter_events, answered, serving, submitted

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
USER = {"role": "user", "content": "Hi"}


def body_of(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER], "max_tokens": 50, "temperature": 0} | fields


async def create(server: Server, **fields: Any) -> Any:
    answer = answered(await server.post(PATH, body_of(**fields)))
    MessageAnswer.model_validate_json(json.dumps(answer))
    return answer


async def stream(server: Server, **fields: Any) -> list[Any]:
    events = named_events(await server.post(PATH, body_of(**fields, stream=True)))
    for event in events:
        MessageEvent.model_validate_json(json.dumps(event))
    return events


def error_in(response: Any, status: int) -> tuple[str, str | None, str | None]:
    """Type, field and code of an error, whose envelope is checked."""
    assert response.status_code == status, response.text
    error = MessageErrorAnswer.model_validate_json(response.content).error
    return error.type, error.details["param"], error.details["error_code"]


async def test_message_has_content_and_usage(server: Server) -> None:
    response = await server.post(PATH, body_of())
    assert response.headers["request-id"] == response.headers["x-request-id"]
    answer = answered(response)
    assert answer["id"].startswith("msg_")
    assert answer["content"] == [{"type": "text", "text": "Hello"}]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", MODEL)
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == 9
    assert usage["output_tokens"] == 6


async def test_usage_counts_cached_tokens_apart(fresh_server: Server) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 200}]}
    first = (await create(fresh_server, **long))["usage"]
    second = (await create(fresh_server, **long))["usage"]
    assert first["cache_read_input_tokens"] == 0
    assert second["cache_read_input_tokens"] >= 128
    assert sum(second[name] for name in ("input_tokens", "cache_read_input_tokens")) == first["input_tokens"]


@pytest.mark.parametrize(
    ("fields", "reason", "sequence", "text"),
    [
        ({"max_tokens": 2}, "max_tokens", None, "He"),
        ({"stop_sequences": ["lo"]}, "stop_sequence", "lo", "Hel"),
        ({"stop_sequences": []}, "end_turn", None, "Hello"),
    ],
)
async def test_stop_reason(server: Server, fields: dict[str, Any], reason: str, sequence: str, text: str) -> None:
    answer = await create(server, **fields)
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    assert answer["content"][0]["text"] == text
    *_, delta, _ = await stream(server, **fields)
    assert delta["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


async def test_log_probs_are_those_of_chat(server: Server) -> None:
    chat = await server.chat(logprobs=True, top_logprobs=2)
    answer = await create(server, logprobs=True, top_logprobs=2)
    assert answer["content"][0]["logprobs"] == chat["choices"][0]["logprobs"]["content"]


@pytest.mark.parametrize("fields", [{}, {"logprobs": True, "top_logprobs": 1}])
async def test_stream_adds_up_to_the_message(server: Server, fields: dict[str, Any]) -> None:
    events, answer = await stream(server, **fields), await create(server, **fields)
    assert types_of(events) == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start, deltas, end = (
        events[0]["message"],
        [event for event in events if event["type"] == "content_block_delta"],
        events[-2],
    )
    [block] = answer["content"]
    assert without(start | end["delta"] | {"content": [block]}, "id", "usage") == without(answer, "id", "usage")
    assert start["content"] == []
    assert "".join(event["delta"]["text"] for event in deltas) == block["text"]
    assert [entry for event in deltas for entry in event.get("logprobs", ())] == block.get("logprobs", [])
    assert end["usage"]["output_tokens"] == answer["usage"]["output_tokens"]


async def test_system_and_prefill_are_the_prompt(fresh_server: Server) -> None:
    requests = submitted(fresh_server)
    system = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief", "cache_control": {"type": "ephemeral"}}]
    await create(fresh_server, system=system, messages=[USER, {"role": "assistant", "content": "Oh"}])
    assert bytes(requests[-1].prompt_token_ids).decode() == "system:Be\nbrief;user:Hi;assistant:Oh"


async def test_count_tokens_is_the_length_of_the_prompt(server: Server) -> None:
    count = answered(await server.post(COUNT, {"model": MODEL, "messages": [USER], "system": "Be brief"}))
    TokenCount.model_validate_json(json.dumps(count))
    usage = (await create(server, system="Be brief"))["usage"]
    assert count == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    assert error_in(await server.post(COUNT, {}), 400)[1] == "messages"


def test_blocks_of_tools_and_thinking() -> None:
    said = [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "Let me see.", "logprobs": []},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
    ]
    result = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "2"}]},
        {"type": "text", "text": "So?"},
    ]
    body = MessagesPromptFields(messages=[{"role": "assistant", "content": said}, {"role": "user", "content": result}])
    messages, unread = chat_messages(body)
    function = {"name": "f", "arguments": {"x": 1}}
    assert messages == [
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
            "reasoning_content": "Hm.",
        },
        {"role": "tool", "tool_call_id": "t1", "content": "2"},
        {"role": "user", "content": "So?"},
    ]
    assert unread == {}


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ("x", "messages[0]", "invalid_type"),
        ({"role": "system", "content": "a"}, "messages[0].role", "invalid_value"),
        ({"role": "user"}, "messages[0].content", "missing_required_parameter"),
        ({"role": "user", "content": [{"type": "image"}]}, "messages[0].content[0].type", "unsupported_parameter"),
        ({"role": "user", "content": [{"type": "tool_use"}]}, "messages[0].content[0].type", "unsupported_parameter"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", "missing_required_parameter"),
        (
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]},
            "messages[0].content[0].tool_use_id",
            "invalid_value",
        ),
        (
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": "{}"}]},
            "messages[0].content[0].input",
            "invalid_type",
        ),
    ],
)
def test_error_message(message: Any, param: str, code: str) -> None:
    with pytest.raises(PromptError) as error:
        chat_messages(MessagesPromptFields(messages=[message]))
    assert (error.value.param, error.value.code) == (param, code)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_type"),
        ({"messages": [{"role": "user", "content": "refuse"}]}, "messages", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
        ({"stop_sequences": [""]}, "stop_sequences", "invalid_value"),
        ({"stop": ["a"]}, "stop", "unsupported_parameter"),
        ({"top_logprobs": 1}, "top_logprobs", "invalid_value"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens", "invalid_value"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "invalid_value"),
        ({"thinking": {"type": "disabled", "budget_tokens": 9}}, "thinking.budget_tokens", "invalid_value"),
        ({"thinking": {"type": "on"}}, "thinking.type", "invalid_value"),
        ({"container": "c"}, "container", "unsupported_parameter"),
        ({"n": 2}, "n", "unsupported_parameter"),
    ],
)
async def test_error_field(server: Server, fields: dict[str, Any], param: str, code: str) -> None:
    assert error_in(await server.post(PATH, body_of(**fields)), 400) == ("invalid_request_error", param, code)


SCRIPT = b'<think>Hm.</think>So: <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
TOOLS: dict[str, Any] = {
    "tools": [{"name": "f", "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}]
}
PARSERS: dict[str, Any] = {"tool_call_parser": "hermes", "reasoning_parser": "think", "max_model_len": 2048}


@pytest.mark.parametrize("max_tokens", [100, 5, 25, 50])
async def test_thinking_and_calls_are_blocks(max_tokens: int) -> None:
    fields = TOOLS | {"logprobs": True, "max_tokens": max_tokens}
    async with serving(SCRIPT, **PARSERS) as server:
        answer, events = await create(server, **fields), await stream(server, **fields)
    blocks = answer["content"]
    tokens = [entry["token_id"] for block in blocks for entry in block["logprobs"]]
    assert tokens == [*SCRIPT, END][:max_tokens]
    deltas = [event for event in events if event["type"] == "content_block_delta"]
    assert [entry["token_id"] for event in deltas for entry in event["logprobs"]] == tokens
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block["type"] for block in starts] == [block["type"] for block in blocks]
    if max_tokens == 100:
        thinking, text, call = blocks
        assert (thinking["thinking"], text["text"]) == ("Hm.", "So:")
        assert (call["name"], call["input"], answer["stop_reason"]) == ("f", {"x": 1}, "tool_use")
        json_text = "".join(event["delta"]["partial_json"] for event in deltas if event["index"] == 2)
        assert json.loads(json_text) == call["input"]
        stops = [event for event in events if event["type"] == "content_block_stop"]
        assert stops[2]["call_logprobs"] == call["call_logprobs"]
        assert call["call_logprobs"]["arguments"][0]["name"] == "x"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema", "missing_required_parameter"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type", "invalid_value"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name", "invalid_value"),
        (
            {"tools": [{"name": "f", "input_schema": {"type": "array"}}]},
            "tools[0].input_schema",
            "invalid_function_parameters",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "invalid_value"),
        (TOOLS | {"tool_choice": {"type": "tool"}}, "tool_choice.name", "invalid_value"),
        (TOOLS | {"tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name", "invalid_value"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
            "output_config.format.schema",
            "invalid_value",
        ),
    ],
)
async def test_error_field_of_tools_and_formats(server: Server, fields: dict[str, Any], param: str, code: str) -> None:
    assert error_in(await server.post(PATH, body_of(**fields)), 400)[1:] == (param, code)


async def test_output_format_is_response_format_of_chat() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}
    async with serving(b'{"a": "x"}') as server:
        answer = await create(
            server, output_config={"format": {"type": "json_schema", "schema": schema}}, logprobs=True
        )
    [block] = answer["content"]
    assert block["text"] == '{"a": "x"}'
    assert all("allowed_mass" in entry for entry in block["logprobs"])


async def test_thinking_has_a_budget() -> None:
    thinking = {"type": "enabled", "budget_tokens": 9}
    async with serving(b"<think>I think and think.</think>Yes", reasoning_parser="think") as server:
        answer = await create(server, thinking=thinking, logprobs=True)
        message = (await server.chat(thinking_token_budget=9))["choices"][0]["message"]
    thought, text = answer["content"]
    assert thought["thinking"] == message["reasoning_content"] != "I think and think."
    assert text["text"] == message["content"]


async def test_required_tool_is_called() -> None:
    script = b'<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    async with serving(script, **PARSERS) as server:
        for choice in ({"type": "any"}, {"type": "tool", "name": "f"}):
            answer = await create(server, **TOOLS, tool_choice=choice, logprobs=True, max_tokens=100)
            [call] = answer["content"]
            assert (call["name"], call["input"], answer["stop_reason"]) == ("f", {"x": 1}, "tool_use")
            assert all("allowed_mass" in entry for entry in call["logprobs"])


async def test_thinking_is_a_variable_of_the_template() -> None:
    template = "{{ enable_thinking }} {{ reasoning_effort }}"
    async with serving(chat_template=template) as server:
        requests = submitted(server)
        await create(server, thinking={"type": "disabled"}, output_config={"effort": "low"})
    assert bytes(requests[0].prompt_token_ids).decode() == "False low"


async def test_errors_of_the_server_have_the_envelope() -> None:
    async with serving(api_key=("sk-1",)) as server:
        assert error_in(await server.post(PATH, body_of()), 401)[0] == "authentication_error"
        key = {"x-api-key": "sk-1"}
        assert (await server.post(PATH, body_of(), **key)).status_code == 200
        missing = await server.post(PATH, body_of(model="claude"), **key)
        assert error_in(missing, 404) == ("not_found_error", "model", "model_not_found")
        assert error_in(await server.client.get(f"{PATH}/batches", headers=key), 404)[0] == "not_found_error"
        assert error_in(await server.post(PATH, b"{", **key), 400)[0] == "invalid_request_error"


async def test_engine_failure_in_a_stream_is_an_error_event(fresh_server: Server) -> None:
    def change(event: TokenEvent) -> TokenEvent:
        if event.token_ids == [*b"l"]:
            event.finish_reason = FinishReason.ERROR
        return event

    alter_events(fresh_server, change)
    *_, last = await stream(fresh_server)
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    assert error_in(await fresh_server.post(PATH, body_of()), 500)[0] == "api_error"
