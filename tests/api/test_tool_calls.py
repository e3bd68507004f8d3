"""Tools and reasoning in chat completions: prompts, answers, streams, log-probs and errors."""

import json
import re
from typing import Any

import pytest

from tests.support.http_client import Server, answered, chat_body, error_of, serving

ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [ADD, NOW]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>'
PROMPT = [{"role": "user", "content": "Hi"}]
# Shows tools and calls as Hermes does, and marks of reasoning.
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}>{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% elif opened %}<think>{% endif %}{% endif %}"
)


def joined(chunks: list[Any]) -> dict[str, Any]:
    """The message of a streamed choice, put together as OpenAI's client does."""
    message: dict[str, Any] = {"tool_calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    assert len({entry["index"] for entry in value}) == len(value)
                    for entry in value:
                        if entry["index"] == len(message["tool_calls"]):
                            assert {"id", "type"} <= entry.keys()
                            message["tool_calls"].append({})
                        add(message["tool_calls"][entry["index"]], entry)
                else:
                    message[name] = message.get(name, "") + value
    for call in message["tool_calls"]:
        del call["index"]
    return message if message["tool_calls"] else {k: v for k, v in message.items() if k != "tool_calls"}


def add(known: dict[str, Any], entry: dict[str, Any]) -> None:
    for name, value in entry.items():
        if isinstance(value, dict) and name != "logprobs":
            texts = known.setdefault(name, {})
            texts |= {key: texts.get(key, "") + text for key, text in value.items()}
        else:
            assert name == "index" or name not in known
            known[name] = value


async def both(server: Server, **fields: Any) -> tuple[dict[str, Any], list[Any]]:
    """The choice of an answer and the chunks of the same one streamed, which must have the same message."""
    answer = await server.chat(**fields)
    chunks = await server.chat_stream(**fields)
    (choice,) = answer["choices"]
    message = joined(chunks)
    for call, other in zip(message.get("tool_calls", ()), choice["message"].get("tool_calls", ()), strict=True):
        call["id"] = other["id"]
    expected = {name: value for name, value in choice["message"].items() if name != "refusal"}
    if expected["content"] is None:
        expected["content"] = ""
    assert message == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    if choice["logprobs"] is not None:
        streamed = [
            entry for chunk in chunks for c in chunk["choices"] for entry in (c["logprobs"] or {}).get("content", ())
        ]
        assert streamed == choice["logprobs"]["content"]
    return choice, chunks


async def test_call_with_logprobs() -> None:
    async with serving(f"Sure.\n{CALL}".encode(), chat_template=TEMPLATE) as server:
        choice, chunks = await both(server, tools=TOOLS, logprobs=True, top_logprobs=1)
    message = choice["message"]
    (call,) = message["tool_calls"]
    assert (message["content"], choice["finish_reason"]) == ("Sure.", "tool_calls")
    assert (call["type"], call["function"]["name"]) == ("function", "add")
    assert json.loads(call["function"]["arguments"]) == {"a": 1, "b": "é"}
    text = f"Sure.\n{CALL}".encode()
    entries = choice["logprobs"]["content"]
    assert [entry["token_id"] for entry in entries][:-1] == list(text)
    span = call["logprobs"]
    assert text[span["start"] : span["end"]].decode() == CALL[: -len("}\n</tool_call>")]
    values = {item["name"]: text[item["start"] : item["end"]].decode() for item in span["arguments"]}
    assert values == {"a": "1", "b": '"é"'}
    for item in (span, *span["arguments"]):
        total = sum(entry["logprob"] for entry in entries[item["start"] : item["end"]])
        assert item["logprob"] == pytest.approx(total, rel=1e-5)
    starts = [
        entry
        for chunk in chunks
        for c in chunk["choices"]
        for entry in c["delta"].get("tool_calls", ())
        if "id" in entry
    ]
    assert [(entry["index"], entry["function"]) for entry in starts] == [(0, {"name": "add", "arguments": ""})]


async def test_calls_without_logprobs() -> None:
    async with serving(f"{CALL}\n{CALL}".encode(), chat_template=TEMPLATE) as server:
        choice, _ = await both(server, tools=TOOLS)
        assert [call.keys() for call in choice["message"]["tool_calls"]] == [{"id", "type", "function"}] * 2
        assert (choice["message"]["content"], choice["logprobs"]) == (None, None)
        single, _ = await both(server, tools=TOOLS, parallel_tool_calls=False, return_token_ids=True)
        assert len(single["message"]["tool_calls"]) == 1
        assert len(single["token_ids"]) < len(CALL) + 1
        assert single["finish_reason"] == "tool_calls"


async def test_cut_call_keeps_its_finish_reason() -> None:
    async with serving(CALL.encode(), chat_template=TEMPLATE) as server:
        choice, _ = await both(server, tools=TOOLS, max_tokens=50, logprobs=True)
        assert choice["finish_reason"] == "length"
        (call,) = choice["message"]["tool_calls"]
        assert CALL.encode()[:50].decode().endswith(call["function"]["arguments"])
        assert "logprobs" not in call
        choice, _ = await both(server, tools=TOOLS, max_tokens=15)
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL[:15], "length")


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}])
async def test_calls_are_content_without_tools(fields: dict[str, Any]) -> None:
    async with serving(CALL.encode(), chat_template=TEMPLATE) as server:
        choice, _ = await both(server, **fields)
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
        answer = await server.chat(**fields, return_prompt_text=True)
        assert answer["prompt_text"] == "user:Hi;>"
        assert "warnings" not in answer


