"""Grammars of tool calls, as structural tags: calls that are required, or text in which calls follow their schemas."""

import json
import re
from typing import Any

from serve.grammar.fields import GrammarRequest
from serve.grammar.json_schema import closed, load_schema
from serve.text.chat import PromptError
from serve.tools.definitions import Tool, ToolRequest
from serve.tools.formats import CallFormat, WrittenCall

_ANY_OBJECT = {"type": "object"}
_TAG = re.compile(r"`format[\w.\[\]]*\btags\[(\d+)\][\w.]*`: ")


def call_grammar(tools: ToolRequest, calls: CallFormat, alternative: GrammarRequest | None = None) -> str | None:
    """The structural tag of an output with these tools; None if none is needed.

    Args:
        alternative: states the JSON schema of the content where the model may choose between calls and content.

    Raises:
        PromptError: the format of the calls cannot be held to a schema.
    """
    written = calls.written
    is_held = any(tool.strict for tool in tools.callable) or len(tools.callable) < len(tools.tools)
    if not tools.is_required and not is_held and alternative is None:
        return None
    if written is None:  # the caller chose a format that is, unless the model may choose
        if alternative is not None and not is_held:
            param = alternative.param
            message = f"`{param}` cannot be combined with tools that the model may call: its calls are no JSON."
            raise PromptError(param, message, "unsupported_parameter")
        param = next((tool.param for tool in tools.callable if tool.strict), "tool_choice")
        message = f"`{param}`: calls of this model are no JSON: a schema can hold them only if a call is required."
        raise PromptError(param, message, "unsupported_parameter")
    if tools.is_required:
        form = _required(tools, written)
    elif alternative is None:
        form = _optional(tools, calls, written)
    else:
        schema = load_schema(alternative.spec.text)
        content = {"type": "json_schema", "json_schema": closed(schema) if alternative.spec.closed else schema}
        form = {"type": "or", "elements": [content, _required(tools, written)]}
    return json.dumps({"type": "structural_tag", "format": form})


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
    open_, close = ({"type": "const_string", "value": text} for text in (written.open, written.close))
    return {"type": "sequence", "elements": [open_, calls, close]}


def _optional(tools: ToolRequest, calls: CallFormat, written: WrittenCall) -> dict[str, Any]:
    if written.open:
        tag = {
            "begin": written.open,
            "content": _required(tools, WrittenCall("", *_body(written))),
            "end": written.close,
        }
        return {"type": "triggered_tags", "triggers": [written.open], "tags": [tag]}
    start = written.before.partition("NAME")[0]
    trigger = next((mark for mark in calls.marks if start.startswith(mark)), start)
    return {"type": "triggered_tags", "triggers": [trigger], "tags": _tags(tools, written)}


def _body(written: WrittenCall) -> tuple[str, str, str]:
    return written.before, written.after, written.separator


def _tags(tools: ToolRequest, written: WrittenCall) -> list[dict[str, Any]]:
    return [
        {
            "begin": written.before.replace("NAME", tool.name),
            "content": {"type": "json_schema", "json_schema": _schema(tool, tools)},
            "end": written.after,
        }
        for tool in tools.callable
    ]


def _schema(tool: Tool, tools: ToolRequest) -> Any:
    return {**_ANY_OBJECT, **tool.parameters} if tools.is_required or tool.strict else _ANY_OBJECT
