"""Tool calls in the formats of models: each example, whole and split at every character."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.text.output_parts import (
    ArgumentsDelta,
    CallEnd,
    CallStart,
    Part,
    TextPart,
)
from serve.text.output_splitter import OutputSplitter, ReasoningMarks
from serve.tools.formats import FORMATS, CallFormat, format_of, reasoning_of
from tests.support.http_client import byte_tokenizer

TOOLS: dict[str, Any] = {
    "add": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    "now": {"type": "object", "properties": {}},
}
ARGUMENTS = {"a": 1, "b": "x"}
BY_NAME = {item.name: item for item in FORMATS}
_JSON = '{"name": "add", "arguments": {"a": 1, "b": "x"}}'
_ADD = '{"a": 1, "b": "x"}'
_XML = """<tool_call>
<function=add>
<parameter=a>
1
</parameter>
<parameter=b>
x
</parameter>
</function>
</tool_call>"""
EXAMPLES = [
    ("hermes", f"<tool_call>\n{_JSON}\n</tool_call>"),
    ("smollm3", f"<tool_call>{_JSON}</tool_call>"),
    ("smollm3", '<code>add(a=1, b="x")</code>'),
    ("llama3", '{"name": "add", "parameters": {"a": 1, "b": "x"}}'),
    ("llama3", '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": "x"}}'),
    ("llama3", '<|python_tag|>add.call(a=1, b="x")'),
    ("llama3", '{"type": "function", "name": "add", "parameters": {"a": 1, "b": "x"}}'),
    ("pythonic", '[add(a=1, b="x")]'),
    ("pythonic", "<|python_start|>[add(a=1, b='x')]<|python_end|>"),
    ("olmo3", '<function_calls>\nadd(a=1, b="x")\n</function_calls>'),
    ("lfm2", '<|tool_call_start|>[add(a=1, b="x")]<|tool_call_end|>'),
    ("mistral_v3", '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": "x"}, "id": "abc123def"}]'),
    ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1, "b": "x"}'),
    ("mistral", '[TOOL_CALLS]add[CALL_ID]abc123def[ARGS]{"a": 1, "b": "x"}'),
    ("granite", f"<|tool_call|>[{_JSON}]"),
    ("granite", f"<tool_call>[{_JSON}]"),
    ("granite_20b", f"<function_call> {_JSON}"),
    ("functiongemma", "<start_function_call>call:add{a:1,b:<escape>x<escape>}<end_function_call>"),
    ("gemma4", '<|tool_call>call:add{a:1,b:<|"|>x<|"|>}<tool_call|>'),
    ("qwen3_coder", _XML),
    ("phi4_mini", f"<|tool_call|>[{_JSON}]<|/tool_call|>"),
    ("phi4_mini", f"functools[{_JSON}]"),
    ("harmony", f"<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{_ADD}<|call|>"),
    ("harmony", f"<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{_ADD}<|call|>"),
    ("harmony", f"<|channel|>commentary to=functions.add<|message|>{_ADD}<|end|>"),
]


@dataclass
class Call:
    name: str
    arguments: str = ""
    spans: dict[str, str] | None = None  # text of the tokens by argument
    tokens: list[int] = field(default_factory=list)


@dataclass
class Result:
    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, text: str, parts: list[Part]) -> None:
        """Add the parts of some text whose tokens are its bytes."""
        data = text.encode()
        for part in parts:
            match part:
                case TextPart(kind="reasoning"):
                    self.reasoning += part.text
                case TextPart():
                    self.content += part.text
                    covered = data[part.tokens.start : part.tokens.stop].decode()
                    assert part.text in (covered, "\n\n")  # the latter of a header of harmony
                case CallStart():
                    assert part.index == len(self.calls)
                    self.calls.append(Call(part.name))
                case ArgumentsDelta():
                    self.calls[part.index].arguments += part.text
                    self.calls[part.index].tokens += part.tokens
                case CallEnd():
                    spans = {span.name: data[span.tokens.start : span.tokens.stop].decode() for span in part.arguments}
                    self.calls[part.index].spans = spans


def split(form: CallFormat | None, text: str, size: int | None = None, **options: Any) -> Result:
    """Parse a text, given in pieces of `size` characters."""
    splitter = OutputSplitter(byte_tokenizer(), form.parser(TOOLS) if form else None, **options)
    result = Result()
    for start in range(0, len(text), size or len(text) or 1):
        piece = text[start : start + (size or len(text))]
        result.add(text, splitter.push(piece.encode(), piece, is_complete=False))
    result.add(text, splitter.push([], "", is_complete=True))
    return result


def both(form: CallFormat | None, text: str, **options: Any) -> Result:
    """Parse a text whole and split at every character."""
    whole = split(form, text, **options)
    for size in (1, 2, 7):
        streamed = split(form, text, size, **options)
        assert streamed == whole, size
    return whole


@pytest.mark.parametrize(("name", "text"), EXAMPLES)
def test_call_of_each_format(name: str, text: str) -> None:
    result = both(BY_NAME[name], text)
    (call,) = result.calls
    assert (call.name, json.loads(call.arguments), result.content) == ("add", ARGUMENTS, "")
    assert call.spans is not None
    assert list(call.spans) == ["a", "b"]
    assert call.spans["a"].strip() == "1"
    assert "x" in call.spans["b"]


@pytest.mark.parametrize(("name", "text"), EXAMPLES)
def test_calls_in_a_row(name: str, text: str) -> None:
    separator = "; " if name == "llama3" and "<|" not in text else "\n"
    if name == "pythonic" and "<|" not in text:
        text, separator = "[" + ", ".join([text[1:-1]] * 2) + "]", ""
        result = both(BY_NAME[name], text)
    else:
        result = both(BY_NAME[name], separator.join([text, text]))
    assert [(call.name, json.loads(call.arguments)) for call in result.calls] == [("add", ARGUMENTS)] * 2
    assert result.content == ""


@pytest.mark.parametrize(("name", "text"), EXAMPLES)
def test_every_prefix_loses_no_text(name: str, text: str) -> None:
    """A cut call that has started keeps what there is of it; else its text is content."""
    for end in range(len(text)):
        result = both(BY_NAME[name], f"So{text[:end]}" if not text.startswith(("[add", "{")) else text[:end])
        if not result.calls:
            assert result.content.removeprefix("So") == text[:end]
        else:
            assert result.content.removeprefix("So") == ""


@pytest.mark.parametrize("item", FORMATS, ids=lambda item: item.name)
@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "Hello\n",
            "  Hello, <b>you</b> {1} [2] ",
            "[1, 2]",
            '{"a": 1}',
            "[TOOL",
            "<tool",
            "<function",
            "é✓",
        ),
        *("[add", "[add(a=1", "{", '{"name": 7}', "(a)", "[x]\n", '{"type": 1}'),
    ],
)
def test_content_is_unchanged(item: CallFormat, text: str) -> None:
    result = both(item, text)
    assert (result.content, result.calls) == (text, [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "Use <tool_call> like this."),
        ("hermes", "<tool_call>\n{}\n</tool_call>"),
        ("hermes", '<tool_call>{"name": ""}</tool_call>'),
        ("hermes", '<tool_call>{"name": "a b"}</tool_call>'),
        ("llama3", '{"name": "other", "parameters": {}}'),
        ("llama3", "<|python_tag|>print(1)"),
        ("pythonic", "[other(a=1)]"),
        ("pythonic", "[add(1)]"),
        ("pythonic", "[add(a=f(2))]"),
        ("lfm2", "<|tool_call_start|>[add(a=)]<|tool_call_end|>"),
        ("mistral", "[TOOL_CALLS]add[ARGS]7"),
        ("gemma4", '<|tool_call>call:add{a:<|"|>}<tool_call|>'),
        ("gemma4", "<|tool_call>call:add{a:[}}<tool_call|>"),
        ("gemma4", "<|tool_call>call:add{a:[1,}]}<tool_call|>"),
        ("gemma4", "<|tool_call>call:add{" + "a:{" * 3000 + "}" * 3000 + "}<tool_call|>"),
    ],
)
def test_text_that_is_no_call_is_content(name: str, text: str) -> None:
    result = both(BY_NAME[name], text)
    assert (result.content, result.calls) == (text, [])


@pytest.mark.parametrize(
    ("name", "text", "content"),
    [
        ("granite", f'<|tool_call|>[{_JSON}, {{"name": 7}}]', '{"name": 7}]'),
        ("granite", f'<|tool_call|>[{_JSON}, {{"name": "no', '{"name": "no'),
        ("granite", f'<|tool_call|>[{_JSON}, {{"name": "now", "arguments": {{', ""),
        ("hermes", f"<tool_call>{_JSON[:-1]}, 7}} x", ", 7} x"),
        ("llama3", f'{_JSON}; {{"name": "other", "parameters": {{}}}}', '{"name": "other", "parameters": {}}'),
        ("llama3", f'{_JSON}; {{"na', '{"na'),
        ("pythonic", "[add(a=1), other(b=2)]", "other(b=2)]"),
        ("olmo3", "<function_calls>add(a=1)\nnow(1)\n</function_calls>", "now(1)\n</function_calls>"),
    ],
)
def test_text_of_a_broken_later_call_is_content(name: str, text: str, content: str) -> None:
    result = both(BY_NAME[name], text)
    assert (result.calls[0].name, result.content) == ("add", content)


def markup(form: CallFormat) -> st.SearchStrategy[str]:
    """Text made of what calls in the format consist of."""
    texts = [text for name, text in EXAMPLES if name == form.name]
    words = {word for text in texts for word in re.findall(r"<[^<>]*>|\w+|[^\w\s]", text)}
    pieces = st.sampled_from(sorted({*form.marks, *words, *'{}[]()<>",:;= \n'}))
    parts = st.tuples(st.sampled_from(texts), st.integers(0, 60), st.integers(0, 60)).map(
        lambda item: item[0][item[1] : item[1] + item[2]]
    )
    starts = st.sampled_from(["", *form.marks, *(text[:end] for text in texts for end in (20, 30, 40))])
    rest = st.lists(pieces | parts, max_size=12).map("".join)
    return st.tuples(starts, rest).map("".join)


@pytest.mark.parametrize("item", FORMATS, ids=lambda item: item.name)
@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_markup_is_read_alike_whole_and_streamed(item: CallFormat, data: st.DataObject) -> None:
    both(item, data.draw(markup(item)))


def test_content_around_calls() -> None:
    text = f"Let me see.\n\n<tool_call>\n{_JSON}\n</tool_call>\n\nDone."
    result = both(BY_NAME["hermes"], text)
    assert (result.content, len(result.calls)) == ("Let me see.Done.", 1)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "add"}', '{"a": 1}'),
        ('{"name": "add"}', "{}"),
        (
            '{"name": "add", "id": [1, {"x": "}"}], "arguments": {"b": "}]\\"{", "c": [1, {"d": 2}]} }',
            '{"b": "}]\\"{", "c": [1, {"d": 2}]}',
        ),
        ('{"name": "add", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"function": "add", "parameters": {}}', "{}"),
        ('{"name":"add","arguments":{"a":1,"b":"é✓"}}', '{"a":1,"b":"é✓"}'),
        ('{"name": "other", "arguments": {"a": }}', '{"a": }'),
    ],
)
def test_objects_in_other_orders(text: str, arguments: str) -> None:
    result = both(BY_NAME["hermes"], f"<tool_call>{text}</tool_call>")
    assert ([call.arguments for call in result.calls], result.content) == ([arguments], "")


def test_values_without_quotes_have_the_types_of_the_schema() -> None:
    text = _XML.replace("\nx\n", "\n1\n")
    (call,) = both(BY_NAME["qwen3_coder"], text).calls
    assert json.loads(call.arguments) == {"a": 1, "b": "1"}


def test_spans_of_arguments_cover_their_values() -> None:
    text = (
        '<tool_call>{"name": "f", "arguments": { "a" : [1, 2] , "b\\"": "é, }" ,"c":null, "d": {"a": 3}}}</tool_call>'
    )
    (call,) = both(BY_NAME["hermes"], text).calls
    assert call.spans == {"a": "[1, 2]", 'b"': '"é, }"', "c": "null", "d": '{"a": 3}'}


def test_token_of_several_characters_belongs_to_all_its_parts() -> None:
    tokenizer = byte_tokenizer()
    text = '<tool_call>{"name": "f", "arguments": {"é": "✓"}}</tool_call>'
    splitter = OutputSplitter(tokenizer, BY_NAME["hermes"].parser({}))
    parts = splitter.push(text.encode(), text, is_complete=True)
    (end,) = [part for part in parts if isinstance(part, CallEnd)]
    (span,) = end.arguments
    assert text.encode()[span.tokens.start : span.tokens.stop].decode() == '"✓"'
    assert end.tokens.start == 0


def test_single_call_ends_the_output() -> None:
    text = f"<tool_call>{_JSON}</tool_call>" * 2
    splitter = OutputSplitter(byte_tokenizer(), BY_NAME["hermes"].parser(TOOLS), single_call=True)
    parts: list[Part] = []
    for character in text:
        parts += splitter.push(character.encode(), character, is_complete=False)
    assert [part.index for part in parts if isinstance(part, CallStart | CallEnd)] == [0, 0]
    assert splitter.has_ended


THINK = ReasoningMarks("<think>", "</think>")


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", False, "Hm.", "Yes."),
        ("Hm.\n</think>\n\nYes.", True, "Hm.", "Yes."),
        ("<think>Hm.</think>Yes.", True, "Hm.", "Yes."),
        ("Yes. <think>", False, "", "Yes. <think>"),
        ("  Yes.", False, "", "  Yes."),
        ("<think></think>", False, "", ""),
        ("<think>Hm. </thi", False, "Hm. </thi", ""),
        ("Hm.", True, "Hm.", ""),
    ],
)
def test_reasoning(text: str, opened: bool, reasoning: str, content: str) -> None:
    for form in (None, BY_NAME["hermes"], BY_NAME["llama3"]):
        result = both(form, text, reasoning=THINK, starts_in_reasoning=opened)
        assert (result.reasoning, result.content, result.calls) == (reasoning, content, [])


def test_reasoning_before_calls() -> None:
    for name, text in EXAMPLES:
        result = both(BY_NAME[name], f"<think>\nadd?\n</think>\n\n{text}", reasoning=THINK)
        assert (result.reasoning, result.content, len(result.calls)) == ("add?", "", 1)


def test_tokens_of_reasoning() -> None:
    text = "<think>\nHm.\n</think>\n\nYes."
    splitter = OutputSplitter(byte_tokenizer(), reasoning=THINK)
    splitter.push(text[:8].encode(), text[:8], is_complete=False)
    assert (splitter.answer_start, splitter.reasoning_tokens) == (None, 8)
    splitter.push(text[8:].encode(), text[8:], is_complete=True)
    assert (splitter.answer_start, splitter.reasoning_tokens) == (20, 20)
    none = OutputSplitter(byte_tokenizer(), reasoning=THINK)
    none.push(b"Yes.", "Yes.", is_complete=True)
    assert (none.answer_start, none.reasoning_tokens) == (0, 0)


@pytest.mark.parametrize("item", FORMATS, ids=lambda item: item.name)
def test_format_is_found_by_its_hints(item: CallFormat) -> None:
    for hint in item.hints:
        assert format_of(f"a {hint} b") is item
    assert format_of("{{ messages }}") is None
    assert format_of("<tool_call> <arg_key>") is None


def test_reasoning_is_found_by_its_marks() -> None:
    assert reasoning_of("a </think> b") == THINK
    assert reasoning_of("{{ messages }}") is None
