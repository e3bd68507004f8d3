"""Request of POST /v1/responses."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from serve.api.requests import Count, OutputFields, Strings
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
_METADATA = {"type": "object", "maxProperties": 16, "additionalProperties": {"type": "string", "maxLength": 512}}


class _Options(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class TextFormat(_Options):
    """`text.format`."""

    type: Literal["text"]


class TextOptions(_Options):
    """`text`."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(_Options):
    """`reasoning`."""

    effort: str | None = None  # variable of the chat template


class ResponseStreamOptions(_Options):
    """`stream_options`."""

    include_obfuscation: bool | None = None  # has no effect


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
    reasoning: ReasoningOptions | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, Any], WithJsonSchema(_METADATA)] | None = None  # checked later: keys are the client's
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
