"""/v1/responses: items, events in their order, log-probs, conversations, errors."""

import asyncio
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from serve.api.errors import APIError
from serve.api.middleware import AnswerRecord
from serve.api.responses_api.input_items import chat_messages, read_input
from serve.api.responses_api.responses import DeletedResponse, InputItems, ResponsesAnswer, ResponsesEvent
from serve.engine.request import FinishReason, TokenEvent
from serve.text.chat import PromptError
from tests.support.events import named_events, types_of, without
from tests.support.http_client import (
    END,
    MODEL,
    Connection,
    Gate,
    Server,
    alter_events,
    answered,
    error_of,
    serving,
    submitted,
)

PATH = "/v1/responses"
LOGPROBS: dict[str, Any] = {"include": ["message.output_text.logprobs"]}
IDS = ("id", "item_id", "created_at", "completed_at")


def body_of(**fields: Any) -> dict[str, Any]:
    return {"input": "Hi", "temperature": 0} | fields


async def create(server: Server, **fields: Any) -> Any:
    answer = answered(await server.post(PATH, body_of(**fields)))
    ResponsesAnswer.model_validate_json(json.dumps(answer))
    return answer


async def stream(server: Server, **fields: Any) -> list[Any]:
    events = named_events(await server.post(PATH, body_of(**fields, stream=True)))
    for event in events:
        ResponsesEvent.model_validate_json(json.dumps(event))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def refused(server: Server, status: int = 400, **fields: Any) -> tuple[str | None, str | None]:
    error = error_of(await server.post(PATH, body_of(**fields)), status)
    return error["param"], error["code"]


async def prompt_of(server: Server, **fields: Any) -> str:
    requests = submitted(server)
    await create(server, **fields)
    return bytes(requests[-1].prompt_token_ids).decode()


async def test_response_has_message_and_usage(server: Server) -> None:
    answer = await create(server, metadata={"a": "b"}, user="me")
    assert answer["id"].startswith("resp_")
    assert (answer["object"], answer["status"], answer["model"]) == ("response", "completed", MODEL)
    assert (answer["metadata"], answer["user"], answer["store"]) == ({"a": "b"}, "me", False)
    [item] = answer["output"]
    assert without(item, "id") == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
    }
    usage = answer["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (9, 6, 15)
    details = usage["input_tokens_details"]
    assert details["cached_tokens"] + details["cache_write_tokens"] == 9


async def test_log_probs_are_those_of_chat(server: Server) -> None:
    chat = await server.chat(logprobs=True, top_logprobs=2)
    answer = await create(server, **LOGPROBS, top_logprobs=2)
    [part] = answer["output"][0]["content"]
    assert part["logprobs"] == chat["choices"][0]["logprobs"]["content"]
    assert len(part["logprobs"]) == answer["usage"]["output_tokens"]
    assert answer["top_logprobs"] == 2


async def test_response_cut_by_its_length_is_incomplete(server: Server) -> None:
    answer = await create(server, max_output_tokens=2)
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete"
    assert answer["output"][0]["content"][0]["text"] == "He"
    events = await stream(server, max_output_tokens=2)
    assert events[-1]["type"] == "response.incomplete"


async def test_stream_has_events_in_order(server: Server) -> None:
    events = await stream(server, **LOGPROBS)
    assert types_of(events) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[0]["response"]["status"] == events[1]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    ids = {event["item_id"] for event in events if "item_id" in event}
    assert ids == {events[-1]["response"]["output"][0]["id"]}


@pytest.mark.parametrize("fields", [LOGPROBS | {"top_logprobs": 2}, LOGPROBS | {"max_output_tokens": 3}, {}])
async def test_stream_adds_up_to_the_response(server: Server, fields: dict[str, Any]) -> None:
    events, answer = await stream(server, **fields), await create(server, **fields)
    final = events[-1]["response"]
    assert without(final, *IDS, "usage") == without(answer, *IDS, "usage")
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    [part] = final["output"][0]["content"]
    assert "".join(event["delta"] for event in deltas) == part["text"]
    assert [entry for event in deltas for entry in event["logprobs"]] == part["logprobs"]
    text_done, part_done, item_done = events[-4:-1]
    assert (text_done["text"], text_done["logprobs"]) == (part["text"], part["logprobs"])
    assert (part_done["part"], item_done["item"]) == (part, final["output"][0])


async def test_stream_without_log_probs_has_no_empty_delta() -> None:
    async with serving("é".encode()) as server:
        events = await stream(server)
        assert [event["delta"] for event in events if "delta" in event] == ["é"]
        deltas = [event for event in await stream(server, **LOGPROBS) if "delta" in event]
        assert [(event["delta"], len(event["logprobs"])) for event in deltas] == [("", 1), ("é", 1), ("", 1)]


async def test_output_without_text_is_an_empty_message() -> None:
    async with serving(b"") as server:
        answer = await create(server, **LOGPROBS)
        [part] = answer["output"][0]["content"]
        assert part["text"] == ""
        assert [entry["token_id"] for entry in part["logprobs"]] == [END]
        assert types_of(await stream(server))[2:4] == ["response.output_item.added", "response.content_part.added"]


async def test_instructions_and_items_are_the_prompt(fresh_server: Server) -> None:
    text = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "one"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "two", "annotations": []}],
        },
        {"role": "developer", "content": text},
    ]
    assert await prompt_of(fresh_server, input=items, instructions="Be brief") == (
        "system:Be brief;user:one;assistant:two;system:a\nb;>"
    )


