"""JSON schemas for llguidance: what is checked before it reads them, and where in a schema its errors are."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

MAX_LEVELS = 64  # of nested containers in a schema
# Unbounded whitespace lets a model repeat line breaks until its output is cut off.
DEFAULT_WHITESPACE = r" |\n[ \t]{0,40}"

_MAPS = ("properties", "patternProperties", "dependentSchemas", "dependencies")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLES = (
    *("items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties"),
)
_MAX_PATHS = 3  # in an error message

type _Schema = dict[str, Any]
type _Test = Callable[[_Schema], str | None]  # the keyword at fault in a subschema


class GrammarError(ValueError):
    """A grammar that cannot be used. The message says what is wrong and where; clients may see it."""


def load(text: str) -> Any:
    """The value of a JSON text. Raise GrammarError if it is invalid."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise GrammarError(f"the schema is nested more than {MAX_LEVELS} levels deep") from None
    except json.JSONDecodeError as error:
        raise GrammarError(f"the schema is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None


def load_schema(text: str) -> Any:
    """The schema, an object or a boolean. Raise GrammarError if it is neither, or nested more than MAX_LEVELS deep."""
    schema = load(text)
    if not isinstance(schema, dict | bool):
        raise GrammarError("the schema must be an object or a boolean")
    check_levels(schema)
    return schema


def check_levels(value: Any) -> None:
    """Raise GrammarError for a value that is nested more than MAX_LEVELS deep."""
    level = [value]
    for _ in range(MAX_LEVELS):
        containers = [value for value in level if isinstance(value, dict | list)]
        level = [inner for value in containers for inner in (value.values() if isinstance(value, dict) else value)]
    if any(isinstance(value, dict | list) for value in level):
        raise GrammarError(f"the schema is nested more than {MAX_LEVELS} levels deep")


def check_finite(schema: Any) -> None:
    """Raise GrammarError if no finite text matches, as of an object that must contain itself."""
    parts = list(_subschemas(schema))
    finite, before = set[int](), -1
    while len(finite) > before:
        before = len(finite)
        finite |= {
            id(part) for _, part in reversed(parts) if id(part) not in finite and _is_finite(part, schema, finite)
        }
    if isinstance(schema, dict) and id(schema) not in finite:
        path = next((path for path, part in parts if "$ref" in part and id(part) not in finite), "")
        raise GrammarError(f"the schema contains itself without end at `{path}/$ref`")


def _is_finite(part: _Schema, root: Any, finite: set[int]) -> bool:
    """True if a finite value matches, given the subschemas of which that is known."""

    def known(schema: Any) -> bool:
        return not isinstance(schema, dict) or id(schema) in finite

    def values(name: str) -> list[Any]:
        value = part.get(name)
        return value if isinstance(value, list) else []

    reference, types = part.get("$ref"), part.get("type")
    if isinstance(reference, str) and reference.startswith("#") and not known(resolve(root, reference[1:])):
        return False
    if not all(map(known, values("allOf"))):
        return False
    if any(values(name) and not any(map(known, values(name))) for name in ("anyOf", "oneOf")):
        return False
    if types == "object":
        properties = part.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        return all(known(properties.get(name)) for name in values("required") if isinstance(name, str))
    if types == "array" and part.get("minItems"):
        return all(map(known, values("prefixItems"))) and known(part.get("items"))
    return True


def _no_constant(name: str) -> NoReturn:
    raise GrammarError(f"the schema is not JSON: {name} is not a number")


def closed(schema: Any) -> Any:
    """The schema without properties that it does not name, unless it allows them itself."""
    for _, part in _subschemas(schema):
        if "properties" in part:
            part.setdefault("additionalProperties", False)
    return schema


def with_whitespace(schema: Any, whitespace: str | None) -> Any:
    """The schema with options for llguidance; its own, in `x-guidance`, have precedence.

    Raise GrammarError for the option `lenient`, which ignores keywords.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    given = schema.get("x-guidance", {})
    if not isinstance(given, dict) or given.get("lenient"):
        raise GrammarError("`x-guidance` must be an object without `lenient` at `/x-guidance`")
    pattern = DEFAULT_WHITESPACE if whitespace is None else whitespace
    options = {"whitespace_pattern": pattern} if pattern else {"whitespace_flexible": False}
    chosen = given if given.keys() & {"whitespace_pattern", "whitespace_flexible"} else options | given
    return schema | {"x-guidance": chosen}


def schema_error(message: str, schema: Any) -> str:
    """llguidance's message about a schema as one line, with the JSON pointers of the keyword that it is about."""
    reason, test = _cause(message)
    paths = [f"{path}/{keyword}" for path, part in _subschemas(schema) if (keyword := test(part)) is not None]
    if not paths:
        return reason
    shown = " or ".join(f"`{path}`" for path in paths[:_MAX_PATHS])
    return f"{reason} at {shown}{' or further places' if len(paths) > _MAX_PATHS else ''}"


def regex_error(message: str) -> str:
    """The reason in llguidance's message, for a regular expression with the character that it points to."""
    reason = re.search(r"(?m)^error: (.*)$", message)
    if reason is None:
        return message.partition("\n")[0].partition(" in regex ")[0]
    caret = re.search(r"(?m)^    ( *)\^", message)
    return reason[1] + (f" (character {len(caret[1]) + 1})" if caret else "")


def _cause(message: str) -> tuple[str, _Test]:
    """The reason in words, and the test of the subschemas that can be at fault."""
    line = message.partition("\n")[0].strip()
    if found := re.match(r"Unimplemented keys: (\[.*\])", line):
        keywords = json.loads(found[1])
        names = ", ".join(f"`{keyword}`" for keyword in keywords)
        noun = "keyword" if len(keywords) == 1 else "keywords"
        return f"{noun} {names} {'is' if len(keywords) == 1 else 'are'} not supported", _with_keyword(*keywords)
    if found := re.match(r"Unknown format: (.*)", line):
        name = found[1]
        return f"format `{name}` is not supported", lambda part: "format" if part.get("format") == name else None
    if line.startswith("oneOf constraints"):
        return "`oneOf` is supported only if its alternatives exclude each other; use `anyOf`", _with_keyword("oneOf")
    if "regex parse error" in line or "regex" in line.lower():
        return regex_error(message), _with_keyword("pattern", "patternProperties")
    if found := re.match(r"Invalid type: (.*)", line):
        name = found[1]
        return f"type `{name}` does not exist", lambda part: "type" if name in str(part.get("type")) else None
    if line.startswith("Resource "):
        return "references to other documents are not supported", _test_reference(line)
    if line.startswith(("Pointer ", "circular references")):
        return line.partition(": json-schema:")[0], _test_reference(line)
    if line.startswith("min/maxProperties"):
        return line, _with_keyword("minProperties", "maxProperties")
    return line, _with_keyword(*re.findall(r"'(\w+)'", line), *re.findall(r"(?<!\w)(min\w+|max\w+)(?= \()", line))


def _with_keyword(*keywords: str) -> _Test:
    return lambda part: next((keyword for keyword in keywords if keyword in part), None)


def _test_reference(line: str) -> _Test:
    def test(part: _Schema) -> str | None:
        reference = part.get("$ref")
        if not isinstance(reference, str):
            return None
        target = reference.removeprefix("#")
        return "$ref" if f"'{target}'" in line or f"'{reference}'" in line or "circular" in line else None

    return test


def _subschemas(root: Any) -> Iterator[tuple[str, _Schema]]:
    """JSON pointers and subschemas, each once; definitions only if a reference leads to them."""
    queue, seen = [("", root)], set[int]()
    while queue:
        path, schema = queue.pop()
        if not isinstance(schema, dict) or id(schema) in seen:
            continue
        seen.add(id(schema))
        yield path, schema
        children = [(f"{path}/{name}", schema[name]) for name in _SINGLES if name in schema]
        for name in _LISTS:
            values = schema.get(name)
            children += [(f"{path}/{name}/{i}", v) for i, v in enumerate(values if isinstance(values, list) else ())]
        for name in _MAPS:
            values = schema.get(name)
            items = values.items() if isinstance(values, dict) else ()
            children += [(f"{path}/{name}/{_escape(key)}", value) for key, value in items]
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            children.append((reference[1:], resolve(root, reference[1:])))
        queue += reversed(children)


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def resolve(value: Any, pointer: str) -> Any:
    """The value at a JSON pointer; None if nothing stands there."""
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isascii() and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value
