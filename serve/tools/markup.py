"""ChatMarkup: how a chat template writes tools, calls and reasoning, and what messages get if it does not."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from serve.text.chat_template import ChatTemplateError, render_chat
from serve.text.output_splitter import ReasoningMarks
from serve.tools.definitions import ToolRequest
from serve.tools.formats import (
    FORMATS,
    HERMES,
    REASONING,
    WRITTEN_HERMES,
    CallFormat,
    WrittenCall,
    format_of,
    reasoning_of,
)

AUTO = "auto"
_TOOL_VARIABLES = ("tools", "xml_tools")  # the latter of SmolLM3
_NEEDLE = "needle_function"
_REASONING = ("reasoning_content", "reasoning", "thinking")  # names in messages
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}\Z")
_INSTRUCTIONS = """\
You can call functions. Between <tools> and </tools> are their signatures, with JSON schemas of the arguments:
<tools>
{tools}
</tools>

To call a function, write a JSON object with its name and its arguments between <tool_call> and </tool_call>:
<tool_call>
{{"name": <name of the function>, "arguments": <object of its arguments>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class ChatMarkup:
    calls: CallFormat
    tools_variable: str | None  # of the template; None: it shows no tools, or writes calls in an unknown format
    shows_calls: bool  # those of a history
    shows_results: bool  # messages of the role tool
    reasoning: ReasoningMarks | None
    takes_system: bool = True  # messages of the role system

    def messages(self, messages: Sequence[dict[str, Any]], tools: ToolRequest | None) -> list[dict[str, Any]]:
        """The messages of `check_messages` with what the template would leave out."""
        chat = list(messages)
        instructs = self._instructs(tools)
        if self.calls.answer:
            chat = _with_single_calls([_with_one_text(message) for message in chat])
        if any(message.get("tool_calls") for message in chat) and (instructs or not self.shows_calls):
            written = WRITTEN_HERMES if instructs or self.calls.written is None else self.calls.written
            chat = _with_calls(chat, written, keeps_results=self.shows_results and not instructs)
        elif self.calls.short_ids:
            chat = [_with_short_ids(message) for message in chat]
        if tools is None or not instructs:
            return chat
        lines = "\n".join(json.dumps(tool.template_form, ensure_ascii=False) for tool in tools.tools)
        text = _INSTRUCTIONS.format(tools=lines)
        first = chat[0]
        if first["role"] in ("system", "developer"):
            return [first | {"content": f"{first['content']}\n\n{text}"}, *chat[1:]]
        if not self.takes_system and first["role"] == "user":
            return [first | {"content": f"{text}\n\n{first['content']}"}, *chat[1:]]
        return [{"role": "system", "content": text}, *chat]

    def _instructs(self, tools: ToolRequest | None) -> bool:
        """True if the tools are added to the system message."""
        return self.tools_variable is None and tools is not None and bool(tools.callable)

    def variables(self, tools: ToolRequest | None) -> dict[str, Any]:
        """Variables of the template for the tools. They are left out if none may be called."""
        if tools is None or not tools.callable or self.tools_variable is None:
            return {}
        return {self.tools_variable: [tool.template_form for tool in tools.tools]}

    def warnings(self, tools: ToolRequest | None) -> list[str]:
        if not self._instructs(tools):
            return []
        return ["The chat template of this model shows no tools: they were added to the system message."]


def markup_of(
    template: str | None,
    special_tokens: Mapping[str, str],
    *,
    call_parser: str = AUTO,
    reasoning_parser: str = AUTO,
    is_trusted: bool = True,
) -> ChatMarkup:
    """The markup of a chat template. `is_trusted`: it may be rendered here; else its text alone decides."""
    source = template or ""
    known = format_of(source) if call_parser == AUTO else next(item for item in FORMATS if item.name == call_parser)
    variable, takes_system = None, True
    if is_trusted:
        system = [{"role": "system", "content": _NEEDLE}, {"role": "user", "content": "x"}]
        takes_system = _NEEDLE in _rendered(source, system, dict(special_tokens))
        if known is not None:
            variable = next((name for name in _TOOL_VARIABLES if name in source and _shows_tools(source, name)), None)
        shows_calls, shows_results = _shows_history(source, special_tokens, variable)
    else:
        if known is not None:
            variable = next((name for name in _TOOL_VARIABLES if name in source), None)
        shows_calls = shows_results = "tool_calls" in source
    reasoning = REASONING.get(reasoning_parser) if reasoning_parser != AUTO else reasoning_of(source)
    if variable is None and call_parser == AUTO:
        known = None
    return ChatMarkup(known or HERMES, variable, shows_calls, shows_results, reasoning, takes_system)


def _probe(variable: str | None) -> dict[str, Any]:
    form = {"name": _NEEDLE, "description": "x", "parameters": {"type": "object", "properties": {}}}
    return {} if variable is None else {variable: [{"type": "function", "function": form}]}


def _shows_tools(template: str, variable: str) -> bool:
    return _NEEDLE in _rendered(template, [{"role": "user", "content": "x"}], _probe(variable))


def _shows_history(template: str, special_tokens: Mapping[str, str], variable: str | None) -> tuple[bool, bool]:
    """Whether the template shows calls, and their results."""
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": '{"needle_argument": 1}'}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00000", "content": "needle_result"},
    ]
    text = _rendered(template, messages, {**special_tokens, **_probe(variable)})
    return "needle_argument" in text, "needle_result" in text