async def test_tools_in_the_prompt() -> None:
    async with serving(b"No.", chat_template=TEMPLATE) as server:
        answer = await server.chat(tools=TOOLS, return_prompt_text=True)
        tools, _, rest = answer["prompt_text"].removeprefix("<tools>").partition("</tools>")
        assert rest == "user:Hi;>"
        empty = {"type": "object", "properties": {}}
        assert json.loads(tools) == [
            ADD,
            {"type": "function", "function": {"name": "now", "description": "", "parameters": empty}},
        ]
        tokens = answered(await server.post("/tokenize", {"messages": PROMPT, "tools": TOOLS}))["tokens"]
        assert bytes(tokens).decode() == answer["prompt_text"]
        assert "warnings" not in answer
    async with serving(CALL.encode(), max_model_len=2048) as server:
        history = [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "7"},
        ]
        fields = {"tools": TOOLS, "messages": PROMPT + history, "return_prompt_text": True}
        answer = await server.chat(**fields)
        system, _, rest = answer["prompt_text"].partition(";user:")
        assert '{"type": "function", "function": {"name": "add"' in system
        call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
        assert rest == f"Hi;assistant:{call};user:<tool_response>\n7\n</tool_response>;>"
        (warning,) = answer["warnings"]
        assert "shows no tools" in warning
        assert answer["choices"][0]["message"]["tool_calls"]
        assert (await server.chat_stream(**fields))[0]["warnings"] == [warning]


async def test_custom_tool() -> None:
    call = '<tool_call>\n{"name": "sql", "arguments": {"input": "select \\"x\\""}}\n</tool_call>'
    tool = {"type": "custom", "custom": {"name": "sql", "description": "Queries."}}
    async with serving(call.encode(), chat_template=TEMPLATE) as server:
        choice, _ = await both(server, tools=[ADD, tool], logprobs=True)
        (made,) = choice["message"]["tool_calls"]
        assert (made["type"], made["custom"]) == ("custom", {"name": "sql", "input": 'select "x"'})
        assert [item["name"] for item in made["logprobs"]["arguments"]] == ["input"]
        cut, _ = await both(server, tools=[tool], max_tokens=60)
        assert cut["message"]["tool_calls"][0]["custom"]["name"] == "sql"


async def test_reasoning() -> None:
    text = "<think>\nHm.\n</think>\n\nYes."
    async with serving(text.encode(), chat_template=TEMPLATE + "{# </think> #}") as server:
        choice, chunks = await both(server, logprobs=True)
        message = choice["message"]
        assert (message["reasoning_content"], message["reasoning"], message["content"]) == ("Hm.", "Hm.", "Yes.")
        assert (choice["answer_start"], choice["finish_reason"]) == (20, "stop")
        assert [c["answer_start"] for chunk in chunks for c in chunk["choices"] if "answer_start" in c] == [20]
        assert len(choice["logprobs"]["content"]) == len(text) + 1
        usage = (await server.chat())["usage"]
        assert usage["completion_tokens_details"] == {"reasoning_tokens": 20}
        last = (await server.chat_stream(stream_options={"include_usage": True}))[-1]
        assert last["usage"] == usage | {"prompt_tokens_details": last["usage"]["prompt_tokens_details"]}
        hidden, _ = await both(server, include_reasoning=False)
        assert hidden["message"].keys() == {"role", "content", "refusal"}
        for fields in ({"separate_reasoning": False}, {"reasoning_format": "none"}):
            whole, _ = await both(server, **fields)
            assert (whole["message"]["content"], "answer_start" in whole) == (text, False)
        cut, _ = await both(server, max_tokens=9)
        assert (cut["message"]["reasoning"], cut["message"]["content"]) == ("H", "")
        assert "answer_start" not in cut
        assert (await server.chat(max_tokens=9))["usage"]["completion_tokens_details"] == {"reasoning_tokens": 9}


