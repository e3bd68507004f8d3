"""From the JSON of a request to a pydantic model, or to an APIError that names the field."""

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic import BaseModel, ValidationError

from serve.api.errors import APIError, invalid, unsupported
from serve.api.requests import (
    ChatCompletionRequest,
    ChatPromptFields,
    CompletionRequest,
    GenerationRequest,
    RequestFields,
    StreamOptions,
)
from serve.api.unsupported_fields import UNSUPPORTED, WITHOUT_EFFECT
from serve.grammar.fields import GrammarAliases
from serve.jobs.score import is_huge_integer

logger = logging.getLogger(__name__)

# Large fields of a request that are not needed once it is tokenized.
PROMPT_FIELDS = (
    *("prompt", "messages", "prompt_token_ids", "documents", "chat_template", "chat_template_kwargs"),
    *("tools", "tool_choice"),
)

_MAX_LEVELS = 64  # of nested containers: templates, logs and libraries recurse over them
_MAX_UNKNOWN = 1000  # names of unknown fields that are logged, so that clients cannot fill the memory
_MAX_COMPARED = 32  # unknown fields of a body that are compared with ours, and characters of such a name
_SIMILARITY = 0.88  # of an unknown field and one of ours, from which on it is taken for a misspelling

_GENERATION_FIELDS = ChatCompletionRequest.model_fields.keys() | CompletionRequest.model_fields.keys()


def validate[M: BaseModel](kind: type[M], data: dict[str, Any], unknown_fields: set[str]) -> M:
    """Read a JSON object into a request model. The name of an unknown field is logged once and added to the set.

    Raises:
        APIError: 400 that names the first invalid or unsupported field.
    """
    try:
        parsed = kind.model_validate(data)
    except ValidationError as error:
        raise _from_pydantic(error) from None
    extra = parsed.model_extra or {}
    if isinstance(parsed, ChatPromptFields):
        check_levels({"chat_template_kwargs": parsed.chat_template_kwargs, "documents": parsed.documents})
        check_levels({"tools": data.get("tools"), "tool_choice": parsed.tool_choice})
        for i, message in enumerate(parsed.messages or ()):
            check_levels({"content": message.content, **(message.model_extra or {})}, f"messages[{i}].")
        parts = [
            part for message in parsed.messages or () if isinstance(message.content, list) for part in message.content
        ]
        check_extra(_others(parts), (), unknown_fields, "messages[].content[].")
        for tool in parsed.tools or ():
            for path, part in (("", tool), ("function.", tool.function), ("custom.", tool.custom)):
                if part is not None:
                    check_extra(part.model_extra or {}, type(part).model_fields, unknown_fields, f"tools[].{path}")
    if isinstance(parsed, RequestFields):
        for name, value in extra.items():
            if value is not None and name in _GENERATION_FIELDS:
                raise unsupported(name, f"`{name}` is not a field of this endpoint.")
    if isinstance(parsed, GenerationRequest) and (options := parsed.stream_options) is not None:
        check_extra(options.model_extra or {}, StreamOptions.model_fields, unknown_fields, "stream_options.")
    check_extra(extra, kind.model_fields, unknown_fields)
    return parsed


def _others(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of text parts that are not read."""
    return {name: part[name] for part in parts for name in part.keys() - {"type", "text", "refusal"}}


def check_extra(fields: Mapping[str, Any], known: Iterable[str], unknown_fields: set[str], prefix: str = "") -> None:
    """Refuse fields that would change the answer and misspellings of `known` ones, and log unknown ones.

    `prefix` is the path of the object that has the fields.
    """
    fields = {prefix + name: value for name, value in fields.items()}
    for name, value in fields.items():
        if value is not None and value not in UNSUPPORTED.get(name, (value,)):
            raise unsupported(name)
    check_levels(fields)
    unknown = [name for name in fields if name not in UNSUPPORTED and name not in WITHOUT_EFFECT]
    for name in islice((name for name in unknown if fields[name] is not None), _MAX_COMPARED):
        if suggestion := _suggestion(name.removeprefix(prefix), known):
            raise unsupported(name[:100], f"`{name[:100]}` is not a field{suggestion}")
    for name in unknown:
        if name not in unknown_fields and len(unknown_fields) < _MAX_UNKNOWN:
            unknown_fields.add(name)
            logger.warning("unknown request field %.100r is ignored", name)


def _suggestion(name: str, fields: Iterable[str]) -> str:
    """The end of an error message that suggests the field most similar to `name`; empty without a similar one."""
    if len(name) > _MAX_COMPARED:
        return ""
    spellings = {_spelling(field): field for field in fields}
    nearest = difflib.get_close_matches(_spelling(name), spellings, 1, _SIMILARITY)
    return f"; did you mean `{spellings[nearest[0]]}`?" if nearest else ""


def _spelling(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def check_levels(fields: Mapping[str, Any], prefix: str = "") -> None:
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


# Error of pydantic -> its bound, that bound in words, and the end of the error code.
_BOUNDS = {
    "greater_than_equal": ("ge", "at least", "below_min_value"),
    "greater_than": ("gt", "above", "below_min_value"),
    "less_than_equal": ("le", "at most", "above_max_value"),
    "less_than": ("lt", "below", "above_max_value"),
}


def _from_pydantic(error: ValidationError) -> APIError:
    first = _nearest(error.errors(include_url=False))
    kind, value = first["type"], first["input"]
    param, message = _location(first["loc"]), f"{first['msg']}."
    if kind == "missing":
        code = "missing_required_parameter"
    elif kind in _BOUNDS:
        bound, words, suffix = _BOUNDS[kind]
        limit = first["ctx"][bound]
        number, shown = ("decimal", f"{limit:g}") if isinstance(limit, float) else ("integer", str(limit))
        code, message = f"{number}_{suffix}", f"{value} is out of range; it must be {words} {shown}."
    elif kind.startswith("int_") and is_huge_integer(value):
        code = "integer_above_max_value" if value > 0 else "integer_below_min_value"
        message = f"{int(value)} is out of range; it does not fit into 64 bits."
    elif kind == "too_long":
        code = "array_above_max_length"
    else:
        code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    return invalid(param, f"`{param}`: {message}", code)


def _nearest(errors: Sequence[Any]) -> Any:
    """The first error; of those about the alternatives of a union, the one deepest inside the value."""
    field = _location(errors[0]["loc"])
    return max(
        (e for e in errors if _location(e["loc"]).startswith(field)), key=lambda e: _location(e["loc"]).count("[")
    )


def _location(parts: tuple[int | str, ...]) -> str:
    """OpenAI's notation of a location: "messages[0].role". The names that pydantic adds for unions are left out."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part != "str" and not part.startswith(("list[", "dict[")):
            text += f".{part}" if text else part
    return text


def release_texts(body: GenerationRequest) -> None:
    """Free the prompts' sources and unknown fields: they may be large, and generation takes long."""
    (body.model_extra or {}).clear()
    for name in (*PROMPT_FIELDS, *GrammarAliases.model_fields):
        if name in type(body).model_fields:
            setattr(body, name, None)
