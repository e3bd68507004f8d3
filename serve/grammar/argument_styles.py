"""Styles of arguments that are not written as JSON: the arguments of a JSON schema as expressions of a Lark grammar."""

import json
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from serve.grammar.json_schema import GrammarError, resolve

_ANNOTATIONS = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly")
_DEFINITIONS = ("$schema", "$id", "$comment", "$defs", "definitions")
_OBJECT = ("type", "properties", "required", "additionalProperties")
_STRING = ("type", "minLength", "maxLength", "pattern")
_ARRAY = ("type", "items", "minItems", "maxItems")
_SCALARS = ("string", "number", "boolean", "null")
_ANY = {"anyOf": [{"type": kind} for kind in _SCALARS]}
_NAME = re.compile(r"[\w.-]+\Z")


class Rules(Protocol):
    """Builds the rules of a grammar. Methods return an expression."""

    def rule(self, body: str) -> str: ...

    def fixed(self, text: str) -> str: ...

    def json(self, schema: Any) -> str: ...

    def regex(self, pattern: str, excludes: list[str]) -> str: ...

    def before(self, text: str, end: str) -> str:
        """A terminal `text`, and `end` at its first place."""


@dataclass(frozen=True, slots=True)
class ArgumentStyle:
    """How members are written. Objects and lists within a value follow the style only if strings have a quote."""

    before: str  # a value; NAME is the member's
    after: str
    separator: str
    quote: str = ""  # around strings; without it they are JSON
    raw_end: str = ""  # the first one ends a value of type string, which is written as it is
    identifiers: bool = False  # names are those of Python


STYLES = {
    "python": ArgumentStyle("NAME=", "", ", ", identifiers=True),
    "qwen_xml": ArgumentStyle("<parameter=NAME>\n", "\n</parameter>\n", "", raw_end="</parameter>"),
    "gemma4": ArgumentStyle("NAME:", "", ",", quote='<|"|>'),
    "functiongemma": ArgumentStyle("NAME:", "", ",", quote="<escape>"),
}


def arguments(schema: Any, style: ArgumentStyle, rules: Rules) -> str:
    """The expression of the members of an object. Raise GrammarError if the style cannot express the schema."""
    try:
        return _Writer(schema, style, rules).members(schema, "")
    except (AttributeError, KeyError, TypeError):
        raise GrammarError("the schema is not valid") from None


