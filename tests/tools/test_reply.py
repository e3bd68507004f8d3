"""How a request's output is decoded and divided: marks that are special tokens, and the grammar of calls."""

import json
from dataclasses import replace
from typing import Any

import pytest

from serve.engine.request import FinishReason, TokenEvent
from serve.grammar.fields import GrammarRequest
from serve.grammar.spec import GrammarKind, GrammarSpec
from serve.jobs.output import Output, OutputDecoder
from serve.text.chat import PromptError
from serve.text.detokenizer import Detokenizer, StopStrings
from serve.text.output_parts import TextPart
from serve.text.output_splitter import ReasoningMarks
from serve.tools.call_grammar import call_grammar
from serve.tools.definitions import ToolField, ToolRequest, tool_request
from serve.tools.formats import FORMATS, HERMES, CallFormat
from serve.tools.reply import ReplyFormat
from tests.support.http_client import BEGIN, END, byte_tokenizer

FORMAT = {item.name: item for item in FORMATS}
MARKS = ReasoningMarks("<begin>", "</think>")


def decoded(reply: ReplyFormat, tokens: list[int], *, size: int = 1) -> Output:
    """The output of tokens that arrive in events of a size, the last of which ends it."""
    tokenizer, output = byte_tokenizer(), Output()
    splitter = reply.splitter(tokenizer, skip_special_tokens=True)
    decoder = OutputDecoder(
        Detokenizer(tokenizer, StopStrings(), kept_ids=splitter.kept_ids), tokenizer.eos_token_ids, splitter
    )
    for start in range(0, len(tokens), size):
        event = TokenEvent(tokens[start : start + size])
        if start + size >= len(tokens):
            event.finish_reason, event.stop_token_id = FinishReason.STOP, END
        output.add(decoder.output(event))
    return output


@pytest.mark.parametrize("size", [1, 5, 100])
def test_mark_that_is_a_special_token(size: int) -> None:
    reply = ReplyFormat(None, None, MARKS, thinking=MARKS)
    output = decoded(reply, [BEGIN, *b"Hm.</think>Yes.", END], size=size)
    texts = {
        kind: "".join(p.text for p in output.parts if isinstance(p, TextPart) and p.kind == kind)
        for kind in ("reasoning", "content")
    }
    assert texts == {"reasoning": "Hm.", "content": "Yes."}
    assert (output.answer_start, output.reasoning_tokens) == (12, 12)
    assert output.text == "<begin>Hm.</think>Yes."


def test_special_tokens_that_are_no_marks_are_skipped() -> None:
    reply = ReplyFormat(None, None, ReasoningMarks("<think>", "</think>"))
    assert reply.kept_ids(byte_tokenizer()) == set()
    output = decoded(reply, [*b"Ye", BEGIN, *b"s.", END])
    parts = [part for part in output.parts if isinstance(part, TextPart)]
    assert "".join(part.text for part in parts) == "Yes."
    assert [token for part in parts for token in part.tokens] == [0, 1, 3, 4]