async def test_fields_reach_the_engine(fresh_server: Server) -> None:
    requests = submitted(fresh_server)
    await create(fresh_server, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, seed=7, max_output_tokens=4)
    params = requests[0].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 3, 0.1)
    assert (params.seed, params.max_tokens) == (7, 4)


async def test_output_of_a_response_is_input_of_the_next(fresh_server: Server) -> None:
    first = await create(fresh_server, **LOGPROBS)
    items = [{"role": "user", "content": "Hi"}, *first["output"], {"role": "user", "content": "More"}]
    assert await prompt_of(fresh_server, input=items) == "user:Hi;assistant:Hello;user:More;>"


def messages_of(items: Sequence[Any]) -> list[dict[str, Any]]:
    return chat_messages(read_input([*items]), stored=0)


def test_reasoning_text_and_calls_share_a_turn() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'}
    result = {"type": "function_call_output", "call_id": "c1", "output": "2"}
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    said = {"role": "assistant", "content": "Let me see."}
    function = {"name": "f", "arguments": '{"x": 1}'}
    turn = {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning_content": "Hm.",
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    answer = {"role": "tool", "tool_call_id": "c1", "content": "2"}
    assert messages_of([thought, said, call, result]) == [turn, answer]
    assert messages_of([call, call | {"call_id": "c2"}])[0]["content"] is None
    assert [message["content"] for message in messages_of([said, said])] == ["Let me see."] * 2
    assert len(messages_of([call, result, call | {"call_id": "c2"}])) == 3


@pytest.mark.parametrize(
    ("item", "param", "code"),
    [
        ("x", "input[0]", "invalid_type"),
        ({}, "input[0].type", "unsupported_parameter"),
        ({"type": "item_reference", "id": "a"}, "input[0].type", "unsupported_parameter"),
        ({"role": "tool", "content": "a"}, "input[0].role", "invalid_value"),
        ({"role": "user"}, "input[0].content", "missing_required_parameter"),
        ({"role": "user", "content": 1}, "input[0].content", "invalid_type"),
        (
            {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]},
            "input[0].content[0].type",
            "unsupported_parameter",
        ),
        (
            {"role": "user", "content": [{"type": "input_text"}]},
            "input[0].content[0].text",
            "missing_required_parameter",
        ),
        ({"role": "user", "content": "a", "id": 1}, "input[0].id", "invalid_type"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "input[0].call_id", "missing_required_parameter"),
        ({"type": "function_call_output", "call_id": "c", "output": "x"}, "input[0].call_id", "invalid_value"),
        ({"type": "reasoning", "encrypted_content": "x"}, "input[0].encrypted_content", "unsupported_parameter"),
    ],
)
def test_error_item(item: Any, param: str, code: str) -> None:
    with pytest.raises(PromptError) as error:
        messages_of([item])
    assert (error.value.param, error.value.code) == (param, code)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"input": None}, ("input", "missing_required_parameter")),
        ({"input": []}, ("input", "empty_array")),
        ({"input": 3}, ("input", "invalid_type")),
        ({"input": [{"role": "user", "content": [[]]}]}, ("input[0].content[0].type", "unsupported_parameter")),
        ({"input": "x" * 100_000}, ("input", "context_length_exceeded")),
        ({"input": [{"role": "user", "content": "refuse"}]}, ("input", "invalid_value")),
        ({"max_output_tokens": 0}, ("max_output_tokens", "integer_below_min_value")),
        ({"max_output_tokens": 100_000}, ("max_output_tokens", "context_length_exceeded")),
        ({"top_logprobs": 1}, ("top_logprobs", "invalid_value")),
        (LOGPROBS | {"top_logprobs": 9}, ("top_logprobs", "integer_above_max_value")),
        ({"include": ["reasoning.encrypted_content"]}, ("include[0]", "invalid_value")),
        ({"metadata": {"k": 1}}, ("metadata", "invalid_value")),
        ({"metadata": {"k" * 65: "v"}}, ("metadata", "invalid_value")),
        ({"metadata": {str(i): "v" for i in range(17)}}, ("metadata", "object_above_max_properties")),
        ({"truncation": "auto"}, ("truncation", "invalid_value")),
        ({"reasoning": {"summary": "auto"}}, ("reasoning.summary", "invalid_value")),
        ({"background": True}, ("background", "unsupported_parameter")),
        ({"conversation": "c"}, ("conversation", "unsupported_parameter")),
        ({"max_tokens": 3}, ("max_tokens", "unsupported_parameter")),
        ({"messages": []}, ("messages", "unsupported_parameter")),
        ({"n": 2}, ("n", "unsupported_parameter")),
        ({"max_output_token": 3}, ("max_output_token", "unsupported_parameter")),
        ({"store": True}, ("store", "unsupported_parameter")),
        ({"previous_response_id": "resp_1"}, ("previous_response_id", "unsupported_parameter")),
        ({"input": json.loads("[" * 70 + "]" * 70)}, ("input", "invalid_value")),
    ],
)
async def test_error_field(server: Server, fields: dict[str, Any], expected: tuple[str, str]) -> None:
    assert await refused(server, **fields) == expected


