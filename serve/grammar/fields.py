"""Fields of requests that state a grammar: those of OpenAI, vLLM, SGLang and llama.cpp."""

import asyncio
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypedDict

from pydantic import BaseModel, ConfigDict, WithJsonSchema

from serve.grammar.compiler import GrammarCompiler
from serve.grammar.json_schema import GrammarError
from serve.grammar.masks import LlguidanceGrammar, ResumedGrammar
from serve.grammar.spec import GrammarKind, GrammarSpec
from serve.text.chat import PromptError

_SCHEMA = {"anyOf": [{"type": "object"}, {"type": "string"}], "description": "a JSON schema, or its text"}
_TAG = {"anyOf": [{"type": "object"}, {"type": "string"}], "description": "a structural tag, or its text"}
_TYPES = ("text", "json_object", "json_schema", "structural_tag")
_RESPONSE_FORMAT = {
    "type": "object",
    "properties": {
        "type": {"enum": list(_TYPES)},
        "json_schema": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "schema": {"type": "object"}, "strict": {"type": "boolean"}},
        },
    },
    "required": ["type"],
}
_JSON_OBJECT = '{"type": "object"}'
_FORMAT_KEYS: dict[str, tuple[str, ...]] = {"text": (), "json_object": ("schema",), "json_schema": ("json_schema",)}
_SCHEMA_KEYS = ("name", "description", "schema", "strict")
# Field of a request, or of `structured_outputs` -> kind of its value.
_FIELDS = {
    "json_schema": GrammarKind.JSON_SCHEMA,
    "regex": GrammarKind.REGEX,
    "ebnf": GrammarKind.GRAMMAR,
    "grammar": GrammarKind.GRAMMAR,
    "structural_tag": GrammarKind.STRUCTURAL_TAG,
    "guided_json": GrammarKind.JSON_SCHEMA,
    "guided_regex": GrammarKind.REGEX,
    "guided_choice": GrammarKind.CHOICE,
    "guided_grammar": GrammarKind.GRAMMAR,
}
_STRUCTURED = {
    "json": GrammarKind.JSON_SCHEMA,
    "regex": GrammarKind.REGEX,
    "choice": GrammarKind.CHOICE,
    "grammar": GrammarKind.GRAMMAR,
    "structural_tag": GrammarKind.STRUCTURAL_TAG,
}
_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")

_Schema = Annotated[Any, WithJsonSchema(_SCHEMA)]
_Tag = Annotated[Any, WithJsonSchema(_TAG)]


