"""Schemas of the answers of OpenAI's Responses API, for /openapi.json and the tests."""

from typing import Annotated, Any, Literal

from pydantic import Field

from serve.api.reply import CallLogprobs
from serve.api.responses import Answer, TokenEntry
from serve.config.config import LogprobsMode

_Status = Literal["in_progress", "completed", "incomplete"]
_Logprobs = Annotated[list[TokenEntry], Field(description="of all tokens of the item; not part of OpenAI's API")]


class OutputText(Answer):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenEntry]


class ReasoningText(Answer):
    type: Literal["reasoning_text"]
    text: str


class MessageItem(Answer):
    type: Literal["message"]
    id: str
    status: _Status
    role: Literal["assistant"]
    content: list[OutputText]


class ReasoningItem(Answer):
    type: Literal["reasoning"]
    id: str
    status: _Status
    summary: list[Any]
    content: list[ReasoningText]
    logprobs: _Logprobs | None = None


class FunctionCallItem(Answer):
    type: Literal["function_call"]
    id: str
    status: _Status
    call_id: str
    name: str
    arguments: str
    logprobs: _Logprobs | None = None
    call_logprobs: Annotated[CallLogprobs | None, Field(description="of a complete call; not part of OpenAI's API")] = (
        None
    )


type OutputItem = Annotated[MessageItem | ReasoningItem | FunctionCallItem, Field(discriminator="type")]


class InputTokenDetails(Answer):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokenDetails(Answer):
    reasoning_tokens: int


class ResponsesUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokenDetails
    output_tokens: int
    output_tokens_details: OutputTokenDetails
    total_tokens: int


class IncompleteDetails(Answer):
    reason: Literal["max_output_tokens"]


class ReasoningAnswer(Answer):
    effort: str | None
    summary: None


class ResponsesAnswer(Answer):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    system_fingerprint: str | None
    logprobs_mode: LogprobsMode | None = None
    status: _Status
    background: Literal[False]
    completed_at: int | None
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningAnswer
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponsesUsage | None
    user: str | None
    warnings: list[str] | None = None


class ResponsesEvent(Answer):
    """An event of a streamed response. Its fields depend on its type."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "error",
    ]
    sequence_number: int
    response: ResponsesAnswer | None = None
    output_index: int | None = None
    content_index: int | None = None
    item_id: str | None = None
    item: OutputItem | None = None
    part: OutputText | None = None
    delta: str | None = None
    text: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[TokenEntry] | None = None
    code: str | None = None
    message: str | None = None
    param: str | None = None


class DeletedResponse(Answer):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItems(Answer):
    """A page of input items."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