class _Writer:
    def __init__(self, root: Any, style: ArgumentStyle, rules: Rules) -> None:
        self._root = root
        self._style = style
        self._rules = rules
        self._references: dict[str, str] = {}  # rules by pointer
        self._open = set[str]()  # pointers whose rules are being built

    def members(self, schema: Any, path: str) -> str:
        """Members in the schema's order, with separators. Names that it does not have are not written."""
        if schema is True:
            return ""
        _check(schema, _OBJECT, path)
        if not schema.get("properties") and schema.get("additionalProperties") is not False:
            raise GrammarError(f"an object without `properties` is not supported at `{path}`")
        properties = dict(schema["properties"])
        required = set(schema.get("required", ()))
        others = schema.get("additionalProperties", True)
        properties |= {name: others for name in schema.get("required", ()) if name not in properties}
        separator, rule = self._rules.fixed(self._style.separator), self._rules.rule
        first = rest = ""  # of the members from here on: if none is before them, or some are
        for name, value in reversed(properties.items()):
            member = rule(self._member(name, value, f"{path}/properties/{name}"))
            alone = f"{member} {rest}"
            if name in required:
                first, rest = rule(alone), rule(f"{separator} {alone}")
            else:
                first = rule(f"{alone} | {first}" if first else f"({alone})?")
                rest = rule(f"({separator} {member})? {rest}")
        return first if separator else rest

    def _member(self, name: str, value: Any, path: str) -> str:
        style = self._style
        is_identifier = name.isidentifier() and not keyword.iskeyword(name)
        if not (is_identifier if style.identifiers else _NAME.match(name)):
            raise GrammarError(f"the name {name[:64]!r} cannot be written in a call of this model")
        before = self._rules.fixed(style.before.replace("NAME", name))
        if style.raw_end and isinstance(value, Mapping) and value.get("type") == "string":
            return f"{before} {self._text(value, style.after, style.raw_end, path)}"
        body = self._value(value, path) if style.quote else self._json(value)
        return f"{before} {body} {self._rules.fixed(style.after)}"

    def _json(self, value: Any) -> str:
        """A value as JSON; references stay references into the root."""
        definitions = {name: self._root[name] for name in ("$defs", "definitions") if name in self._root}
        return self._rules.json({**definitions, **value} if isinstance(value, Mapping) else value)

    def _text(self, schema: Mapping[str, Any], end: str, mark: str, path: str) -> str:
        """A text of a schema, and its end; the text does not contain `mark`."""
        rules = self._rules
        if values := _constants(schema, path):
            if any(mark in value for value in values):
                raise GrammarError(f"a value contains {mark!r} at `{path}`")
            return f"({' | '.join(rules.fixed(value + end) for value in values)})"
        _check(schema, _STRING, path)
        pattern = "(?s:.*)"
        if "minLength" in schema or "maxLength" in schema:
            pattern = f"(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})"
        if "pattern" in schema:
            if pattern != "(?s:.*)":
                raise GrammarError(f"keyword `pattern` beside a length is not supported at `{path}/pattern`")
            pattern = _whole(schema["pattern"], path)
        return rules.before(rules.regex(pattern, [mark]), end)

    def _value(self, schema: Any, path: str) -> str:
        """A value with quotes of the style around strings."""
        if schema is True or (isinstance(schema, Mapping) and not set(schema) - {*_ANNOTATIONS}):
            schema = _ANY
        if not isinstance(schema, Mapping):
            raise GrammarError(f"the schema allows nothing at `{path}`")
        if "$ref" in schema:
            return self._reference(schema["$ref"], path)
        if "anyOf" in schema:
            _check(schema, ("anyOf",), path)
            items = enumerate(schema["anyOf"])
            return f"({' | '.join(self._value(item, f'{path}/anyOf/{i}') for i, item in items)})"
        if "enum" in schema or "const" in schema:
            return f"({' | '.join(self._constant(value, path) for value in schema.get('enum', [schema.get('const')]))})"
        kinds = schema.get("type", [])
        if isinstance(kinds, list):
            if not kinds:
                raise GrammarError(f"a schema without `type` is not supported at `{path}`")
            return f"({' | '.join(self._value({**schema, 'type': kind}, path) for kind in kinds)})"
        return self._typed(schema, kinds, path)

    def _typed(self, schema: Mapping[str, Any], kind: str, path: str) -> str:
        rules, quote = self._rules, self._style.quote
        if kind == "string":
            return f"{rules.fixed(quote)} {self._text(schema, quote, quote, path)}"
        if kind == "object":
            return f"{rules.fixed('{')} {self.members(schema, path)} {rules.fixed('}')}"
        if kind != "array":
            return rules.json(schema)
        _check(schema, _ARRAY, path)
        item = rules.rule(self._value(schema.get("items", True), f"{path}/items"))
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        if high == 0:
            return rules.fixed("[]")
        others = (
            f"({rules.fixed(self._style.separator)} {item}){{{max(low - 1, 0)},{'' if high is None else high - 1}}}"
        )
        return f"{rules.fixed('[')} ({item} {others}){'' if low else '?'} {rules.fixed(']')}"

    def _constant(self, value: Any, path: str) -> str:
        quote = self._style.quote
        if isinstance(value, dict | list) or (isinstance(value, str) and quote in value):
            raise GrammarError(f"a value of `enum` or `const` is not supported at `{path}`")
        return self._rules.fixed(f"{quote}{value}{quote}" if isinstance(value, str) else json.dumps(value))

    def _reference(self, pointer: Any, path: str) -> str:
        if pointer not in self._references:
            target = resolve(self._root, pointer) if isinstance(pointer, str) and pointer.startswith("#") else None
            if target is None or pointer in self._open:
                raise GrammarError(f"the reference is not supported at `{path}/$ref`")
            self._open.add(pointer)
            self._references[pointer] = self._rules.rule(self._value(target, pointer.removeprefix("#")))
            self._open.remove(pointer)
        return self._references[pointer]


def _constants(schema: Mapping[str, Any], path: str) -> list[str]:
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if not all(isinstance(value, str) for value in values):
        raise GrammarError(f"a value of `enum` or `const` is not a string at `{path}`")
    return list(values)


def _whole(pattern: str, path: str) -> str:
    """A pattern that must match a whole text, without its anchors."""
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "", pattern)
    while (shorter := re.sub(r"\([^()]*\)", "", bare)) != bare:
        bare = shorter
    if not bare.startswith("^") or not bare.endswith("$") or "|" in bare:
        raise GrammarError(f"keyword `pattern` must match the whole text (`^...$`) at `{path}/pattern`")
    return pattern[1:-1]


def _check(schema: Any, known: tuple[str, ...], path: str) -> None:
    if not isinstance(schema, Mapping):
        raise GrammarError(f"the schema allows nothing at `{path}`")
    for name in schema:
        if name not in known and name not in _ANNOTATIONS and name not in _DEFINITIONS:
            raise GrammarError(f"keyword `{name[:64]}` is not supported at `{path}/{name[:64]}`")
