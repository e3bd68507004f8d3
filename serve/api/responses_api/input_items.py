"""Input items of OpenAI's Responses API as the messages of a chat, and as they are stored."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.text.chat import MAX_ITEMS, PromptError, required_string

_ROLES = ("user", "assistant", "system", "developer")
_PART_TEXTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
# Known fields of items and parts, some of which change nothing.
_COMMON = ("type", "id", "status", "logprobs", "call_logprobs")
_ITEM_FIELDS = {
    "message": (*_COMMON, "role", "content", "phase"),
    "function_call": (*_COMMON, "call_id", "name", "arguments", "namespace", "parsed_arguments"),
    "function_call_output": (*_COMMON, "call_id", "output"),
    "reasoning": (*_COMMON, "summary", "content", "encrypted_content"),
}
_PART_FIELDS = ("type", "text", "refusal", "annotations", "logprobs", "parsed", "prompt_cache_breakpoint")


def read_input(value: Any, param: str = "input") -> list[dict[str, Any]]:
    """Items from a text or a list, each with its type and an id. Raise PromptError that names what is invalid."""
    if value is None:
        raise PromptError(param, f"`{param}` is missing.", "missing_required_parameter")
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise PromptError(param, f"`{param}` must be a string or a list of items.", "invalid_type")
    if not 1 <= len(value) <= MAX_ITEMS:
        code = "array_above_max_length" if value else "empty_array"
        raise PromptError(param, f"`{param}` must hold 1 to {MAX_ITEMS} items.", code)
    return [_item(item, f"{param}[{i}]") for i, item in enumerate(value)]


def _item(item: Any, path: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise PromptError(path, f"`{path}` must be an object.", "invalid_type")
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind not in _ITEM_FIELDS:
        message = f"`{path}.type`: only items of type {', '.join(_ITEM_FIELDS)} are supported."
        raise PromptError(f"{path}.type", message, "unsupported_parameter")
    if item.get("id") is not None:
        required_string(item, "id", path)
    prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}[kind]
    return {**item, "type": kind, "id": item.get("id") or f"{prefix}_{uuid.uuid4().hex}"}


@dataclass(slots=True)
class _Messages:
    """Messages of a chat, made from items in their order."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    call_ids: set[str] = field(default_factory=set)
    continues: bool = False  # the last message is the assistant's turn, which the next item may be part of

    def add(self, item: Mapping[str, Any], path: str) -> None:
        match item["type"]:
            case "message":
                self._message(item, path)
            case "function_call":
                function = {name: required_string(item, name, path) for name in ("name", "arguments")}
                call_id = required_string(item, "call_id", path)
                self.call_ids.add(call_id)
                call = {"id": call_id, "type": "function", "function": function}
                self._turn().setdefault("tool_calls", []).append(call)
            case "function_call_output":
                self._output(item, path)
            case _:
                self._reasoning(item, path)

    def _turn(self) -> dict[str, Any]:
        """The assistant's message that consecutive reasoning, text and calls share."""
        if not self.continues:
            self.messages.append({"role": "assistant", "content": None})
            self.continues = True
        return self.messages[-1]

    def _message(self, item: Mapping[str, Any], path: str) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise PromptError(f"{path}.role", f"`{path}.role` must be one of {', '.join(_ROLES)}.")
        content = _text(item.get("content"), f"{path}.content")
        if role != "assistant":
            self.continues = False
            self.messages.append({"role": role, "content": content})
            return
        if self.continues and (self.messages[-1]["content"] is not None or "tool_calls" in self.messages[-1]):
            self.continues = False
        self._turn()["content"] = content

    def _output(self, item: Mapping[str, Any], path: str) -> None:
        call_id = required_string(item, "call_id", path)
        if call_id not in self.call_ids:
            message = f"`{path}.call_id`: no function_call before this item has the call_id {call_id[:100]!r}."
            raise PromptError(f"{path}.call_id", message)
        self.continues = False
        content = _text(item.get("output"), f"{path}.output")
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})

    def _reasoning(self, item: Mapping[str, Any], path: str) -> None:
        parts = item.get("content") or item.get("summary") or []
        text = _text(parts, path, kinds={"reasoning_text": "text", "summary_text": "text"})
        if not text and item.get("encrypted_content") is not None:
            name = f"{path}.encrypted_content"
            raise PromptError(name, f"`{name}` cannot be read by this server.", "unsupported_parameter")
        if text:
            self.continues = False
            self._turn()["reasoning_content"] = text


def unread_fields(items: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Unknown fields of valid items and of their parts."""
    with_parts = [item for item in items if item["type"] in ("message", "reasoning")]
    parts = [part for item in with_parts if isinstance(item.get("content"), list) for part in item["content"]]
    return (
        {name: value for item in items for name, value in item.items() if name not in _ITEM_FIELDS[item["type"]]},
        {name: value for part in parts for name, value in part.items() if name not in _PART_FIELDS},
    )


def chat_messages(items: Sequence[Mapping[str, Any]], *, stored: int, param: str = "input") -> list[dict[str, Any]]:
    """Messages of a chat from the result of `read_input`. The first `stored` items come from an earlier response.

    Raises:
        PromptError: names the item.
    """
    if len(items) > MAX_ITEMS:
        message = f"The conversation has more than {MAX_ITEMS} items."
        raise PromptError("previous_response_id", message, "array_above_max_length")
    messages = _Messages()
    for i, item in enumerate(items):
        messages.add(item, f"{param}[{i - stored}]" if i >= stored else "previous_response_id")
    return messages.messages


def _text(content: Any, path: str, kinds: Mapping[str, str] = _PART_TEXTS) -> str:
    """The text of a string or of text parts, which are joined by line breaks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        code = "missing_required_parameter" if content is None else "invalid_type"
        raise PromptError(path, f"`{path}` must be a string or a list of parts.", code)
    if len(content) > MAX_ITEMS:
        raise PromptError(path, f"`{path}` has more than {MAX_ITEMS} parts.", "array_above_max_length")
    return "\n".join(_part_text(part, f"{path}[{i}]", kinds) for i, part in enumerate(content))


def _part_text(part: Any, path: str, kinds: Mapping[str, str]) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds:
        message = f"`{path}.type`: only parts of type {', '.join(kinds)} are supported."
        raise PromptError(f"{path}.type", message, "unsupported_parameter")
    return required_string(part, kinds[kind], path)


def listed(item: Mapping[str, Any]) -> dict[str, Any]:
    """A stored item as `input_items` returns it: the content of a message is a list of parts."""
    content = item.get("content")
    if item["type"] != "message" or not isinstance(content, str):
        return dict(item)
    output = item.get("role") == "assistant"
    part: dict[str, Any] = {"type": "output_text" if output else "input_text", "text": content}
    return {"status": "completed", **item, "content": [part | ({"annotations": []} if output else {})]}
