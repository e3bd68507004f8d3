"""Request bodies as pydantic models, and the one way from bytes to a model or an APIError that names the field."""

from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from serve.api.errors import APIError, invalid
from serve.api.known_fields import FieldLog, check_extra
from serve.api.nesting import check_levels
from serve.config.config import LogprobsMode
from serve.config.generation_config import SamplingFields
from serve.text.chat import MAX_ITEMS, ROLES

_INT64 = 2**63
_DAY = 86400
_MAX_VALUES = 1 << 20  # lists and objects of a body, told by their brackets: each takes a hundred bytes and more

Count = Annotated[int, Field(ge=0, lt=_INT64)]
TokenId = Count
_TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
_Strings = Annotated[list[str], Field(fail_fast=True)]

_BIAS = {"type": "number", "minimum": -100, "maximum": 100}


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(SamplingFields):
    """What chat and completions have in common. None always means the default."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    best_of: int | None = None  # only the value of `n`
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: str | None = None
    timeout: Annotated[float, Field(gt=0, le=_DAY)] | None = None  # seconds
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    logit_bias: dict[str, Annotated[Any, WithJsonSchema(_BIAS)]] | None = None  # read by hand, as the ids are keys
    allowed_token_ids: _TokenIds | None = None
    bad_words: _Strings | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: str | _Strings | None = None
    stop_token_ids: _TokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1)] | None = None
    prompt_logprobs_start: Count | None = None
    prompt_logprobs_format: Literal["entries", "columns"] | None = None
    prompt_logprob_token_ids: _TokenIds | None = None
    logprob_token_ids: _TokenIds | None = None
    logprobs_mode: LogprobsMode | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=_INT64)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    request_id: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,200}$")] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    echo: bool | None = None

    def forget_texts(self) -> None:
        """Drops what prompts were made from, and fields that mean nothing: they may be large, and answers take long."""
        (self.model_extra or {}).clear()
        for name in ("prompt", "messages", "prompt_token_ids", "documents", "chat_template", "chat_template_kwargs"):
            if name in type(self).model_fields:
                setattr(self, name, None)


_PROMPT = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}},
    ],
    "description": "a text, token ids, or a list of either",
}


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. `prompt` is read by hand: a list of many ids needs one fast pass and one short error."""

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
    """One message. Fields that templates know, such as `name`, pass through."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, WithJsonSchema({"type": "string", "enum": list(ROLES)})]
    content: str | Annotated[list[Annotated[dict[str, Any], WithJsonSchema(_PART)]], Field(fail_fast=True)] | None = (
        None
    )


class ChatPromptFields(BaseModel):
    """What a chat's prompt is made of; /tokenize takes it, too."""

    messages: (
        Annotated[list[ChatMessage], Field(fail_fast=True, max_length=MAX_ITEMS, json_schema_extra={"minItems": 1})]
        | None
    ) = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None  # honoured where the server trusts requests
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_ITEMS)] | None = None
    reasoning_effort: str | None = None


class ChatCompletionRequest(GenerationRequest, ChatPromptFields):
    """POST /v1/chat/completions. The prompt is what the template makes of `messages`, or ids that say it themselves."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["messages"]}, {"required": ["prompt_token_ids"]}]}
    )

    prompt_token_ids: Annotated[list[TokenId], Field(fail_fast=True, json_schema_extra={"minItems": 1})] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Count | None = None
    return_prompt_text: bool | None = None


def parse[M: BaseModel](kind: type[M], body: bytes, log: FieldLog) -> M:
    """Reads a body into a request model.

    Raises:
        APIError: 400 that names the first wrong field, or the field that is not supported.
    """
    return validated(kind, json_object(body), log)


def json_object(body: bytes) -> dict[str, Any]:
    """A body's JSON.

    Raises:
        APIError: 400 where it is no JSON object, or one of too many parts.
    """
    if body.count(b"[") + body.count(b"{") > _MAX_VALUES:
        raise APIError(400, f"The body holds more than {_MAX_VALUES} brackets.", None, "invalid_json")
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        reason = str(error).split(":")[0]
        raise APIError(400, f"The body is not valid JSON: {reason}.", None, "invalid_json") from None
    if not isinstance(data, dict):
        raise APIError(400, "The body must be a JSON object.", None, "invalid_json")
    return data


def validated[M: BaseModel](kind: type[M], data: dict[str, Any], log: FieldLog) -> M:
    """Reads JSON into a request model; raises as `parse` does."""
    try:
        parsed = kind.model_validate(data)
    except ValidationError as error:
        raise _from_pydantic(error) from None
    if isinstance(parsed, ChatPromptFields):
        check_levels({"chat_template_kwargs": parsed.chat_template_kwargs, "documents": parsed.documents})
        for i, message in enumerate(parsed.messages or ()):
            check_levels({"content": message.content, **(message.model_extra or {})}, f"messages[{i}].")
    check_extra(parsed.model_extra or {}, log)
    return parsed


_BOUNDS = {
    "greater_than_equal": ("ge", "below_min_value"),
    "greater_than": ("gt", "below_min_value"),
    "less_than_equal": ("le", "above_max_value"),
    "less_than": ("lt", "above_max_value"),
}


def _from_pydantic(error: ValidationError) -> APIError:
    first = error.errors(include_url=False, include_input=False)[0]
    kind = first["type"]
    param = _location(first["loc"])
    if kind == "missing":
        code = "missing_required_parameter"
    elif kind in _BOUNDS:
        bound, suffix = _BOUNDS[kind]
        code = f"{'decimal' if isinstance(first['ctx'][bound], float) else 'integer'}_{suffix}"
    elif kind == "too_long":
        code = "array_above_max_length"
    else:
        code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    return invalid(param, f"`{param}`: {first['msg']}.", code)


def _location(parts: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") as OpenAI writes it; the names of union members that pydantic adds are left out."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in ("str", "list[str]", "list[dict[str,any]]") and not part.startswith(("list[", "dict[")):
            text += f".{part}" if text else part
    return text