class StructuredOutputs(TypedDict, total=False):
    """vLLM's `structured_outputs`: exactly one of the first six fields, and options of JSON."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]

    json: _Schema
    regex: str | None
    choice: list[str] | None
    grammar: str | None
    json_object: bool | None
    structural_tag: _Tag
    disable_any_whitespace: bool | None
    disable_additional_properties: bool | None
    whitespace_pattern: str | None


class GrammarFields(BaseModel):
    """Fields that state the grammar of an output."""

    response_format: Annotated[dict[str, Any], WithJsonSchema(_RESPONSE_FORMAT)] | None = None
    structured_outputs: StructuredOutputs | None = None


class GrammarAliases(GrammarFields):
    """Also the names of SGLang, of llama.cpp, and of vLLM before `structured_outputs`. "" means the default."""

    json_schema: _Schema = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None
    structural_tag: _Tag = None
    guided_json: _Schema = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: str | None = None


@dataclass(frozen=True, slots=True)
class GrammarRequest:
    spec: GrammarSpec
    param: str  # the field that states it
    unused: tuple["GrammarRequest", ...] = ()  # have no effect themselves, but must be valid


def grammar_request(fields: GrammarFields, *, ignore_eos: bool) -> GrammarRequest | None:
    """The grammar that the fields state, if any.

    Raises:
        PromptError: a field has an invalid value, states a second grammar, or an output could not end.
    """
    found = [*_response_format(fields.response_format), *_structured_outputs(fields.structured_outputs)]
    if isinstance(fields, GrammarAliases):
        found += _others(fields)
    if len({request.spec for request in found}) > 1:
        first, second = found[0].param.partition(".")[0], found[1].param.partition(".")[0]
        raise PromptError(second, f"`{second}` cannot be combined with `{first}`.")
    if found and ignore_eos:
        raise PromptError("ignore_eos", "`ignore_eos` cannot be combined with a grammar, which ends the output.")
    return found[0] if found else None


async def resume_grammar(grammar: LlguidanceGrammar, tokens: Sequence[int]) -> ResumedGrammar:
    """The rest of a grammar after `tokens`. Raise PromptError if it does not allow them."""
    try:
        return await asyncio.to_thread(grammar.after, tokens)
    except GrammarError as error:
        raise PromptError("grammar_start", f"`grammar_start`: {error}.") from None


async def compile_grammar(
    request: GrammarRequest, compiler: GrammarCompiler, key: str | None = None
) -> LlguidanceGrammar:
    """Raise PromptError if the grammar cannot be used, GrammarBusyError if too many wait to be compiled."""
    for unused in request.unused:
        await compile_grammar(unused, compiler, key)
    try:
        return await compiler.compile(request.spec, key)
    except GrammarError as error:
        raise PromptError(request.param, f"`{request.param}`: {error}.") from None


def _response_format(value: dict[str, Any] | None) -> Iterator[GrammarRequest]:
    if value is None:
        return
    param, kind = "response_format", value.get("type")
    if kind not in _TYPES:
        raise PromptError(f"{param}.type", f"`{param}.type` must be one of {', '.join(map(repr, _TYPES))}.")
    if kind == "structural_tag":
        yield _request(GrammarKind.STRUCTURAL_TAG, value, param)
        return
    has_inline_schema = (
        kind == "json_schema" and value.get("json_schema") is None and "schema" in value
    )  # SGLang's form
    _check_keys(value, ("type", *(_SCHEMA_KEYS if has_inline_schema else _FORMAT_KEYS[kind])), param)
    if kind == "json_object":
        schema = value.get("schema")  # llama.cpp's
        yield _request(GrammarKind.JSON_SCHEMA, _JSON_OBJECT if schema is None else schema, f"{param}.schema")
    elif kind == "json_schema":
        path = param if has_inline_schema else f"{param}.json_schema"
        yield _named_schema(value if has_inline_schema else value.get("json_schema"), path)


def _named_schema(value: Any, path: str) -> GrammarRequest:
    if not isinstance(value, dict):
        raise PromptError(path, f"`{path}` must be an object.", "invalid_type")
    _check_keys(value, (*_SCHEMA_KEYS, "type"), path)
    if not isinstance(value.get("strict"), bool | None):
        raise PromptError(f"{path}.strict", f"`{path}.strict` must be a boolean.", "invalid_type")
    return _request(GrammarKind.JSON_SCHEMA, value.get("schema", _JSON_OBJECT), f"{path}.schema")


def _check_keys(value: Mapping[str, Any], known: Collection[str], path: str) -> None:
    for name, item in value.items():
        if name not in known and item is not None:
            param = f"{path}.{name[:100]}"
            raise PromptError(param, f"`{param}` is not a field.", "unsupported_parameter")


def _structured_outputs(value: StructuredOutputs | None) -> Iterator[GrammarRequest]:
    if value is None:
        return
    param = "structured_outputs"
    given: dict[str, Any] = {name: item for name, item in value.items() if item is not None}
    stated = {name: given[name] for name in (*_STRUCTURED, "json_object") if name in given}
    if len(stated) != 1:
        names = ", ".join(f"`{name}`" for name in (*_STRUCTURED, "json_object"))
        raise PromptError(param, f"`{param}` must have exactly one of {names}.")
    [(name, item)] = stated.items()
    if name == "json_object":
        request = _json_object(item, f"{param}.json_object")
    else:
        request = _request(_STRUCTURED[name], item, f"{param}.{name}")
    yield _with_options(request, {name: given[name] for name in _OPTIONS if given.get(name)}, f"{param}.")


def _others(fields: GrammarAliases) -> Iterator[GrammarRequest]:
    found = [
        _request(kind, item, name)
        for name, kind in _FIELDS.items()
        if (item := getattr(fields, name)) not in (None, "")
    ]
    if fields.guided_json_object:
        found.append(_json_object(True, "guided_json_object"))
    pattern, users = fields.guided_whitespace_pattern, ("guided_json", "guided_json_object")
    if pattern and not any(request.param in users for request in found):
        param = "guided_whitespace_pattern"
        raise PromptError(param, f"`{param}` needs `guided_json` or `guided_json_object`.")
    for request in found:
        options = {"guided_whitespace_pattern": pattern} if pattern and request.param in users else {}
        yield _with_options(request, options, "")


def _json_object(value: bool, param: str) -> GrammarRequest:
    if not value:
        raise PromptError(param, f"`{param}` must be true.")
    return GrammarRequest(GrammarSpec(GrammarKind.JSON_SCHEMA, _JSON_OBJECT), param)


def _request(kind: GrammarKind, value: Any, param: str) -> GrammarRequest:
    if kind in (GrammarKind.JSON_SCHEMA, GrammarKind.STRUCTURAL_TAG):
        if not isinstance(value, dict | bool | str):
            raise PromptError(param, f"`{param}` must be an object or a string.", "invalid_type")
        text = value if isinstance(value, str) else json.dumps(value)
    elif kind is GrammarKind.CHOICE:
        if not value:
            raise PromptError(param, f"`{param}` must contain at least one text.", "empty_array")
        text = json.dumps(value)
    else:
        text = value
    if not text.strip():
        raise PromptError(param, f"`{param}` must not be empty.")
    return GrammarRequest(GrammarSpec(kind, text), param)


def _with_options(request: GrammarRequest, options: Mapping[str, Any], prefix: str) -> GrammarRequest:
    """The grammar with options of JSON, which other kinds do not have."""
    spec = request.spec
    for name, value in options.items():
        param = prefix + name
        if spec.kind is not GrammarKind.JSON_SCHEMA:
            raise PromptError(param, f"`{param}` needs a JSON schema.")
        if name == "disable_additional_properties":
            spec = replace(spec, closed=True)
        else:
            spec = replace(spec, whitespace="" if value is True else value)
    return replace(request, spec=spec)
