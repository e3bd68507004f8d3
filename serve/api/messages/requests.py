"""Requests of Anthropic's API, and their messages in the form of chat."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from serve.api.requests import Count, OutputFields, Strings
from serve.text.chat import MAX_ITEMS, PromptError, required_string

_TEXT = {"type": "string"}
_BLOCK = {"type": "object", "properties": {"type": _TEXT}, "required": ["type"]}
_CONTENT = {"anyOf": [_TEXT, {"type": "array", "items": _BLOCK}]}
_MESSAGE = {
    "type": "object",
    "properties": {"role": {"enum": ["user", "assistant"]}, "content": _CONTENT},
    "required": ["role", "content"],
}
# Known fields of blocks, some of which change nothing.
_BLOCK_FIELDS = {
    "text": ("text", "citations", "logprobs", "parsed_output"),
    "thinking": ("thinking", "signature", "logprobs"),
    "tool_use": ("id", "name", "input", "caller", "logprobs", "call_logprobs"),
    "tool_result": ("tool_use_id", "content", "is_error"),
}


class _Options(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Thinking(_Options):
    """`thinking`. Adaptive: as the chat template has it."""

    type: Literal["disabled", "adaptive", "enabled"]
    budget_tokens: Annotated[Count, Field(ge=1)] | None = None  # of the type enabled
    display: Literal["summarized"] | None = None


class OutputFormat(_Options):
    """`output_config.format`."""

    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(_Options):
    """`output_config`."""

    format: OutputFormat | None = None
    effort: str | None = None  # variable of the chat template


class AnthropicTool(BaseModel):
    """An element of `tools`."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    @property
    def chat_form(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": function | {"strict": self.strict}}


class AnthropicToolChoice(_Options):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class MessagesPromptFields(BaseModel):
    """Fields that make up the prompt, which both endpoints have."""

    messages: Annotated[
        Any, WithJsonSchema({"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": MAX_ITEMS})
    ] = None
    system: Annotated[Any, WithJsonSchema(_CONTENT)] = None
    tools: Annotated[list[AnthropicTool], Field(fail_fast=True)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(OutputFields, MessagesPromptFields):
    """POST /v1/messages."""

    model_config = ConfigDict(json_schema_extra={"required": ["messages"]})

    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    stop_sequences: Strings | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None


class CountTokensRequest(MessagesPromptFields):
    """POST /v1/messages/count_tokens."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"required": ["messages"]})

    model: str | None = None


def chat_choice(choice: AnthropicToolChoice | None) -> dict[str, Any]:
    """`tool_choice` and `parallel_tool_calls` of a chat. Raise PromptError for a choice without a name."""
    if choice is None:
        return {}
    if (choice.name is None) == (choice.type == "tool"):
        message = "`tool_choice.name` is needed for the type tool, and for no other."
        raise PromptError("tool_choice.name", message)
    named = {"type": "function", "function": {"name": choice.name}}
    form = {"auto": "auto", "any": "required", "tool": named, "none": "none"}[choice.type]
    return {"tool_choice": form, "parallel_tool_calls": not choice.disable_parallel_tool_use}


def chat_messages(body: MessagesPromptFields) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages in the form of chat, and the unknown fields of their blocks.

    Raises:
        PromptError: names what is invalid.
    """
    reader = _Reader()
    messages: list[dict[str, Any]] = []
    if body.system is not None:
        messages.append({"role": "system", "content": reader.text(body.system, "system")})
    if not isinstance(body.messages, list) or not 1 <= len(body.messages) <= MAX_ITEMS:
        code = "invalid_type" if body.messages is not None else "missing_required_parameter"
        raise PromptError("messages", f"`messages` must be a list of 1 to {MAX_ITEMS} messages.", code)
    for i, message in enumerate(body.messages):
        messages += reader.message(message, f"messages[{i}]")
    return messages, reader.unread


class _Reader:
    """Reads messages in their order."""

    def __init__(self) -> None:
        self.unread: dict[str, Any] = {}
        self._call_ids: set[str] = set()

    def message(self, message: Any, path: str) -> list[dict[str, Any]]:
        """A message in the form of chat, after the results of tools that it contains."""
        if not isinstance(message, Mapping):
            raise PromptError(path, f"`{path}` must be an object.", "invalid_type")
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant"):
            raise PromptError(f"{path}.role", f"`{path}.role` must be user or assistant.")
        if isinstance(content, str):
            return [{"role": role, "content": content}]
        kinds = ("text", "tool_result") if role == "user" else ("text", "thinking", "tool_use")
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        results: list[dict[str, Any]] = []
        for block, block_path in self._blocks(content, f"{path}.content", kinds):
            match block["type"]:
                case "text":
                    texts.append(required_string(block, "text", block_path))
                case "thinking":
                    thoughts.append(required_string(block, "thinking", block_path))
                case "tool_use":
                    calls.append(self._call(block, block_path))
                case _:
                    results.append(self._result(block, block_path))
        form: dict[str, Any] = {"role": role, "content": "\n".join(texts) if texts or not calls else None}
        form |= {"tool_calls": calls} if calls else {}
        form |= {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
        return results + ([form] if texts or calls or thoughts or not results else [])

    def text(self, content: Any, path: str) -> str:
        """The text of a string or of text blocks, which are joined by line breaks."""
        if isinstance(content, str):
            return content
        return "\n".join(
            required_string(block, "text", where) for block, where in self._blocks(content, path, ("text",))
        )

    def _blocks(self, content: Any, path: str, kinds: Sequence[str]) -> list[tuple[Mapping[str, Any], str]]:
        if not isinstance(content, list):
            code = "missing_required_parameter" if content is None else "invalid_type"
            raise PromptError(path, f"`{path}` must be a string or a list of blocks.", code)
        if len(content) > MAX_ITEMS:
            raise PromptError(path, f"`{path}` has more than {MAX_ITEMS} blocks.", "array_above_max_length")
        blocks = [(block, f"{path}[{i}]") for i, block in enumerate(content)]
        for block, where in blocks:
            kind = block.get("type") if isinstance(block, Mapping) else None
            if not isinstance(kind, str) or kind not in kinds:
                message = f"`{where}.type`: only blocks of type {', '.join(kinds)} are supported here."
                raise PromptError(f"{where}.type", message, "unsupported_parameter")
            known = ("type", "cache_control", *_BLOCK_FIELDS[kind])
            self.unread |= {name: value for name, value in block.items() if name not in known}
        return blocks

    def _call(self, block: Mapping[str, Any], path: str) -> dict[str, Any]:
        call_id, name, arguments = (
            required_string(block, "id", path),
            required_string(block, "name", path),
            block.get("input"),
        )
        if not isinstance(arguments, dict):
            raise PromptError(f"{path}.input", f"`{path}.input` must be an object.", "invalid_type")
        self._call_ids.add(call_id)
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _result(self, block: Mapping[str, Any], path: str) -> dict[str, Any]:
        call_id = required_string(block, "tool_use_id", path)
        if call_id not in self._call_ids:
            message = f"`{path}.tool_use_id`: no tool_use before this block has the id {call_id[:100]!r}."
            raise PromptError(f"{path}.tool_use_id", message)
        content = block.get("content")
        text = "" if content is None else self.text(content, f"{path}.content")
        return {"role": "tool", "tool_call_id": call_id, "content": text}