async def test_reasoning_that_the_prompt_opens_or_closes() -> None:
    template = TEMPLATE + "{# </think> #}"
    async with serving(b"Hm.</think>Yes.", chat_template=template) as server:
        choice, _ = await both(server, chat_template_kwargs={"opened": True})
        assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("Hm.", "Yes.")
        ids = list(b"user:Hi;><think>")
        answer = answered(await server.post("/v1/chat/completions", {"prompt_token_ids": ids, "temperature": 0}))
        assert answer["choices"][0]["message"]["reasoning"] == "Hm."
        for fields in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
            choice, _ = await both(server, **fields)
            assert choice["message"]["content"] == "Hm.</think>Yes."
            assert choice["answer_start"] == 0
            answer = await server.chat(**fields, return_prompt_text=True)
            assert answer["prompt_text"].endswith("><think></think>")


async def test_reasoning_before_a_call() -> None:
    async with serving(f"<think>add?</think>{CALL}".encode(), chat_template=TEMPLATE + "{# </think> #}") as server:
        choice, _ = await both(server, tools=TOOLS, logprobs=True)
        assert choice["message"]["reasoning"] == "add?"
        assert choice["finish_reason"] == "tool_calls"


async def test_choices_have_calls_of_their_own() -> None:
    async with serving(CALL.encode(), chat_template=TEMPLATE) as server:
        answer = await server.chat(tools=TOOLS, n=2)
        calls = [choice["message"]["tool_calls"] for choice in answer["choices"]]
        assert calls[0][0]["id"] != calls[1][0]["id"]
        chunks = await server.chat_stream(tools=TOOLS, n=2)
        for index in range(2):
            own = [{"choices": [c for c in chunk["choices"] if c["index"] == index]} for chunk in chunks]
            assert joined(own)["tool_calls"][0]["function"] == calls[0][0]["function"]


def named(name: Any, kind: str = "function") -> dict[str, Any]:
    return {"type": kind, kind: {"name": name}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [ADD] * 2}, "tools[1].function.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}, "tools[0].function.parameters"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [{"type": "custom"}]}, "tools[0].custom"),
        (
            {"tools": [{"type": "custom", "custom": {"name": "f", "format": {"type": "grammar"}}}]},
            "tools[0].custom.format.grammar",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": named("add")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": 1}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": named("other")}, "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": named("add", "custom")}, "tool_choice.custom.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "add"}}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
            "tool_choice",
        ),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("other")]}},
            },
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
        ({"reasoning_format": "x"}, "reasoning_format"),
    ],
)
async def test_error_names_the_field(server: Server, fields: dict[str, Any], param: str) -> None:
    error = error_of(await server.post("/v1/chat/completions", chat_body(**fields)), 400)
    assert error["param"] == param


async def test_nested_tools_are_refused(server: Server) -> None:
    parameters: Any = {}
    for _ in range(70):
        parameters = {"properties": {"a": parameters}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    error = error_of(await server.post("/v1/chat/completions", chat_body(tools=[tool])), 400)
    assert error["param"] == "tools"


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ({"type": "function", "function": {"name": "f"}, "functions": 1}, "tools[].functions"),
        ({"type": "function", "function": {"name": "f", "stricts": True}}, "tools[].function.stricts"),
        ({"type": "custom", "custom": {"name": "f", "formats": {}}}, "tools[].custom.formats"),
    ],
)
async def test_error_misspelt_field_of_a_tool(server: Server, tool: Any, param: str) -> None:
    error = error_of(await server.post("/v1/chat/completions", chat_body(tools=[tool])), 400)
    assert error["param"] == param


@pytest.mark.parametrize("choice", ["auto", "required", named("now")])
async def test_error_other_grammar_beside_tools(choice: Any) -> None:
    body = chat_body(tools=TOOLS, tool_choice=choice, structured_outputs={"choice": ["a", "b"]})
    async with serving(b"a", max_model_len=2048) as server:
        error = error_of(await server.post("/v1/chat/completions", body), 400)
    assert error["param"] == "structured_outputs.choice"


