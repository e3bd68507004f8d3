"""Request of POST /v1/responses."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from serve.api.requests import Count, OutputFields, Strings
from serve.grammar.fields import StructuredOutputs
from serve.text.chat import MAX_ITEMS

LOGPROBS = "message.output_text.logprobs"
_Includable = Literal[
    "message.output_text.logprobs",
    # About items that this server never makes.
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]
_ITEM = {"type": "object", "description": "a message, a function call or its output, or reasoning"}
_INPUT = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM, "minItems": 1, "maxItems": MAX_ITEMS}],
    "description": "a text, or a list of items",
}
_TOOL_CHOICE = {
    "anyOf": [{"type": "string", "enum": ["none", "auto", "required"]}, {"type": "object"}],
    "description": "or an object that names a function or allowed functions",
}
_FORMAT = {
    "type": "object",
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "name": {"type": "string"},
        "schema": {"type": "object"},
        "strict": {"type": "boolean"},
    },
    "required": ["type"],
}
_METADATA = {"type": "object", "maxProperties": 16, "additionalProperties": {"type": "string", "maxLength": 512}}


class _Options(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class TextOptions(_Options):
    """`text`."""

    format: Annotated[dict[str, Any], WithJsonSchema(_FORMAT)] | None = None
    verbosity: Literal["medium"] | None = None

    @property
    def chat_form(self) -> dict[str, Any] | None:
        """`response_format` of a chat."""
        if self.format is None or self.format.get("type") != "json_schema":
            return self.format
        return {"type": "json_schema", "json_schema": {k: v for k, v in self.format.items() if k != "type"}}


class ReasoningOptions(_Options):
    """`reasoning`."""

    effort: str | None = None  # variable of the chat template


class ResponseStreamOptions(_Options):
    """`stream_options`."""

    include_obfuscation: bool | None = None  # has no effect


class ResponsesTool(BaseModel):
    """An element of `tools`."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def chat_form(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function | {"strict": self.strict}}


class ResponsesRequest(OutputFields):
    """POST /v1/responses."""

    model_config = ConfigDict(json_schema_extra={"required": ["input"]})

    input: Annotated[Any, WithJsonSchema(_INPUT)] = None
    instructions: str | None = None
    stop: str | Strings | None = None
    max_output_tokens: Annotated[Count, Field(ge=1)] | None = None
    include: list[_Includable] | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    text: TextOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: Annotated[list[ResponsesTool], Field(fail_fast=True)] | None = None
    tool_choice: Annotated[Any, WithJsonSchema(_TOOL_CHOICE)] = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, Any], WithJsonSchema(_METADATA)] | None = None  # checked later: keys are the client's
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def chat_choice(choice: Any) -> Any:
    """`tool_choice` of a chat. A value of another form stays as it is, and is refused by its check."""
    match choice:
        case {"type": "function", "name": name}:
            return _named(name)
        case {"type": "allowed_tools", "mode": mode, "tools": [*tools]}:
            forms = [
                _named(tool["name"])
                if isinstance(tool, dict) and "name" in tool and tool.get("type") == "function"
                else tool
                for tool in tools
            ]
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": forms}}
        case {"type": "allowed_tools" | "function"}:
            return {"type": "none"}
    return choice


def _named(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}
