"""Schemas of the answers of Anthropic's API, for /openapi.json and the tests."""

from typing import Annotated, Any, Literal

from pydantic import Field

from serve.api.reply import CallLogprobs
from serve.api.responses import Answer, TokenEntry
from serve.config.config import LogprobsMode

_Logprobs = Annotated[list[TokenEntry], Field(description="of all tokens of the block; not part of Anthropic's API")]
_CallLogprobs = Annotated[CallLogprobs, Field(description="of a complete call; not part of Anthropic's API")]
_StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextBlock(Answer):
    type: Literal["text"]
    text: str
    logprobs: _Logprobs | None = None


class ThinkingBlock(Answer):
    type: Literal["thinking"]
    thinking: str
    signature: Literal[""]
    logprobs: _Logprobs | None = None


class ToolUseBlock(Answer):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    logprobs: _Logprobs | None = None
    call_logprobs: _CallLogprobs | None = None


type Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]


class MessagesUsage(Answer):
    input_tokens: Annotated[int, Field(description="prompt tokens that were not cached")]
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    system_fingerprint: str | None
    logprobs_mode: LogprobsMode | None = None
    content: list[Block]
    stop_reason: _StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage
    warnings: list[str] | None = None


class MessageDelta(Answer):
    """`delta`: of a block, or of the message at its end."""

    type: Literal["text_delta", "thinking_delta", "input_json_delta"] | None = None
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    stop_reason: _StopReason | None = None
    stop_sequence: str | None = None


class MessageErrorDetail(Answer):
    type: str
    message: str
    details: dict[Literal["error_code", "param"], str | None]


class MessageErrorAnswer(Answer):
    """Anthropic's envelope."""

    type: Literal["error"]
    error: MessageErrorDetail


class MessageEvent(Answer):
    """An event of a streamed message. Its fields depend on its type."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]
    message: MessageAnswer | None = None
    index: int | None = None
    content_block: Block | None = None
    delta: MessageDelta | None = None
    usage: MessagesUsage | None = None
    logprobs: _Logprobs | None = None
    call_logprobs: _CallLogprobs | None = None
    error: MessageErrorDetail | None = None


class TokenCount(Answer):
    input_tokens: int
