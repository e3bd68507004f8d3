"""Grammars of calls that the model may make: what they allow is content, or calls that are read and valid."""

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from serve.grammar.masks import Vocabulary, compile_source
from serve.grammar.spec import GrammarKind, GrammarSpec
from serve.text.output_parts import ArgumentsDelta, CallEnd, CallStart, TextPart
from serve.text.output_splitter import OutputSplitter
from serve.tools.call_grammar import call_grammar, required_format
from serve.tools.definitions import ToolField, ToolRequest, tool_request
from serve.tools.formats import FORMATS, HERMES, CallFormat
from serve.tools.reply import Reply, ReplyFormat
from tests.support.http_client import BEGIN, END, byte_tokenizer

FORMAT = {item.name: item for item in FORMATS}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
RECORD = {
    "type": "object",
    "properties": {
        "a": DIGIT,
        "s": {"type": "string", "maxLength": 3},
        "e": {"type": "string", "enum": ["x", "y z"]},
        "b": {"type": ["boolean", "null"]},
        "l": {"type": "array", "items": DIGIT, "minItems": 1, "maxItems": 3},
        "o": {"type": "object", "properties": {"k": {"type": "string", "pattern": "^[ab]{1,2}$"}}, "required": ["k"]},
        "r": {"$ref": "#/$defs/r"},
    },
    "required": ["s", "l"],
    "$defs": {"r": {"anyOf": [DIGIT, {"const": "one"}]}},
}
ONE = {"type": "object", "properties": {"a": DIGIT}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    """A token for each byte."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"<begin>", b"<end>"]
    return Vocabulary(tokens, frozenset({BEGIN, END}), frozenset({END})).tokenizer()


def tools_of(*schemas: Any) -> ToolRequest:
    """Strict tools f0, f1, ..., of which the model may choose."""
    forms = [{"name": f"f{i}", "parameters": schema, "strict": True} for i, schema in enumerate(schemas)]
    fields = [ToolField.model_validate({"type": "function", "function": form}) for form in forms]
    tools = tool_request(fields, None, parallel=True)
    assert tools is not None
    return tools


def compiled(tokenizer: LLTokenizer, tools: ToolRequest, form: CallFormat) -> LLMatcher:
    text = call_grammar(tools, form)
    assert text is not None
    matcher, error = compile_source(tokenizer, GrammarSpec(GrammarKind.STRUCTURAL_TAG, text).source({}))
    assert error == ""
    return matcher


def accepted(matcher: LLMatcher, text: str) -> str:
    """The longest beginning of a text that the grammar allows, and "$" if the output may end there."""
    state, data = matcher.deep_copy(), text.encode()
    count = state.try_consume_tokens(list(data))
    return data[:count].decode() + ("$" if count == len(data) and state.is_accepting() else "")


def random_output(matcher: LLMatcher, start: str, choose: random.Random) -> bytes | None:
    """`start` and random ASCII after it; None if that does not end."""
    state, output = matcher.deep_copy(), bytearray(start.encode())
    assert state.consume_tokens(list(output))
    while not state.is_accepting() and len(output) < 500:
        mask = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little")
        ids = [index for index in np.flatnonzero(mask[:127]).tolist() if index >= 32 or index == 10]
        ends = [index for index in ids if chr(index) in '"}]),<>/']
        output.append(choose.choice(ends if ends and choose.random() < 0.6 else ids))
        assert state.consume_token(output[-1])
    return bytes(output) if state.is_accepting() else None


@pytest.mark.parametrize("name", sorted(FORMAT))
def test_calls_that_are_allowed_are_read_and_valid(tokenizer: LLTokenizer, name: str) -> None:
    form, tools, choose = FORMAT[name], tools_of(RECORD, ONE), random.Random(0)
    matcher, written, ended = compiled(tokenizer, tools, form), form.written or form.styled, 0
    assert written is not None
    for _ in range(6):
        data = random_output(matcher, written.open + written.before.replace("NAME", "f0"), choose)
        if data is None:
            continue
        ended += 1
        names, texts, ends = list[str](), list[str](), 0
        for part in OutputSplitter(byte_tokenizer(), form.parser(tools.schemas)).push(
            list(data), data.decode(), is_complete=True
        ):
            match part:
                case CallStart():
                    names.append(part.name)
                    texts.append("")
                case ArgumentsDelta():
                    texts[part.index] += part.text
                case CallEnd():
                    ends += 1
                case TextPart():
                    raise AssertionError(f"{data!r} has content")
        assert ends == len(names) > 0
        for called, text in zip(names, texts, strict=True):
            jsonschema.validate(json.loads(text), dict(tools.by_name[called].parameters))
    assert ended


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("llama3", "Well {} a <| b", "Well {} a <| b$"),
        ("llama3", '{"name": "f0", "parameters": {"a": 1}}', '{"name": "f0", "parameters": {"a": 1}}$'),
        ("llama3", '<|python_tag|>{"name": "f1', '<|python_tag|>{"name": "f'),
        ("llama3", '{ "parameters": {"a": "x"}, "name": "f0"}', "{"),
        ("llama3", ' \n\x1c{"name"', " \n\x1c"),
        ("llama3", "x <|python_tag|>", "x <|python_tag|"),
        ("pythonic", "a[0]", "a[0]$"),
        ("pythonic", "<|python_start|>[f0(a=1)]<|python_end|>", "<|python_start|>[f0(a=1)]<|python_end|>$"),
        ("pythonic", '[f0(a="x")]', "[f0(a="),
        ("pythonic", " [f0", " "),
        ("granite", 'x <tool_call>{"name"', "x <tool_call"),
        ("granite", "x <|tool_call|> [", "x <|tool_call|>"),
        ("hermes", "<tool_call>\n{}", "<tool_call>\n{"),
        ("qwen3_coder", "<function=f0>", "<function"),
        ("qwen3_coder", "<tool_call>\n<function=f0>\n<parameter=a>\nx", "<tool_call>\n<function=f0>\n<parameter=a>\n"),
        ("gemma4", '<|tool_call>call:f0{a:<|"|>', "<|tool_call>call:f0{a:"),
        ("lfm2", "<|tool_call_start|>[f0(a=1)]<|tool_call_end|> x", "<|tool_call_start|>[f0(a=1)]<|tool_call_end|> x$"),
        ("olmo3", "<function_calls>f0(b", "<function_calls>f0("),
    ],
)  # fmt: skip
def test_no_spelling_of_a_call_escapes(tokenizer: LLTokenizer, name: str, text: str, allowed: str) -> None:
    assert accepted(compiled(tokenizer, tools_of(ONE), FORMAT[name]), text) == allowed


LARK_TEXT = 'say "a\\\n";'


@pytest.mark.parametrize("name", sorted(FORMAT))
def test_lark_grammar_of_a_custom_tool(tokenizer: LLTokenizer, name: str) -> None:
    definition = 'start: "say " /"[a\\\\\\n]+"/ ";"'
    grammar = {"type": "grammar", "grammar": {"syntax": "lark", "definition": definition}}
    field = ToolField.model_validate({"type": "custom", "custom": {"name": "f0", "format": grammar}})
    tools, form = tool_request([field], None, parallel=True), FORMAT[name]
    assert tools is not None
    matcher, written = compiled(tokenizer, tools, form), form.written or form.styled
    assert written is not None
    for value in (LARK_TEXT, 'say "b";', "say"):
        argument = {
            "json": json.dumps({"input": value}),
            "python": f"input={json.dumps(value)}",
            "qwen_xml": f"<parameter=input>\n{value}\n</parameter>\n",
            "gemma4": f'input:<|"|>{value}<|"|>',
            "functiongemma": f"input:<escape>{value}<escape>",
        }[written.style]
        call = written.before.replace("NAME", "f0") + argument + written.after
        text = f"{written.open}{call}{written.close}"
        assert (accepted(matcher, text) == f"{text}$") == (value == LARK_TEXT)
        if value == LARK_TEXT:
            parts = OutputSplitter(byte_tokenizer(), form.parser(tools.schemas)).push(
                list(text.encode()), text, is_complete=True
            )
            [made] = Reply.of(parts, ReplyFormat(tools, form, None)).calls
            assert made.text == LARK_TEXT


STYLED = [name for name in sorted(FORMAT) if FORMAT[name].written is None]


def required_tools(schema: Any) -> ToolRequest:
    field = ToolField.model_validate({"type": "function", "function": {"name": "f0", "parameters": schema}})
    tools = tool_request([field], "required", parallel=True)
    assert tools is not None
    return tools


@pytest.mark.parametrize("name", STYLED)
def test_required_calls_have_the_form_of_the_model(tokenizer: LLTokenizer, name: str) -> None:
    tools, form, choose = required_tools(ONE), FORMAT[name], random.Random(0)
    assert required_format(tools, form) is form
    matcher = compiled(tokenizer, tools, form)
    outputs = [random_output(matcher, "", choose) for _ in range(3)]
    for data in filter(None, outputs):
        parts = OutputSplitter(byte_tokenizer(), form.parser(tools.schemas)).push(
            list(data), data.decode(), is_complete=True
        )
        reply = Reply.of(parts, ReplyFormat(tools, form, None))
        assert not reply.content
        assert reply.calls
        for call in reply.calls:
            jsonschema.validate(json.loads(call.text), ONE)
    assert any(outputs)


@pytest.mark.parametrize("name", STYLED)
def test_required_calls_that_the_model_cannot_write_have_the_form_of_hermes(name: str) -> None:
    assert required_format(required_tools({"type": "object"}), FORMAT[name]) is HERMES