async def test_error_names_the_flag_of_the_store(server: Server) -> None:
    for fields in ({"store": True}, {"previous_response_id": "resp_1"}):
        error = error_of(await server.post(PATH, body_of(**fields)), 400)
        assert "--response-store" in error["message"]
    assert (await create(server, store=False))["store"] is False
    for path in (f"{PATH}/resp_1", f"{PATH}/resp_1/input_items"):
        error = error_of(await server.client.get(path), 404)
        assert "--response-store" in error["message"]


async def test_unknown_fields_of_items_are_ignored(fresh_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    part = {"type": "input_text", "text": "Hi", "mint": 1}
    assert await prompt_of(fresh_server, input=[{"role": "user", "content": [part], "flavour": 2}]) == "user:Hi;>"
    logged = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert logged == [
        "unknown request field 'input[].flavour' is ignored",
        "unknown request field 'input[].content[].mint' is ignored",
    ]


async def test_engine_failure_in_a_stream_is_an_error_event(fresh_server: Server) -> None:
    def change(event: TokenEvent) -> TokenEvent:
        if event.token_ids == [*b"l"]:
            event.finish_reason = FinishReason.ERROR
        return event

    alter_events(fresh_server, change)
    events = named_events(await fresh_server.post(PATH, body_of(stream=True)))
    last = events[-1]
    assert (last["type"], last["code"], last["param"]) == ("error", "engine_error", None)
    assert last["sequence_number"] == len(events) - 1
    assert error_of(await fresh_server.post(PATH, body_of()), 500)["code"] == "engine_error"


def test_error_events_of_each_api() -> None:
    error = APIError(503, "m", "p", "c")
    assert error.event("/v1/responses", 7) == (
        b'event: error\ndata: {"type":"error","sequence_number":7,"code":"c","message":"m","param":"p"}\n\n'
    )
    detail = b'{"type":"overloaded_error","message":"m","details":{"error_code":"c","param":"p"}}'
    assert error.event("/v1/messages", 7) == b'event: error\ndata: {"type":"error","error":' + detail + b"}\n\n"
    for path in ("/v1/chat/completions", "/v1/messages2", "/v1/responses2", ""):
        assert error.event(path, 7).endswith(b'"code":"c"}}\n\ndata: [DONE]\n\n')


@pytest.mark.parametrize("stream", [False, True])
async def test_records_of_responses_have_tokens_and_route(stream: bool) -> None:
    records: list[AnswerRecord] = []
    async with serving(on_answer=records.append) as server:
        await server.post(PATH, body_of(stream=stream))
        assert b'handler="/v1/responses"' in (await server.client.get("/metrics")).content
    [record, _] = records
    assert (record.handler, record.status, record.error) == (PATH, 200, None)
    assert record.work is not None
    assert (record.work.prompt_tokens, record.work.completion_tokens) == (9, 6)


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_aborts_the_request_and_stores_nothing(stream: bool, tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    async with serving(response_store=file) as server:
        gate = server.runner.before_call = Gate("decode", after=3)
        connection = Connection(PATH, body_of(stream=stream, store=True, max_output_tokens=400, ignore_eos=True))
        run = asyncio.create_task(connection.run(server.app))
        await gate.reached()
        if stream:
            await connection.data()
        connection.leave()
        await run
        gate.open()
        await server.assert_idle()
        assert [name for name, _ in server.runner.calls].count("decode") == 4
    with closing(sqlite3.connect(file)) as connection_to_file:
        assert connection_to_file.execute("SELECT count(*) FROM responses").fetchone() == (0,)


SCRIPT = b'<think>Hm.</think>Let me see. <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
CALLS: dict[str, Any] = {"tools": [TOOL]}
PARSERS: dict[str, Any] = {"tool_call_parser": "hermes", "reasoning_parser": "think", "max_model_len": 2048}


@pytest.mark.parametrize("max_tokens", [None, 5, 30, 45, 72])
async def test_every_token_is_in_one_item(max_tokens: int | None) -> None:
    async with serving(SCRIPT, **PARSERS) as server:
        fields = LOGPROBS | CALLS | {"max_output_tokens": max_tokens}
        events, answer = await stream(server, **fields), await create(server, **fields)
    final = events[-1]["response"]
    assert without(final, *IDS, "call_id", "usage") == without(answer, *IDS, "call_id", "usage")
    items = answer["output"]
    lists = [item["content"][0]["logprobs"] if item["type"] == "message" else item["logprobs"] for item in items]
    tokens = [entry["token_id"] for entries in lists for entry in entries]
    assert tokens == [*SCRIPT, END][:max_tokens]
    streamed = [entry for event in events if event["type"].endswith(".delta") for entry in event["logprobs"]]
    assert [entry["token_id"] for entry in streamed] == tokens
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == final["output"]
    if max_tokens == 72:
        assert [item["status"] for item in items] == ["completed", "completed", "incomplete"]


async def test_reasoning_and_calls_are_items() -> None:
    async with serving(SCRIPT, **PARSERS) as server:
        answer, events = await create(server, **CALLS), await stream(server, **CALLS)
    reasoning, message, call = answer["output"]
    assert (reasoning["type"], reasoning["content"]) == ("reasoning", [{"type": "reasoning_text", "text": "Hm."}])
    assert message["content"][0]["text"] == "Let me see."
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "f", '{"x": 1}')
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] == len("<think>Hm.</think>")
    assert without(answer["tools"], "description", "strict") == [TOOL]
    assert "warnings" in answer  # the template shows no tools
    assert types_of(events)[2:] == [
        "response.output_item.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]


async def test_call_has_log_probs_of_its_arguments() -> None:
    async with serving(SCRIPT, **PARSERS) as server:
        *_, call = (await create(server, **CALLS, **LOGPROBS))["output"]
        chat_tools = [{"type": "function", "function": {name: TOOL[name] for name in ("name", "parameters")}}]
        message = (await server.chat(tools=chat_tools, logprobs=True))["choices"][0]["message"]
    assert call["call_logprobs"] == message["tool_calls"][0]["logprobs"]
    [argument] = call["call_logprobs"]["arguments"]
    start = SCRIPT.index(b"1}")
    assert (argument["name"], argument["start"], argument["end"]) == ("x", start, start + 1)
    assert argument["logprob"] == pytest.approx(-(start + 1) / 10, abs=1e-6)


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "f"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
    ],
)
async def test_required_function_is_called(choice: Any) -> None:
    script = b'<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    async with serving(script, **PARSERS) as server:
        answer = await create(server, **CALLS, **LOGPROBS, tool_choice=choice)
        [call] = answer["output"]
        assert (call["name"], call["arguments"], answer["tool_choice"]) == ("f", '{"x": 1}', choice)
        assert all("allowed_mass" in entry for entry in call["logprobs"])


