"""Request bodies as pydantic models. `serve.api.parsing` reads them from bytes."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from serve.config.config import LogprobsMode
from serve.config.generation_config import SamplingFields
from serve.grammar.fields import GrammarAliases
from serve.text.chat import MAX_ITEMS, ROLES
from serve.tools.definitions import ToolField

_INT64 = 2**63
_DAY = 86400

Count = Annotated[int, Field(ge=0, lt=_INT64)]
TokenId = Count
_TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
_TokenIdLists = Annotated[list[_TokenIds], Field(fail_fast=True)]
Strings = Annotated[list[str], Field(fail_fast=True)]
RequestId = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,200}$")]

_BIAS = {"type": "number", "minimum": -100, "maximum": 100}


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class RequestFields(BaseModel):
    """Fields that all requests to the engine share. null always means the default."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: str | None = None
    timeout: Annotated[float, Field(gt=0, le=_DAY)] | None = None  # seconds


class OutputFields(SamplingFields, RequestFields):
    """Fields about the generated tokens that all generating endpoints share."""

    min_tokens: Count | None = None
    logit_bias: dict[str, Annotated[Any, WithJsonSchema(_BIAS)]] | None = None  # checked later: the ids are keys
    allowed_token_ids: _TokenIds | None = None
    bad_words: Strings | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop_token_ids: _TokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    logprob_token_ids: _TokenIds | None = None
    logprobs_mode: LogprobsMode | None = None
    return_tokens_as_token_ids: bool | None = None
    return_processed_logprobs: bool | None = None


class GenerationRequest(OutputFields, GrammarAliases):
    """Fields that chat and completions share."""

    model_config = ConfigDict(extra="allow")

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    best_of: int | None = None  # must equal `n`
    max_tokens: Count | None = None
    stop: str | Strings | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1)] | None = None
    prompt_logprobs_start: Count | None = None
    prompt_logprobs_format: Literal["entries", "columns"] | None = None
    prompt_logprob_token_ids: _TokenIds | None = None
    grammar_start: Count | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=_INT64)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    request_id: RequestId | None = None
    return_token_ids: bool | None = None
    return_routed_experts: bool | None = None
    routed_experts_prompt_start: Count | None = None
    echo: bool | None = None


_PROMPT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}},
    ],
    "description": "a text, a list of token ids, or a list of either",
}


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. `prompt` is checked by the handler: faster for long lists of ids, with one short error."""

    model_config = ConfigDict(json_schema_extra={"required": ["prompt"]})

    prompt: Annotated[Any, WithJsonSchema(_PROMPT)] = None
    add_special_tokens: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}


class ChatMessage(BaseModel):
    """A message. Other fields, such as `name`, are passed to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, WithJsonSchema({"type": "string", "enum": list(ROLES)})]
    content: str | Annotated[list[Annotated[dict[str, Any], WithJsonSchema(_PART)]], Field(fail_fast=True)] | None = (
        None
    )


_Budget = Annotated[int, Field(ge=-1, lt=_INT64)]  # -1: none
_TOOL_CHOICE = {
    "anyOf": [{"type": "string", "enum": ["none", "auto", "required"]}, {"type": "object"}],
    "description": "or an object that names a tool or allowed tools",
}


class ChatPromptFields(BaseModel):
    """Fields that make up a chat's prompt, shared with /tokenize."""

    messages: (
        Annotated[list[ChatMessage], Field(fail_fast=True, max_length=MAX_ITEMS, json_schema_extra={"minItems": 1})]
        | None
    ) = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None  # needs --trust-request-chat-template
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[ToolField], Field(fail_fast=True, json_schema_extra={"minItems": 1})] | None = None
    tool_choice: Annotated[Any, WithJsonSchema(_TOOL_CHOICE)] = None
    parallel_tool_calls: bool | None = None
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_ITEMS)] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None


class ChatCompletionRequest(GenerationRequest, ChatPromptFields):
    """POST /v1/chat/completions. The prompt is `messages` rendered by the chat template, or `prompt_token_ids`."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["messages"]}, {"required": ["prompt_token_ids"]}]}
    )

    prompt_token_ids: Annotated[list[TokenId], Field(fail_fast=True, json_schema_extra={"minItems": 1})] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Count | None = None
    return_prompt_text: bool | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    reasoning_format: Literal["none", "auto", "deepseek"] | None = None
    thinking_token_budget: _Budget | None = None
    max_thinking_tokens: _Budget | None = None
    reasoning_budget_tokens: _Budget | None = None
    thinking_budget: _Budget | None = None


class ScoreRequest(RequestFields):
    """POST /v1/score."""

    query: str | _TokenIds | None = None  # precedes each item; none by default
    items: str | Strings | _TokenIdLists
    label_token_ids: _TokenIds | _TokenIdLists  # for all items, or one list per item
    apply_softmax: bool | None = None
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    item_first: bool | None = None
    return_token_logprobs: bool | None = None


class GenerativeScoringRequest(RequestFields):
    """POST /generative_scoring."""

    query: str | _TokenIds
    items: Strings | _TokenIdLists
    label_token_ids: _TokenIds
    apply_softmax: bool | None = None
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # not part of vLLM's API
    item_first: bool | None = None
    add_special_tokens: bool | None = None
    return_token_logprobs: bool | None = None
    request_id: RequestId | None = None