def _rendered(template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    with suppress(ChatTemplateError):
        return render_chat(template, messages, special_tokens={}, add_generation_prompt=True, template_kwargs=variables)
    return ""


def _with_calls(
    messages: Sequence[dict[str, Any]], written: WrittenCall, *, keeps_results: bool
) -> list[dict[str, Any]]:
    """The messages with calls in the assistant's content, and results in messages of the user if they are not kept."""
    chat: list[dict[str, Any]] = []
    results: list[str] = []  # of the last message
    for message in messages:
        if message["role"] == "tool" and not keeps_results:
            if results:
                chat.pop()
            results.append(f"<tool_response>\n{message['content'] or ''}\n</tool_response>")
            chat.append({"role": "user", "content": "\n".join(results)})
            continue
        results = []
        if calls := message.get("tool_calls"):
            text = written.text([_name_and_arguments(call) for call in calls])
            message = {name: value for name, value in message.items() if name != "tool_calls"}
            message["content"] = "\n".join(filter(None, (message["content"], text)))
        chat.append(message)
    return chat


def _with_one_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message with calls, its reasoning before its content: harmony's templates refuse both and show either alike."""
    texts = [message.get(name) for name in _REASONING]
    reasoning = next((text for text in texts if isinstance(text, str)), None)
    if not message.get("tool_calls") or not message["content"] or not reasoning:
        return message
    kept = {name: value for name, value in message.items() if name not in _REASONING}
    return kept | {"content": f"{reasoning}\n\n{message['content']}"}


def _with_single_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with one call each, followed by its results: harmony's templates show a message's first call."""
    chat: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []  # after a message with several calls
    for message in reversed(messages):
        calls = message.get("tool_calls")
        if message["role"] == "tool":
            results.append(message)
            continue
        if isinstance(calls, list) and len(calls) > 1:
            for place, call in reversed([*enumerate(calls)]):
                call_id = call.get("id") if isinstance(call, Mapping) else None
                chat += [result for result in results if result.get("tool_call_id") == call_id]
                results = [result for result in results if result.get("tool_call_id") != call_id]
                first = message if place == 0 else {"role": message["role"], "content": None}
                chat.append(first | {"tool_calls": [call]})
            results = []
        else:
            chat += [*results, message]
            results = []
    return [*reversed(results), *reversed(chat)]


def _name_and_arguments(call: Any) -> tuple[str, str]:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    if not isinstance(function, Mapping):
        return "", "{}"
    arguments = function.get("arguments") or "{}"
    return str(function.get("name", "")), (
        arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    )


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    """The message with ids of nine characters; equal ids stay equal."""
    changed = dict(message)
    if isinstance(changed.get("tool_call_id"), str):
        changed["tool_call_id"] = _short_id(changed["tool_call_id"])
    if isinstance(calls := changed.get("tool_calls"), list):
        changed["tool_calls"] = [
            call | {"id": _short_id(call["id"])} if isinstance(call, dict) and isinstance(call.get("id"), str) else call
            for call in calls
        ]
    return changed


def _short_id(value: str) -> str:
    return value if _SHORT_ID.match(value) else sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:9]