async def test_output_with_a_call_is_input_of_the_next() -> None:
    async with serving(SCRIPT, **PARSERS) as server:
        first = await create(server, **CALLS, **LOGPROBS)
        call_id = first["output"][-1]["call_id"]
        result = {"type": "function_call_output", "call_id": call_id, "output": "2"}
        items = [{"role": "user", "content": "Hi"}, *first["output"], result]
        prompt = await prompt_of(server, input=items, **CALLS)
        assert '{"name": "f", "arguments": {"x": 1}}' in prompt
        assert "Let me see." in prompt
        assert prompt.index("Let me see.") < prompt.rindex("2")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": [{"type": "web_search"}]}, ("tools[0].type", "invalid_value")),
        ({"tools": [{"type": "function"}]}, ("tools[0].name", "missing_required_parameter")),
        ({"tools": [TOOL | {"name": "a b"}]}, ("tools[0].name", "invalid_value")),
        ({"tools": [TOOL, TOOL]}, ("tools[1].name", "invalid_value")),
        ({"tools": [TOOL | {"parameters": {"type": "array"}}]}, ("tools[0].parameters", "invalid_function_parameters")),
        ({"tool_choice": "required"}, ("tool_choice", "invalid_value")),
        (CALLS | {"tool_choice": {"type": "function", "name": "g"}}, ("tool_choice.name", "invalid_value")),
        (CALLS | {"tool_choice": {"type": "file_search"}}, ("tool_choice", "invalid_value")),
        (
            CALLS
            | {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}},
            ("tool_choice.tools[0].name", "invalid_value"),
        ),
        ({"text": {"format": {"type": "xml"}}}, ("text.format.type", "invalid_value")),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}},
            ("text.format.schema", "invalid_value"),
        ),
        ({"text": {"verbosity": "low"}}, ("text.verbosity", "invalid_value")),
        ({"response_format": {"type": "json_object"}}, ("response_format", "unsupported_parameter")),
    ],
)
async def test_error_field_of_tools_and_formats(server: Server, fields: Any, expected: tuple[str, str]) -> None:
    assert await refused(server, **fields) == expected


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}


