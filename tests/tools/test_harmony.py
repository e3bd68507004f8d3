"""OpenAI's harmony format: channels, headers, grammars behind them, and histories."""

import json
from dataclasses import replace
from typing import Any

import pytest

from serve.grammar.fields import GrammarRequest
from serve.grammar.spec import GrammarKind, GrammarSpec
from serve.text.chat import check_messages
from serve.text.chat_template import render_chat
from serve.text.output_parts import CallStart, TextPart
from serve.tools.formats import FORMATS, REASONING, format_of, reasoning_of
from serve.tools.harmony import ANSWER, TURN
from serve.tools.markup import ChatMarkup, markup_of
from serve.tools.reply import ReplyFormat, reply_format
from serve.tools.thinking import ThinkingGrammar
from tests.api.test_tool_calls import ADD
from tests.api.test_tool_calls import both as answered_twice
from tests.support.http_client import END, VOCAB_SIZE, byte_tokenizer, serving
from tests.tools.test_call_formats import both
from tests.tools.test_markup import HISTORY, USER, request
from tests.tools.test_thinking import FixedText, advance, allowed

HARMONY, MARKS = next(item for item in FORMATS if item.name == "harmony"), REASONING["harmony"]
ANALYSIS = "<|channel|>analysis<|message|>Hm.<|end|>"
CALL = f'{TURN} to=functions.add<|channel|>commentary json<|message|>{{"a": 1}}<|call|>'
# The parts of the model's template that matter: headers, `thinking`, the first call of a message and its result.
TEMPLATE = """\
{%- if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif -%}
{%- set called = namespace(name="") -%}
{%- for m in messages -%}
{%- if m.role == "assistant" and m.tool_calls -%}
{%- if m.content and m.thinking %}{{ raise_exception("both") }}{% endif -%}
{%- if m.thinking or m.content -%}
<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking or m.content }}<|end|>
{%- endif -%}
{%- set called.name = m.tool_calls[0].function.name -%}
<|start|>assistant to=functions.{{ called.name }}<|channel|>commentary json<|message|>
{{- m.tool_calls[0].function.arguments | tojson }}<|call|>
{%- elif m.role == "tool" -%}
<|start|>functions.{{ called.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>
{%- else -%}
<|start|>{{ m.role }}{{ "<|channel|>final" if m.role == "assistant" }}<|message|>{{ m.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant{% endif -%}"""


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        (f"{ANALYSIS}{ANSWER}Yes.", "Hm.", "Yes."),
        (f"{ANALYSIS}{ANSWER}Yes.<|return|>", "Hm.", "Yes."),
        ("<|channel|>final<|message|>Yes.", "", "Yes."),
        ("Yes.", "", "Yes."),
        ("<|channel|>analysis<|message|>Hm.", "Hm.", ""),
        (f"{ANALYSIS}{TURN}{ANALYSIS}{ANSWER}Yes.", "Hm.\n\nHm.", "Yes."),
        (f"{ANALYSIS}{TURN}<|channel|>commentary<|message|>So.<|end|>{ANSWER}Yes.", "Hm.", "So.\n\nYes."),
        (f"{ANALYSIS}{TURN}<|chan", "Hm.", f"{TURN}<|chan"),
        (f"{ANALYSIS}<|start|>user<|message|>Yes.", "Hm.", "<|start|>user<|message|>Yes."),
    ],
)
def test_channels(text: str, reasoning: str, content: str) -> None:
    result = both(HARMONY, text, reasoning=MARKS)
    assert (result.reasoning, result.content, result.calls) == (reasoning, content, [])


@pytest.mark.parametrize(
    "text",
    [
        f"{ANALYSIS}{CALL}",
        ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}',
        f'{ANALYSIS}{TURN}<|channel|>commentary to=functions.add<|constrain|>json<|message|>{{"a": 1}}',
        f'{ANALYSIS}{TURN}<|channel|>analysis to=functions.add code<|message|>{{"a": 1}}<|call|>',
    ],
)
def test_recipients(text: str) -> None:
    result = both(HARMONY, text, reasoning=MARKS)
    (call,) = result.calls
    assert (call.name, json.loads(call.arguments), call.spans) == ("add", {"a": 1}, {"a": "1"})
    assert (result.reasoning, result.content) == ("Hm." if ANALYSIS in text else "", "")


