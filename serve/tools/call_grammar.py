"""Grammars of tool calls, as structural tags: calls that are required, or text in which calls follow their schemas."""

import json
import re
from dataclasses import replace
from typing import Any

from serve.grammar.argument_styles import STYLES, ArgumentStyle
from serve.grammar.fields import GrammarRequest
from serve.grammar.json_schema import GrammarError, closed, load_schema
from serve.grammar.json_text import escaped_lark
from serve.grammar.structural_tag import structural_tag
from serve.text.chat import PromptError
from serve.tools.definitions import Tool, ToolRequest
from serve.tools.formats import HERMES, CallFormat, WrittenCall
from serve.tools.parsers import Leading

_ANY_OBJECT = {"type": "object"}
# Text whose first character after white space, as `str.isspace` defines it, is not the first one of a call.
_CONTENT = r"[\s\x1c-\x1f]*([^\s\x1c-\x1f{}](.|\n)*)?"
_TAG = re.compile(r"`format[\w.\[\]]*\btags\[(\d+)\][\w.]*`: ")


def call_grammar(tools: ToolRequest, calls: CallFormat, alternative: GrammarRequest | None = None) -> str | None:
    """The structural tag of an output with these tools; None if none is needed.

    Args:
        alternative: states the JSON schema of the content where the model may choose between calls and content.
    """
    is_held = any(tool.strict for tool in tools.callable) or len(tools.callable) < len(tools.tools)
    if not tools.is_required and not is_held and alternative is None:
        return None
    written = calls.written or calls.styled
    assert written is not None
    if tools.is_required:
        form = _required(tools, written)
    elif alternative is None:
        form = _optional(tools, calls, written)
    else:
        schema = load_schema(alternative.spec.text)
        content = {"type": "json_schema", "json_schema": closed(schema) if alternative.spec.closed else schema}
        content = {"type": "sequence", "elements": [_text(calls.answer), content]} if calls.answer else content
        form = {"type": "or", "elements": [content, _required(tools, written)]}
    return json.dumps({"type": "structural_tag", "format": form})


def required_format(tools: ToolRequest, calls: CallFormat) -> CallFormat:
    """The format of calls that are required: Hermes if that of the model cannot express the arguments of a tool."""
    if calls.written is not None:
        return calls
    try:
        structural_tag(json.loads(call_grammar(tools, calls) or ""), {}, None)
    except (GrammarError, PromptError):
        return HERMES
    return calls


def schema_error(tools: ToolRequest, message: str) -> PromptError:
    """An error about the grammar as one that names the field at fault."""
    found = _TAG.search(message)
    if found is None:
        return PromptError("tools", message)
    param = tools.callable[int(found[1])].param
    return PromptError(param, f"`{param}`: {message[found.end() :]}")


def _required(tools: ToolRequest, written: WrittenCall) -> dict[str, Any]:
    calls = {
        "type": "tags_with_separator",
        "tags": _tags(tools, written),
        "separator": written.separator,
        "at_least_one": True,
        "stop_after_first": tools.is_single,
    }
    if not written.open:
        return calls
    return {"type": "sequence", "elements": [_text(written.open), calls, _text(written.close)]}


def _optional(tools: ToolRequest, calls: CallFormat, written: WrittenCall) -> dict[str, Any]:
    """Calls, or text that `calls` reads as content."""
    parse = calls.parse
    if isinstance(parse, Leading):
        marks, ends = parse.marked.begin, parse.marked.end
        held = _required(tools, written)
        marked = {"type": "sequence", "elements": [_text(marks[0]), held, *map(_text, ends[:1])]}
        content = {"type": "regex", "pattern": _CONTENT.format(re.escape(parse.first)), "excludes": marks}
        return {"type": "or", "elements": [held, marked, content]}
    if calls.answer:
        content = {"type": "any_text", "excludes": parse.begin}
        answer = {"type": "sequence", "elements": [_text(calls.answer), content]}
        return {"type": "or", "elements": [answer, _required(tools, written)]}
    if written.open:
        body = replace(written, open="", close="")
        tags = [{"begin": written.open, "content": _required(tools, body), "end": written.close}]
        trigger = written.open
    else:
        start = written.before.partition("NAME")[0]
        tags, trigger = _tags(tools, written), next(filter(start.startswith, calls.marks), start)
    return {"type": "triggered_tags", "triggers": [trigger], "tags": tags, "excludes": parse.begin}


def _text(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def _tags(tools: ToolRequest, written: WrittenCall) -> list[dict[str, Any]]:
    return [
        {
            "begin": written.before.replace("NAME", tool.name),
            "content": _arguments(tool, tools, written.style),
            "end": written.after,
        }
        for tool in tools.callable
    ]


def _lark(tool: Tool, text: str, style: str) -> dict[str, Any]:
    """The argument `input` of a custom tool with a Lark grammar."""
    form = STYLES.get(style, ArgumentStyle('{"NAME": ', "}", ""))
    is_json = not form.quote and not form.raw_end
    quote = '"' if is_json else form.quote
    before, after = f"{form.before.replace('NAME', 'input')}{quote}", f"{quote}{form.after}"
    try:
        text = escaped_lark(text) if is_json else text
    except GrammarError as error:
        raise PromptError(tool.param, f"`{tool.param}`: {error}.") from None
    return {"type": "sequence", "elements": [_text(before), {"type": "grammar", "grammar": text}, _text(after)]}


def _arguments(tool: Tool, tools: ToolRequest, style: str) -> dict[str, Any]:
    """The content of a call. Styles other than JSON have no form of any object."""
    if tool.lark is not None:
        return _lark(tool, tool.lark, style)
    is_held = tools.is_required or tool.strict or style != "json"
    return {
        "type": "json_schema",
        "json_schema": {**_ANY_OBJECT, **tool.parameters} if is_held else _ANY_OBJECT,
        "style": style,
    }
