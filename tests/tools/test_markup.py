"""How chat templates are read, and what messages get that they would leave out."""

from typing import Any

import pytest

from serve.text.chat import check_messages
from serve.text.chat_template import render_chat
from serve.tools.definitions import ToolField, ToolRequest, tool_request
from serve.tools.markup import ChatMarkup, markup_of

PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
CALLS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function | tojson }}</tool_call>{% endfor %};{% endfor %}"
)
USER = {"role": "user", "content": "Hi"}
HISTORY: list[dict[str, Any]] = [
    USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
            {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "7"},
    {"role": "tool", "tool_call_id": "call_2", "content": "8"},
]


def request(choice: Any = None) -> ToolRequest:
    fields = [ToolField.model_validate({"type": "function", "function": {"name": "f"}})]
    tools = tool_request(fields, choice, parallel=True)
    assert tools is not None
    return tools


def rendered(
    markup: ChatMarkup, template: str, messages: list[dict[str, Any]], tools: ToolRequest | None = None
) -> str:
    chat = markup.messages(check_messages(messages), tools)
    options: dict[str, Any] = {"special_tokens": {}, "add_generation_prompt": False}
    return render_chat(template, chat, template_kwargs=markup.variables(tools), **options)


def test_template_with_tools_and_calls() -> None:
    template = TOOLS + CALLS
    markup = markup_of(template, {})
    assert (markup.calls.name, markup.tools_variable, markup.shows_calls) == ("hermes", "tools", True)
    assert markup.warnings(request()) == []
    text = rendered(markup, template, [USER], request())
    assert text.startswith('[{"type": "function", "function": {"name": "f"')
    assert rendered(markup, template, [USER], request("none")) == "user:Hi;"
    assert '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>' in rendered(markup, template, HISTORY)


def test_template_with_xml_tools() -> None:
    template = TOOLS.replace("tools", "xml_tools") + CALLS
    markup = markup_of(template, {})
    assert markup.tools_variable == "xml_tools"
    assert '"name": "f"' in rendered(markup, template, [USER], request())


def test_template_without_tools() -> None:
    markup = markup_of(PLAIN, {})
    assert (markup.calls.name, markup.tools_variable, markup.shows_calls) == ("hermes", None, False)
    assert len(markup.warnings(request())) == 1
    assert markup.warnings(request("none")) == []
    system = rendered(markup, PLAIN, [{"role": "system", "content": "Be brief."}, USER], request())
    assert system.startswith("system:Be brief.\n\nYou can call functions.")
    assert '\n{"type": "function", "function": {"name": "f"' in system
    assert rendered(markup, PLAIN, [USER]) == "user:Hi;"
    assert rendered(markup, PLAIN, [USER], request()).startswith("system:You can call functions.")
    assert rendered(markup, PLAIN, HISTORY).endswith(";tool:7;tool:8;")
    instructed = rendered(markup, PLAIN, HISTORY, request())
    assert instructed.endswith(";user:<tool_response>\n7\n</tool_response>\n<tool_response>\n8\n</tool_response>;")
    calls = (
        '<tool_call>\n{"name": "f", "arguments": {"a":1}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}'
    )
    expected = f"user:Hi;assistant:{calls}\n</tool_call>;"
    assert rendered(markup, PLAIN, HISTORY).startswith(expected)


def test_results_that_a_template_does_not_show() -> None:
    template = "{% for m in messages %}{% if m.role != 'tool' %}{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}"
    text = rendered(markup_of(template, {}), template, HISTORY)
    result = "<tool_response>\n{}\n</tool_response>"
    assert text.endswith(f"user:{result.format(7)}\n{result.format(8)};")


def test_tools_are_in_the_first_message_of_the_user_without_system_messages() -> None:
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN[23:]
    text = rendered(markup_of(template, {}), template, [USER], request())
    assert text.startswith("user:You can call functions.")
    assert text.endswith("\n\nHi;")


def test_calls_of_a_template_in_its_own_format() -> None:
    template = "{# <|tool_call|> #}" + TOOLS + PLAIN
    text = rendered(markup_of(template, {}), template, HISTORY)
    calls = '<|tool_call|>[{"name": "f", "arguments": {"a":1}}, {"name": "g", "arguments": {}}]'
    assert text == f"user:Hi;assistant:{calls};tool:7;tool:8;"


def test_ids_are_short_for_mistral() -> None:
    template = "{# [TOOL_CALLS] #}" + TOOLS + CALLS + "{% for m in messages %}{{ m.tool_call_id }},{% endfor %}"
    markup = markup_of(template, {})
    chat = markup.messages(check_messages(HISTORY), None)
    ids = [call["id"] for call in chat[1]["tool_calls"]]
    assert [message["tool_call_id"] for message in chat[2:]] == ids
    assert all(len(value) == 9 and value.isalnum() for value in ids)
    assert markup.messages(chat, None) == chat


def test_unknown_format_shows_its_histories_itself() -> None:
    template = "{# <tool_call> <arg_key> #}" + TOOLS + CALLS
    markup = markup_of(template, {})
    assert (markup.tools_variable, markup.shows_calls) == (None, True)
    assert "You can call functions." in rendered(markup, template, [USER], request())
    assert rendered(markup, template, HISTORY).count("<tool_call>{") == 2


def test_template_that_is_not_trusted_is_not_rendered() -> None:
    template = "{# <tool_call> tool_calls tools #}{{ 1 / 0 }}"
    markup = markup_of(template, {}, is_trusted=False)
    assert (markup.tools_variable, markup.shows_calls) == ("tools", True)


def test_flags_come_before_the_template() -> None:
    markup = markup_of(TOOLS + CALLS, {}, call_parser="llama3", reasoning_parser="think")
    assert (markup.calls.name, markup.reasoning is not None) == ("llama3", True)
    assert markup_of("</think>", {}, reasoning_parser="none").reasoning is None
    assert markup_of(None, {}).tools_variable is None


@pytest.mark.parametrize("content", ["m.content is none", "m['content'] is not none"])
def test_content_of_calls_is_none_only_if_the_template_shows_them_so(content: str) -> None:
    template = (
        "{% for m in messages %}{% if " + content + " and false %}{% endif %}"
        "{% if m.tool_calls %}{{ '<think>' in m.content }}{{ m.tool_calls[0].function.arguments | tojson }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    text = render_chat(template, check_messages(HISTORY), special_tokens={}, add_generation_prompt=False)
    assert text == 'HiFalse{"a": 1}78'


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_of_a_history_has_both_names(name: str) -> None:
    template = "{% for m in messages %}{{ m.reasoning }},{{ m.reasoning_content }};{% endfor %}"
    messages = check_messages([{"role": "assistant", "content": "x", name: "Hm."}])
    assert render_chat(template, messages, special_tokens={}, add_generation_prompt=False) == "Hm.,Hm.;"
