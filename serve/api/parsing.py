"""From the bytes of a request to a pydantic model, or to an APIError that names the field."""

import logging
from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import BaseModel, ValidationError

from serve.api.errors import APIError, invalid, unsupported
from serve.api.requests import ChatPromptFields

logger = logging.getLogger(__name__)

_MAX_CONTAINERS = 1 << 20  # arrays and objects of a body, counted by brackets; each takes 100 bytes or more
_MAX_LEVELS = 64  # of nested containers: templates, logs and libraries recurse over them
_MAX_UNKNOWN = 1000  # names of unknown fields that are logged, so that clients cannot fill the memory

# Known fields that are not implemented -> values without effect; null never has one. Any other value is an error.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "tools": (),
    "tool_choice": ("none",),
    "functions": (),
    "function_call": ("none",),
    "use_beam_search": (False,),
    "suffix": ("",),
    "prompt_embeds": (),
    "logits_processors": ([],),
    "typical_p": (1,),
    "vllm_xargs": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "kv_transfer_params": (),
    "thinking_token_budget": (),
    "repetition_detection": (),
}
# Known fields that concern the caller or the transport and never change an answer: accepted and ignored.
WITHOUT_EFFECT = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "parallel_tool_calls",
        "include_reasoning",
        "spaces_between_special_tokens",
        "session_id",
        "stream_interval",
        "verbosity",
    )
)


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        APIError: 400 for invalid JSON, another type, or too many containers.
    """
    if body.count(b"[") + body.count(b"{") > _MAX_CONTAINERS:
        message = f"The body has more than {_MAX_CONTAINERS} arrays and objects."
        raise APIError(400, message, None, "invalid_json")
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        reason = str(error).split(":")[0]
        raise APIError(400, f"The body is not valid JSON: {reason}.", None, "invalid_json") from None
    if not isinstance(data, dict):
        raise APIError(400, "The body must be a JSON object.", None, "invalid_json")
    return data


def validate[M: BaseModel](kind: type[M], data: dict[str, Any], unknown_fields: set[str]) -> M:
    """Read a JSON object into a request model. The name of an unknown field is logged once and added to the set.

    Raises:
        APIError: 400 that names the first invalid or unsupported field.
    """
    try:
        parsed = kind.model_validate(data)
    except ValidationError as error:
        raise _from_pydantic(error) from None
    if isinstance(parsed, ChatPromptFields):
        _check_levels({"chat_template_kwargs": parsed.chat_template_kwargs, "documents": parsed.documents})
        for i, message in enumerate(parsed.messages or ()):
            _check_levels({"content": message.content, **(message.model_extra or {})}, f"messages[{i}].")
    _check_extra(parsed.model_extra or {}, unknown_fields)
    return parsed


def _check_extra(fields: Mapping[str, Any], unknown_fields: set[str]) -> None:
    """Refuse fields that no model declares if they would change the answer, and log unknown ones."""
    for name, value in fields.items():
        if value is not None and value not in UNSUPPORTED.get(name, (value,)):
            raise unsupported(name)
    _check_levels(fields)
    for name in fields:
        is_known = name in UNSUPPORTED or name in WITHOUT_EFFECT or name in unknown_fields
        if not is_known and len(unknown_fields) < _MAX_UNKNOWN:
            unknown_fields.add(name)
            logger.warning("unknown request field %.100r is ignored", name)


def _check_levels(fields: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse free-form values that are nested too deeply; `prefix` is prepended to the names in `param`."""
    for name, value in fields.items():
        if _too_deep(value):
            param = prefix + name[:100]
            raise invalid(param, f"`{param}` is nested more than {_MAX_LEVELS} levels deep.")


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_LEVELS + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return False
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
    return True


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
    """OpenAI's notation of a location: "messages[0].role". The names that pydantic adds for unions are left out."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part != "str" and not part.startswith(("list[", "dict[")):
            text += f".{part}" if text else part
    return text