STRICT = {"type": "function", "function": ADD["function"] | {"strict": True}}
SCRIPT_A = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "x"}}\n</tool_call>'
NOW_CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        named("add"),
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("add")]}},
    ],
)
async def test_required_call_is_held_by_a_grammar(choice: Any) -> None:
    async with serving(SCRIPT_A.encode(), max_model_len=2048) as server:
        answer = await server.chat(tools=TOOLS, tool_choice=choice, logprobs=True)
    (made,) = answer["choices"]
    (call,) = made["message"]["tool_calls"]
    assert (call["function"]["name"], made["message"]["content"]) == ("add", None)
    assert json.loads(call["function"]["arguments"]) == {"a": 1, "b": "x"}
    assert made["finish_reason"] == "tool_calls"
    entries = made["logprobs"]["content"]
    assert all("allowed_mass" in entry for entry in entries)
    assert entries[0].get("forced")


async def test_parallel_calls_that_are_required() -> None:
    script = f"{SCRIPT_A}\n{NOW_CALL}".encode()
    async with serving(script, max_model_len=2048) as server:
        choice, _ = await both(server, tools=TOOLS, tool_choice="required")
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["add", "now"]
        choice, _ = await both(server, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["add"]


async def test_arguments_of_strict_tools_are_valid_if_the_model_may_choose() -> None:
    text = '<tool_call>\n{"name": "add", "arguments": {"a": '
    async with serving(f"Well: {text}true".encode(), chat_template=TEMPLATE, max_model_len=2048) as server:
        choice, _ = await both(server, tools=[STRICT, NOW], max_tokens=len(text) + 7)
        (call,) = choice["message"]["tool_calls"]
        assert (choice["message"]["content"], call["function"]["name"]) == ("Well:", "add")
        assert call["function"]["arguments"][:6] == '{"a": '
        assert "t" not in call["function"]["arguments"]
        choice, _ = await both(server, tools=TOOLS, max_tokens=len(text) + 7)
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": t'
    async with serving(b"Just text.", chat_template=TEMPLATE) as server:
        choice, _ = await both(server, tools=[STRICT, NOW])
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Just text.", "stop")


async def test_calls_or_content_of_a_format() -> None:
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"c": {"type": "integer"}}}},
    }
    for script in (NOW_CALL, '{"c": 1}'):
        async with serving(script.encode(), chat_template=TEMPLATE, max_model_len=2048) as server:
            choice, _ = await both(server, tools=TOOLS, response_format=schema)
            assert choice["message"]["content"] == (script if script[0] == "{" else None)
            error = error_of(await server.post("/v1/chat/completions", chat_body(tools=TOOLS, regex="a+")), 400)
            assert error["param"] == "regex"


async def test_response_format_beside_a_required_call_is_checked() -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required"}
    async with serving(NOW_CALL.encode(), chat_template=TEMPLATE, max_model_len=2048) as server:
        choice, _ = await both(server, **fields, response_format={"type": "json_object"})
        assert len(choice["message"]["tool_calls"]) == 1
        bad = {"type": "object", "properties": {"a": {"not": {"type": "null"}}}}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": bad}}
        error = error_of(await server.post("/v1/chat/completions", chat_body(**fields, response_format=form)), 400)
        assert error["param"] == "response_format.json_schema.schema"
        body = chat_body(**fields, structured_outputs={"json_object": True})
        error = error_of(await server.post("/v1/chat/completions", body), 400)
        assert error["param"] == "structured_outputs.json_object"


async def test_grammar_starts_after_the_reasoning() -> None:
    template = TEMPLATE + "{# </think> #}"
    async with serving(f"<think>Hm.</think>{SCRIPT_A}".encode(), chat_template=template, max_model_len=2048) as server:
        choice, _ = await both(server, tools=TOOLS, tool_choice="required", logprobs=True)
        assert (choice["message"]["reasoning"], choice["finish_reason"]) == ("Hm.", "tool_calls")
        masses = [entry["allowed_mass"] for entry in choice["logprobs"]["content"]]
        assert len(masses) == len(choice["logprobs"]["content"])
    async with serving(b'<think>Hm.</think>{"c": 1}', chat_template=template, max_model_len=2048) as server:
        for fields in ({}, {"separate_reasoning": False}):
            choice, _ = await both(server, response_format={"type": "json_object"}, **fields)
            assert choice["message"]["content"].endswith('{"c": 1}')