def test_preamble_before_a_call() -> None:
    text = f"{ANALYSIS}{TURN}<|channel|>commentary<|message|>Let me see.<|end|>{CALL}"
    result = both(HARMONY, text, reasoning=MARKS)
    assert (result.reasoning, result.content, len(result.calls)) == ("Hm.", "Let me see.", 1)


def parts_of(reply: ReplyFormat, text: str) -> tuple[list[Any], int | None]:
    splitter = reply.splitter(byte_tokenizer(), skip_special_tokens=True)
    return splitter.push(list(text.encode()), text, is_complete=True), splitter.answer_start


def test_output_without_tools() -> None:
    """Headers are no content, the answer starts after its own, and a call is text."""
    markup = markup_of(TEMPLATE, {})
    reply = reply_format(markup, None, TURN, separates_reasoning=True, budget=None)
    text = f"{ANALYSIS}{ANSWER}"
    parts, start = parts_of(reply, f"{text}Yes.")
    assert [(part.kind, part.text) for part in parts if isinstance(part, TextPart)] == [
        ("reasoning", "Hm."),
        ("content", "Yes."),
    ]
    assert start == len(text)
    parts, _ = parts_of(reply, f"{ANALYSIS}{CALL}")
    assert not [part for part in parts if isinstance(part, CallStart)]
    assert "".join(part.text for part in parts if isinstance(part, TextPart)) == 'Hm.{"a": 1}'


def test_reasoning_that_is_not_separated() -> None:
    markup = markup_of(TEMPLATE, {})
    reply = reply_format(markup, request(), TURN, separates_reasoning=False, budget=None)
    parts, start = parts_of(reply, f"{ANALYSIS}{ANSWER}Yes.")
    texts = [(part.kind, part.text) for part in parts if isinstance(part, TextPart)]
    assert {kind for kind, _ in texts} == {"content"}
    assert (texts[0][1], texts[-1][1], start) == ("Hm.", "Yes.", 0)
    assert reply_format(markup, None, TURN, separates_reasoning=False, budget=None).calls is None


def grammar(*, budget: int | None = None, has_header: bool = False, answer: bool = True) -> ThinkingGrammar:
    text = FixedText() if answer else None
    arguments: dict[str, Any] = {"is_open": False, "budget": budget, "vocab_size": VOCAB_SIZE}
    return ThinkingGrammar(byte_tokenizer(), MARKS, text, has_header=has_header, **arguments)


@pytest.mark.parametrize("budget", [None, 0, 3])
def test_answer_in_a_grammar_follows_analysis_and_header(budget: int | None) -> None:
    matcher = grammar(budget=budget).matcher()
    for token in MARKS.start.encode():
        assert allowed(matcher) == {token}
        matcher.advance(token)
    advance(matcher, b"abcde"[:budget])
    for token in MARKS.end.encode():
        assert token in allowed(matcher)
        matcher.advance(token)
    for token in ANSWER.encode():
        assert allowed(matcher) == {token}
        assert not matcher.is_finished
        matcher.advance(token)
    advance(matcher, [*b"<t>{}"])
    assert matcher.is_finished
    assert allowed(matcher) == {END}


def test_grammar_of_calls_has_its_own_headers() -> None:
    matcher = grammar(has_header=True, budget=0).matcher()
    advance(matcher, f"{MARKS.start}{MARKS.end}<t>{{}}".encode())
    assert matcher.is_finished


def test_prompt_inside_of_an_answer_is_not_followed_by_analysis() -> None:
    markup = markup_of(TEMPLATE, {})
    for prompt, thinks in ((TURN, True), (f"{ANSWER}So", False), ("<|end|>", False)):
        reply = reply_format(markup, None, prompt, separates_reasoning=True, budget=None)
        assert (reply.thinking is not None) == thinks