def request(*strict: bool, choice: Any = None, parallel: bool = True) -> ToolRequest:
    """Tools f0, f1, ..., strict or not."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    forms = [{"name": f"f{i}", "parameters": schema, "strict": value} for i, value in enumerate(strict)]
    fields = [ToolField.model_validate({"type": "function", "function": form}) for form in forms]
    tools = tool_request(fields, choice, parallel=parallel)
    assert tools is not None
    return tools


def form_of(tools: ToolRequest, calls: CallFormat = HERMES) -> Any:
    text = call_grammar(tools, calls)
    return None if text is None else json.loads(text)["format"]


def test_tools_without_strict_ones_need_no_grammar() -> None:
    assert form_of(request(False, False)) is None


def test_required_calls() -> None:
    form = form_of(request(False, False, choice="required"))
    assert (form["type"], form["at_least_one"], form["stop_after_first"]) == ("tags_with_separator", True, False)
    assert [tag["begin"] for tag in form["tags"]] == [f'<tool_call>\n{{"name": "f{i}", "arguments": ' for i in range(2)]
    assert form["tags"][0]["content"]["json_schema"]["properties"] == {"a": {"type": "integer"}}
    assert form_of(request(False, choice="required", parallel=False))["stop_after_first"]
    named = form_of(request(False, False, choice={"type": "function", "function": {"name": "f1"}}))
    assert ([tag["begin"][22:24] for tag in named["tags"]], named["stop_after_first"]) == (["f1"], True)


def test_required_calls_of_a_list() -> None:
    form = form_of(request(False, choice="required"), FORMAT["granite"])
    first, calls, last = form["elements"]
    assert (first["value"], calls["separator"], last["value"]) == ("<|tool_call|>[", ", ", "]")


def test_strict_tools_that_may_be_called() -> None:
    form = form_of(request(True, False))
    assert (form["type"], form["triggers"]) == ("triggered_tags", ["<tool_call>"])
    schemas = [tag["content"]["json_schema"] for tag in form["tags"]]
    assert [schema.get("properties") for schema in schemas] == [{"a": {"type": "integer"}}, None]
    listed = form_of(request(True), FORMAT["granite"])
    assert listed["triggers"] == [listed["tags"][0]["begin"]] == ["<|tool_call|>["]
    assert listed["excludes"] == ["<|tool_call|>", "<tool_call>"]


@pytest.mark.parametrize("strict", [True, False])
def test_arguments_are_an_object_if_the_schema_has_no_type(strict: bool) -> None:
    tool: dict[str, Any] = {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}, "strict": strict}
    field = ToolField.model_validate({"type": "function", "function": tool})
    tools = tool_request([field], None if strict else "required", parallel=True)
    assert tools is not None
    (tag,) = form_of(tools)["tags"]
    assert tag["content"]["json_schema"] == {"type": "object"} | tool["parameters"]


def test_allowed_tools_are_held() -> None:
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f1"}}]},
    }
    (tag,) = form_of(request(False, False, choice=choice))["tags"]
    assert '"f1"' in tag["begin"]


def test_call_of_a_tool_that_is_not_allowed_is_content() -> None:
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f1"}}]},
    }
    text = "[f0(a=1)]"
    for tools, content in ((request(False, False, choice=choice), text), (request(False, False), "")):
        output = decoded(ReplyFormat(tools, FORMAT["pythonic"], None), [*text.encode(), END])
        assert "".join(part.text for part in output.parts if isinstance(part, TextPart)) == content


@pytest.mark.parametrize("name", sorted(FORMAT))
def test_written_calls_are_read_again(name: str) -> None:
    form = FORMAT[name]
    if form.written is None:
        return
    text = form.written.text([("f0", '{"a": 1}'), ("f1", "{}")])
    reply = ReplyFormat(request(False, False), form, None)
    output = decoded(reply, [*text.encode(), END])
    names = [part.name for part in output.parts if hasattr(part, "name")]
    arguments = "".join(part.text for part in output.parts if hasattr(part, "text"))
    assert (names, arguments) == (["f0", "f1"], '{"a": 1}{}')


def test_grammar_beside_tools() -> None:
    schema = GrammarRequest(
        GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type": "object"}', whitespace=""), "response_format"
    )
    regex = GrammarRequest(GrammarSpec(GrammarKind.REGEX, "a+"), "regex")
    may = ReplyFormat(request(False), HERMES, None)
    combined = may.grammar(schema)
    assert combined is not None
    assert json.loads(combined.spec.text)["format"]["elements"][0]["json_schema"] == {"type": "object"}
    assert combined.spec.whitespace == ""
    with pytest.raises(PromptError) as info:
        may.grammar(regex)
    assert info.value.param == "regex"
    must = ReplyFormat(request(False, choice="required"), HERMES, None)
    held, alone = must.grammar(schema), must.grammar(None)
    assert held is not None
    assert alone is not None
    assert (held.spec, held.unused, alone.unused) == (alone.spec, (schema,), ())
    for stated in (regex, replace(schema, param="structured_outputs.json")):
        with pytest.raises(PromptError) as info:
            must.grammar(stated)
        assert info.value.param == stated.param
    none = ReplyFormat(request(False, choice="none"), None, None)
    assert none.grammar(regex) is regex