@pytest.mark.parametrize(
    "name", ["thinking_token_budget", "max_thinking_tokens", "reasoning_budget_tokens", "thinking_budget"]
)
async def test_budget_of_reasoning(name: str) -> None:
    async with serving(b"<think>abcdefghijklmnopqrstuvwxyz", chat_template=TEMPLATE + "{# </think> #}") as server:
        choice, _ = await both(server, **{name: 3}, max_tokens=22)
        assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("abc", "lmno")
        assert choice["answer_start"] == 18
        choice, _ = await both(server, **{name: -1}, max_tokens=22)
        assert choice["message"]["reasoning"] == "abcdefghijklmno"
    async with serving(b"abc") as server:
        error = error_of(await server.post("/v1/chat/completions", chat_body(**{name: 3})), 400)
        assert error["param"] == name


async def test_budget_without_reasoning() -> None:
    template = TEMPLATE.replace("enable_thinking is defined and not enable_thinking", "false") + "{# </think> #}"
    async with serving(b"abcdefghijklm", chat_template=template) as server:
        fields = {"reasoning_effort": "none", "chat_template_kwargs": {"opened": True}}
        choice, _ = await both(server, **fields)
        assert (choice["message"]["content"], choice["answer_start"]) == ("ijklm", 8)


async def test_error_of_a_schema_names_its_tool() -> None:
    bad = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"a": {"not": {"type": "null"}}}}},
    }
    async with serving(b"abc", chat_template=TEMPLATE) as server:
        body = chat_body(tools=[ADD, bad], tool_choice="required")
        error = error_of(await server.post("/v1/chat/completions", body), 400)
        assert error["param"] == "tools[1].function.parameters"
        assert "`/properties/a/not`" in error["message"]
        await server.chat(tools=[ADD, bad])
        body = chat_body(tools=[ADD, bad], tool_choice=named("add"))
        assert (await server.post("/v1/chat/completions", body)).status_code == 200


LARK = 'start: word+\nword: "say " /"[a-z\\n]*"/ ";"'


def custom(definition: str) -> dict[str, Any]:
    form = {"type": "grammar", "grammar": {"syntax": "lark", "definition": definition}}
    return {"type": "custom", "custom": {"name": "sql", "format": form}}


async def test_custom_tool_with_a_lark_grammar() -> None:
    script = b'<tool_call>\n{"name": "sql", "arguments": {"input": "say \\"a\\nb!\\";"}}\n</tool_call>'
    fields = {"tools": [custom(LARK)], "tool_choice": named("sql", "custom"), "max_tokens": 90}
    async with serving(script, chat_template=TEMPLATE, max_model_len=2048) as server:
        choice, _ = await both(server, **fields)
        (call,) = choice["message"]["tool_calls"]
        text = call["custom"]["input"]
        assert text.startswith('say "a\nb')
        assert re.fullmatch(r'(say "[a-z\n]*";)+', text)  # without the "!" of the script


async def test_error_of_a_lark_grammar_has_its_line() -> None:
    refused = "line 3, column 4: `%lark` is not supported in the grammar of a tool."
    messages = {
        'start: "a" b\nb: missing': 'line 2, column 4: unknown name: "missing"',
        "b: /a/": "no start rule found",
        'start: "a"\n}\nr: %lark {\nstart: "b"': refused,
        'start: "a" |\n /(/': "line 2, column ",
    }
    async with serving(b"", chat_template=TEMPLATE, max_model_len=2048) as server:
        for definition, message in messages.items():
            for choice in ("auto", "required"):
                body = chat_body(tools=[custom(definition)], tool_choice=choice, max_tokens=1)
                error = error_of(await server.post("/v1/chat/completions", body), 400)
                assert error["param"] == "tools[0].custom.format.grammar.definition"
                assert f"`: {message}" in error["message"]


async def test_custom_tool_with_a_regex() -> None:
    tool = {
        "type": "custom",
        "custom": {
            "name": "sql",
            "format": {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[a-c]+"}},
        },
    }
    script = b'<tool_call>\n{"name": "sql", "arguments": {"input": "abcd"}}\n</tool_call>'
    async with serving(script, chat_template=TEMPLATE, max_model_len=2048) as server:
        choice, _ = await both(server, tools=[tool], tool_choice=named("sql", "custom"), max_tokens=52)
        (call,) = choice["message"]["tool_calls"]
        assert call["custom"]["name"] == "sql"
        bad = json.loads(json.dumps(tool).replace("[a-c]+", "[a-"))
        error = error_of(await server.post("/v1/chat/completions", chat_body(tools=[bad], tool_choice="required")), 400)
        assert error["param"] == "tools[0].custom.format"
