"""Requests of POST /v1/decisions and /v1/systemone. `serve.text.decisions` checks their questions, input and state."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from serve.api.requests import RequestFields
from serve.text.decisions.questions import MAX_LEVELS, MAX_OPTIONS, MAX_ORDERS, MAX_QUESTIONS

_TEXT = {"type": "string"}
_CONTENT = {"anyOf": [_TEXT, {"type": "object"}, {"type": "array"}]}  # of TypeSafe
_LABELS = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}], "description": "texts whose tokens are read"}


def _object(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*required]}


def _typed(kind: str, *required: str, **properties: Any) -> dict[str, Any]:
    return _object(("type", *required), type={"const": kind}, **properties)


def _array(items: dict[str, Any], **bounds: int) -> dict[str, Any]:
    return {"type": "array", "items": items, **bounds}


def _text_or(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [_TEXT, _array(parts[0] if len(parts) == 1 else {"anyOf": [*parts]})]}


_INPUT_TEXT = _typed("input_text", "text", text=_TEXT)
_INPUT_JSON = _typed("input_json", "data", data={"anyOf": [{"type": "object"}, _array({"type": "object"})]})
_OUTPUT = (_typed("output_text", "text", text=_TEXT), _typed("refusal", "refusal", refusal=_TEXT))
_MESSAGES = {
    ("user",): _text_or(_INPUT_TEXT, _INPUT_JSON),
    ("developer", "system"): _text_or(_INPUT_TEXT),
    ("assistant",): _text_or(*_OUTPUT),
}
_ITEMS = [
    *(
        _object(("role", "content"), type={"const": "message"}, role={"enum": [*roles]}, content=content)
        for roles, content in _MESSAGES.items()
    ),
    _typed("function_call", "call_id", "name", "arguments", call_id=_TEXT, name=_TEXT, arguments=_TEXT),
    _typed("custom_tool_call", "call_id", "name", "input", call_id=_TEXT, name=_TEXT, input=_TEXT),
    *(
        _typed(f"{call}_output", "call_id", "output", call_id=_TEXT, output=_text_or(_INPUT_TEXT))
        for call in ("function_call", "custom_tool_call")
    ),
]
_INPUT = {"anyOf": [_TEXT, _array({"anyOf": _ITEMS}, minItems=1)], "description": "what the questions are about"}

_ASKED: dict[str, Any] = {"name": _TEXT, "instructions": _text_or(_INPUT_TEXT, _INPUT_JSON)}
_CHOICE = _object(("value",), value={"anyOf": [_TEXT, {"type": "boolean"}]}, description=_TEXT, labels=_LABELS)
_LEVEL = _object(("label",), label=_TEXT, description=_TEXT, labels=_LABELS)
_NOUL_LABELS = _object((), true=_LABELS, false=_LABELS)
_OPENAI_QUESTION = {
    "anyOf": [
        _typed("predicate", "instructions", **_ASKED, labels=_NOUL_LABELS),
        _typed(
            "choice", "instructions", "choices", **_ASKED, choices=_array(_CHOICE, minItems=2, maxItems=MAX_OPTIONS)
        ),
        _typed("score", "instructions", "levels", **_ASKED, levels=_array(_LEVEL, minItems=2, maxItems=MAX_LEVELS)),
    ]
}
_TYPESAFE_QUESTION = {
    "anyOf": [
        _typed("noul", instructions=_CONTENT, criteria=_object((), true=_CONTENT, false=_CONTENT), labels=_NOUL_LABELS),
        _typed(
            "choice",
            "criteria",
            instructions=_CONTENT,
            criteria={
                "type": "object",
                "additionalProperties": {"anyOf": [*_CONTENT["anyOf"], {"type": "null"}]},
                "minProperties": 1,
                "maxProperties": MAX_OPTIONS,
            },
            labels={"type": "object", "additionalProperties": _LABELS},
        ),
        _typed(
            "score",
            "criteria",
            instructions=_CONTENT,
            criteria=_array(_CONTENT, minItems=1, maxItems=MAX_LEVELS),
            labels=_array(_LABELS),
        ),
    ]
}


class PromptCacheOptions(BaseModel):
    """`prompt_cache_options`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m"] | None = None


class DecisionFields(RequestFields):
    """Fields that both forms share. They are not part of either API, except `temperature`."""

    scoring: Literal["labels", "sequences", "permutations"] | None = None
    normalize: Literal["sum", "token", "byte", "pmi"] | None = None
    permutations: Annotated[int, Field(ge=1, le=MAX_ORDERS)] | None = None
    temperature: Annotated[float, Field(ge=1e-3, le=1000)] | None = None
    return_token_ids: bool | None = None


class DecisionsRequest(DecisionFields):
    """POST /v1/decisions."""

    model_config = ConfigDict(json_schema_extra={"required": ["input", "questions"]})

    input: Annotated[Any, WithJsonSchema(_INPUT)] = None
    questions: Annotated[Any, WithJsonSchema(_array(_OPENAI_QUESTION, minItems=1, maxItems=MAX_QUESTIONS))] = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    safety_identifier: Annotated[str, Field(max_length=128)] | None = None


class SystemOneRequest(DecisionFields):
    """POST /v1/systemone."""

    model_config = ConfigDict(json_schema_extra={"required": ["state", "questions"]})

    state: Annotated[Any, WithJsonSchema(_CONTENT)] = None
    questions: Annotated[
        Any,
        WithJsonSchema(
            {
                "type": "object",
                "additionalProperties": _TYPESAFE_QUESTION,
                "minProperties": 1,
                "maxProperties": MAX_QUESTIONS,
            }
        ),
    ] = None