async def test_text_format_is_response_format_of_chat() -> None:
    async with serving(b'{"a": "x"}') as server:
        form = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
        answer = await create(server, text={"format": form}, **LOGPROBS)
        chat_form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
        [choice] = (await server.chat(response_format=chat_form, logprobs=True))["choices"]
    [part] = answer["output"][0]["content"]
    assert part["text"] == choice["message"]["content"] == '{"a": "x"}'
    assert part["logprobs"] == choice["logprobs"]["content"]
    assert all("allowed_mass" in entry for entry in part["logprobs"])
    assert answer["text"]["format"] == form


async def test_conversation_of_stored_responses(tmp_path: Path) -> None:
    async with serving(response_store=tmp_path / "store.db") as server:
        first = await create(server, **LOGPROBS, instructions="Be brief", store=True)
        assert first["store"] is True
        stored = await server.client.get(f"{PATH}/{first['id']}")
        assert answered(stored) == first
        assert await prompt_of(server, input="More", previous_response_id=first["id"]) == (
            "user:Hi;assistant:Hello;user:More;>"
        )
        fields = {"input": "More", "previous_response_id": first["id"], "store": True}
        second = (await stream(server, **fields))[-1]["response"]
        assert second["previous_response_id"] == first["id"]
        assert answered(await server.client.get(f"{PATH}/{second['id']}")) == second
        answer = answered(await server.client.delete(f"{PATH}/{first['id']}"))
        DeletedResponse.model_validate_json(json.dumps(answer))
        assert answer["id"] == first["id"]
        for request in (server.client.get, server.client.delete):
            error = error_of(await request(f"{PATH}/{first['id']}"), 404)
            assert (error["param"], error["code"]) == ("id", "response_not_found")
        gone = {"previous_response_id": first["id"]}
        assert await refused(server, **gone) == ("previous_response_id", "previous_response_not_found")
        assert await prompt_of(server, input="!", previous_response_id=second["id"]) == (
            "user:Hi;assistant:Hello;user:More;assistant:Hello;user:!;>"
        )
        for not_stored in ({"store": False}, {"store": None}, {}):
            hidden = await create(server, **not_stored)
            assert hidden["store"] is False
            error_of(await server.client.get(f"{PATH}/{hidden['id']}"), 404)