def test_schema_of_content_beside_tools_has_a_header() -> None:
    tools = request()
    stated = GrammarRequest(GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type": "integer"}'), "response_format")
    reply = ReplyFormat(tools, HARMONY, MARKS)
    held = reply.grammar(stated)
    assert held is not None
    content, calls = json.loads(held.spec.text)["format"]["elements"]
    assert content["elements"][0] == {"type": "const_string", "value": ANSWER}
    assert calls["tags"][0]["begin"] == HARMONY.written.before.replace("NAME", "f") if HARMONY.written else None
    assert replace(reply, tools=request("none")).grammar(stated) is stated


def rendered(markup: ChatMarkup, messages: list[dict[str, Any]]) -> str:
    chat = markup.messages(check_messages(messages), request())
    return render_chat(TEMPLATE, chat, special_tokens={}, add_generation_prompt=False)


def test_format_and_reasoning_of_a_template() -> None:
    markup = markup_of(TEMPLATE, {})
    assert (markup.calls, markup.reasoning, markup.tools_variable) == (HARMONY, MARKS, "tools")
    assert (markup.shows_calls, markup.shows_results) == (True, True)
    assert format_of("<|end|>") is None
    assert reasoning_of("<|end|>") is None  # of Phi


def test_each_call_of_a_message_is_followed_by_its_result() -> None:
    text = rendered(markup_of(TEMPLATE, {}), [*HISTORY, USER])
    assert text == (
        "<|start|>user<|message|>Hi<|end|>"
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>'
        '<|start|>functions.f to=assistant<|channel|>commentary<|message|>"7"<|end|>'
        "<|start|>assistant to=functions.g<|channel|>commentary json<|message|>{}<|call|>"
        '<|start|>functions.g to=assistant<|channel|>commentary<|message|>"8"<|end|>'
        "<|start|>user<|message|>Hi<|end|>"
    )


@pytest.mark.parametrize(("content", "analysis"), [(None, "Hm."), ("So.", "Hm.\n\nSo.")])
def test_reasoning_and_content_of_a_call_are_one_analysis(content: str | None, analysis: str) -> None:
    message = HISTORY[1] | {"reasoning_content": "Hm.", "content": content}
    text = rendered(markup_of(TEMPLATE, {}), [USER, message, *HISTORY[2:]])
    assert text.count("analysis") == 1
    assert f"{TURN}<|channel|>analysis<|message|>{analysis}<|end|>{TURN} to=functions.f" in text


SEEN = f"{ANALYSIS}{TURN}<|channel|>commentary<|message|>Let me see.<|end|>"
HELD = f"{ANALYSIS}{HARMONY.written.text([('add', '{}')]) if HARMONY.written else ''}"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
STRICT = [ADD | {"function": ADD["function"] | {"strict": True}}]


@pytest.mark.parametrize(
    ("script", "fields", "content"),
    [
        (f"{SEEN}{CALL}", {"tools": [ADD]}, "Let me see."),
        (HELD, {"tools": [ADD], "tool_choice": "required"}, None),
        (HELD, {"tools": STRICT}, None),
        (HELD, {"tools": [ADD], "response_format": SCHEMA}, None),
        (f"{ANALYSIS}{ANSWER}7", {"tools": [ADD], "response_format": SCHEMA}, "7"),
        (f"{ANALYSIS}{ANSWER}7", {"response_format": SCHEMA}, "7"),
        (f"{ANALYSIS}{ANSWER}7", {"tools": STRICT}, "7"),
        (f"{ANALYSIS}{ANSWER}7", {}, "7"),
    ],
)
async def test_outputs_of_the_server(script: str, fields: dict[str, Any], content: str | None) -> None:
    """What a grammar holds is what the script would write by itself."""
    async with serving(script.encode(), chat_template=TEMPLATE, max_model_len=1024) as server:
        choice, _ = await answered_twice(server, **fields, return_token_ids=True)
    message = choice["message"]
    assert bytes(choice["token_ids"][:-1]).decode() == script
    assert (message["reasoning"], message["content"]) == ("Hm.", content)
    assert [call["function"]["name"] for call in message.get("tool_calls", ())] == ["add"] * ("to=" in script)
    assert choice["finish_reason"] == ("tool_calls" if "to=" in script else "stop")