async def test_error_response_that_cannot_be_stored(tmp_path: Path) -> None:
    async with serving(response_store=tmp_path / "store.db", response_store_bytes=1000) as server:
        assert (await refused(server, store=True)) == ("store", "answer_too_large")
        *events, done, error = await stream(server, store=True)
        assert "".join(event["delta"] for event in events if "delta" in event) == "Hello"
        assert (done["type"], done["item"]["content"][0]["text"]) == ("response.output_item.done", "Hello")
        assert (error["type"], error["param"], error["code"]) == ("error", "store", "answer_too_large")
        assert (await create(server))["status"] == "completed"


async def test_input_items_are_pages(tmp_path: Path) -> None:
    async with serving(response_store=tmp_path / "store.db") as server:
        first = await create(server, store=True)
        second = await create(server, input="More", previous_response_id=first["id"], store=True)
        path = f"{PATH}/{second['id']}/input_items"

        async def page(**query: Any) -> Any:
            answer = answered(await server.client.get(path, params=query))
            InputItems.model_validate_json(json.dumps(answer))
            return answer

        every = await page(order="asc")
        texts = [item["content"][0]["text"] for item in every["data"]]
        assert texts == ["Hi", "Hello", "More"]
        assert [item["content"][0]["type"] for item in every["data"]] == ["input_text", "output_text", "input_text"]
        assert (await page())["data"] == every["data"][::-1]
        start = await page(limit=2, order="asc")
        assert (start["has_more"], start["last_id"]) == (True, every["data"][1]["id"])
        rest = await page(limit=2, order="asc", after=start["last_id"])
        assert (rest["has_more"], rest["data"]) == (False, every["data"][2:])
        for query, param in (({"limit": 0}, "limit"), ({"order": "up"}, "order"), ({"after": "x"}, "after")):
            assert error_of(await server.client.get(path, params=query), 400)["param"] == param


async def test_stored_response_is_visible_to_its_key_alone(tmp_path: Path) -> None:
    options: dict[str, Any] = {"response_store": tmp_path / "store.db"}
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("sk-1", "sk-2"))
    async with serving(api_key=("sk-1", "sk-2"), **options) as server:
        answer = answered(await server.post(PATH, body_of(store=True), **one))
        path = f"{PATH}/{answer['id']}"
        assert answered(await server.client.get(path, headers=one)) == answer
        for request in (server.client.get, server.client.delete):
            error_of(await request(path, headers=two), 404)
            error_of(await request(path), 401)
        error_of(await server.client.get(f"{path}/input_items", headers=two), 404)
        error_of(await server.post(PATH, body_of(previous_response_id=answer["id"]), **two), 400)
    async with serving(api_key=("sk-2", "sk-1"), **options) as server:  # key1 is another key now
        error_of(await server.client.get(path, headers=two), 404)
        assert answered(await server.client.get(path, headers=one)) == answer
    async with serving(**options) as server:
        error_of(await server.client.get(path), 404)


async def test_stream_of_a_stored_response_is_refused(tmp_path: Path) -> None:
    async with serving(response_store=tmp_path / "store.db") as server:
        answer = await create(server, store=True)
        error = error_of(await server.client.get(f"{PATH}/{answer['id']}?stream=true"), 400)
        assert error["param"] == "stream"
