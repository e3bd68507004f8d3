"""Structural tags: free text with parts that follow a schema. The forms of vLLM and SGLang as a Lark grammar."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from llguidance import regex_to_lark

from serve.grammar.argument_styles import STYLES, arguments
from serve.grammar.json_schema import (
    GrammarError,
    check_finite,
    check_levels,
    regex_error,
    schema_error,
    with_whitespace,
)

_TEXT = r"(.|\n)*"
_TAG_KEYS = ("type", "begin", "content", "end")
_LIST_KEYS = ("type", "tags", "at_least_one", "stop_after_first")
_KEYS: dict[str, tuple[str, ...]] = {
    "any_text": ("type", "excludes"),
    "const_string": ("type", "value"),
    "grammar": ("type", "grammar"),
    "json_schema": ("type", "json_schema", "style"),
    "or": ("type", "elements"),
    "regex": ("type", "pattern", "excludes"),
    "sequence": ("type", "elements"),
    "tag": _TAG_KEYS,
    "tags_with_separator": (*_LIST_KEYS, "separator"),
    "triggered_tags": (*_LIST_KEYS, "triggers", "excludes"),
}
_DEFAULTS: dict[str, Any] = {"excludes": [], "style": "json"}  # of other keys, which have no effect with these values
_OPEN_ENDED = ("any_text", "triggered_tags")  # their text ends with the output, or at the end of a tag


def structural_tag(value: Any, special_tokens: Mapping[str, int], whitespace: str | None) -> str:
    """The Lark grammar of a structural tag.

    Args:
        value: `{"structures": [{begin, schema, end}], "triggers"}`, or `{"format"}`.
        special_tokens: text and id; in fixed texts they stand for the token.
        whitespace: see `GrammarSpec`.

    Raises:
        GrammarError: the value is invalid, or not supported; the message has the path.
    """
    check_levels(value)
    if not isinstance(value, dict):
        raise GrammarError("the structural tag must be an object")
    rules = _Rules(special_tokens, whitespace)
    form = ("format",) if "format" in value else ("structures", "triggers")
    _check_keys(value, ("type", *form), "")
    if "format" in value:
        start = rules.format(value["format"], "format", is_last=True)
    else:
        tags = [_structure(item, f"structures[{i}]") for i, item in enumerate(_list(value, "structures", ""))]
        start = rules.triggered_tags({"tags": tags, "triggers": value.get("triggers")}, "", is_last=True)
    return "\n".join([f"start: {start}", *rules.lines])


def tag_error(message: str, value: Any) -> str:
    """llguidance's message about the grammar of a structural tag as one line, with the path of the schema at fault."""
    reason = message.removeprefix("failed to compile JSON schema: ")
    for path, schema in _schemas(value, ""):
        error = schema_error(reason, schema)
        if error.endswith("`"):  # it has the keyword that the message is about
            return f"`{path}`: {error}"
    return regex_error(reason)


def _schemas(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        inner_path = f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}".removeprefix(".")
        if key in ("schema", "json_schema"):
            yield inner_path, inner
        else:
            yield from _schemas(inner, inner_path)


def _structure(item: Any, path: str) -> dict[str, Any]:
    if not isinstance(item, dict) or "schema" not in item:
        raise GrammarError(f"`{path}` must be an object with `begin`, `schema` and `end`")
    _check_keys(item, ("begin", "schema", "end"), f"{path}.")
    tag = {key: inner for key, inner in item.items() if key != "schema"}
    return {**tag, "content": {"type": "json_schema", "json_schema": item["schema"]}}


class _Rules:
    """Builds the rules of a grammar. Methods for formats return an expression."""

    def __init__(self, special_tokens: Mapping[str, int], whitespace: str | None) -> None:
        self.lines: list[str] = []
        self._names: dict[str, str] = {}
        self._special_tokens = special_tokens
        self._whitespace = whitespace
        self._formats: dict[str, Callable[..., str]] = {
            "any_text": self._any_text,
            "const_string": self._const_string,
            "grammar": self._grammar,
            "json_schema": self._json_schema,
            "or": self._or,
            "regex": self._regex,
            "sequence": self._sequence,
            "tag": self._tag,
            "tags_with_separator": self._tags_with_separator,
            "triggered_tags": self.triggered_tags,
        }

    def format(self, value: Any, path: str, *, is_last: bool) -> str:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in self._formats:
            names = ", ".join(f"`{name}`" for name in self._formats)
            raise GrammarError(f"`{path}.type` must be one of {names}")
        if kind in _OPEN_ENDED and not is_last:
            raise GrammarError(f"`{path}`: format `{kind}` can only be the last part, or the only one of a tag")
        _check_keys(value, _KEYS[kind], f"{path}.")
        return self._formats[kind](value, path, is_last=is_last)

    def triggered_tags(self, value: dict[str, Any], path: str, *, is_last: bool) -> str:
        prefix = f"{path}." if path else ""
        triggers = _strings(value, "triggers", prefix)
        text = self.regex(_TEXT, _excludes(value, prefix))
        bodies: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        for i, tag in enumerate(_list(value, "tags", prefix)):
            begin = _string(tag, "begin", f"{prefix}tags[{i}]")
            trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
            if trigger is None:
                raise GrammarError(f"`{prefix}tags[{i}].begin` starts with none of the triggers")
            rest = {**tag, "begin": begin.removeprefix(trigger)}
            bodies[trigger].append(self._tag(rest, f"{prefix}tags[{i}]", is_last=is_last))
        tags = [
            self.rule(f"{self.before(text, trigger)} ({' | '.join(body)})") for trigger, body in bodies.items() if body
        ]
        tag = f"({' | '.join(tags)})"
        if value.get("stop_after_first"):
            return tag if value.get("at_least_one") else f"({tag} | {text})"
        return f"{tag}{'+' if value.get('at_least_one') else '*'} {text}"

    def rule(self, body: str, *, lazy: bool = False) -> str:
        return self._line(f"r{len(self.lines)}", f"{'[lazy]' if lazy else ''}: {body}")

    def _line(self, name: str, definition: str) -> str:
        """The name of a rule or terminal; equal ones have one name."""
        if definition not in self._names:
            self._names[definition] = name
            self.lines.append(f"{name}{definition}")
        return self._names[definition]

    def fixed(self, text: str) -> str:
        """An expression of a fixed text, special tokens included."""
        found = [(text.find(token), -len(token), token) for token in self._special_tokens if token in text]
        if not found:
            return json.dumps(text) if text else ""
        start, _, token = min(found)
        before, after = self.fixed(text[:start]), self.fixed(text[start + len(token) :])
        return f"{before} <[{self._special_tokens[token]}]> {after}".strip()

    def json(self, schema: Any) -> str:
        check_finite(schema)
        return self.rule(f"%json {json.dumps(with_whitespace(schema, self._whitespace))}")

    def regex(self, pattern: str, excludes: list[str]) -> str:
        """A terminal of the texts that a pattern matches and that contain none of `excludes`."""
        expression = f"/{regex_to_lark(pattern, '')}/"
        if not excludes:
            return expression
        marks = "|".join("".join(f"\\x{{{ord(char):x}}}" for char in text) for text in excludes)
        return self._line(f"T{len(self.lines)}", f": {expression} & ~/(.|\\n)*({marks})(.|\\n)*/")

    def before(self, text: str, end: str) -> str:
        if end.startswith(tuple(self._special_tokens)):
            return f"{text} {self.fixed(end)}"
        return self.rule(f"{text} {json.dumps(end)}", lazy=True)

    def _any_text(self, value: dict[str, Any], path: str, *, is_last: bool) -> str:
        del is_last
        return self.regex(_TEXT, _excludes(value, f"{path}."))

    def _const_string(self, value: dict[str, Any], path: str, *, is_last: bool) -> str:
        del is_last
        return self.fixed(_string(value, "value", path))

    def _grammar(self, value: dict[str, Any], path: str, *, is_last: bool) -> str:
        del is_last
        return self.rule(f"%lark {{\n{_string(value, 'grammar', path)}\n}}")

    def _json_schema(self, value: dict[str, Any], path: str, *, is_last: bool) -> str:
        del is_last
        schema = value.get("json_schema")
        if not isinstance(schema, dict | bool):
            raise GrammarError(f"`{path}.json_schema` must be an object or a boolean")
        style = "json" if value.get("style") is None else value["style"]
        if style == "json":
            return self.json(schema)
        if not isinstance(style, str) or style not in STYLES:
            names = ", ".join(f"`{name}`" for name in ("json", *STYLES))
            raise GrammarError(f"`{path}.style` must be one of {names}")
        try:
            return arguments(schema, STYLES[style], self)
        except GrammarError as error:
            raise GrammarError(f"`{path}.json_schema`: {error}") from None

    def _regex(self, value: dict[str, Any], path: str, *, is_last: bool) -> str:
        del is_last
        return self.regex(_string(value, "pattern", path), _excludes(value, f"{path}."))

    def _or(self, value: dict[str, Any], path: str, *, is_last: bool) -> str:
        elements = enumerate(_list(value, "elements", f"{path}."))
        return f"({' | '.join(self.format(item, f'{path}.elements[{i}]', is_last=is_last) for i, item in elements)})"

    def _sequence(self, value: dict[str, Any], path: str, *, is_last: bool) -> str:
        elements = _list(value, "elements", f"{path}.")
        last = len(elements) - 1
        parts = (
            self.format(item, f"{path}.elements[{i}]", is_last=is_last and i == last) for i, item in enumerate(elements)
        )
        return " ".join(parts)

    def _tag(self, value: Any, path: str, *, is_last: bool) -> str:
        begin = self.fixed(_string(value, "begin", path))
        _check_keys(value, _TAG_KEYS, f"{path}.")
        end = value.get("end", "")
        ends = end if isinstance(end, list) else [end]
        if not ends or not all(isinstance(text, str) for text in ends):
            raise GrammarError(f"`{path}.end` must be a string or a list of strings")
        content = value.get("content")
        if isinstance(content, dict) and content.get("type") == "any_text" and all(ends):
            _check_keys(content, _KEYS["any_text"], f"{path}.content.")
            text = self._any_text(content, f"{path}.content", is_last=False)
            return f"{begin} ({' | '.join(self.before(text, end) for end in ends)})"
        body = self.format(content, f"{path}.content", is_last=is_last and ends == [""])
        return f"{begin} {body} ({' | '.join(map(self.fixed, ends))})"

    def _tags_with_separator(self, value: dict[str, Any], path: str, *, is_last: bool) -> str:
        del is_last
        tags = enumerate(_list(value, "tags", f"{path}."))
        tag = f"({' | '.join(self._tag(item, f'{path}.tags[{i}]', is_last=False) for i, item in tags)})"
        separator = self.fixed(_string(value, "separator", path))
        body = tag if value.get("stop_after_first") else f"{tag} ({separator} {tag})*"
        return body if value.get("at_least_one") else f"({body})?"


def _check_keys(value: Mapping[str, Any], known: Collection[str], prefix: str) -> None:
    for key, item in value.items():
        if key not in known and item is not None and item != _DEFAULTS.get(key):
            raise GrammarError(f"`{prefix}{key[:100]}` is not supported")
        if key in ("at_least_one", "stop_after_first") and not isinstance(item, bool | None):
            raise GrammarError(f"`{prefix}{key}` must be a boolean")


def _excludes(value: Mapping[str, Any], prefix: str) -> list[str]:
    return _strings(value, "excludes", prefix) if value.get("excludes") else []


def _string(value: Any, name: str, path: str) -> str:
    text = value.get(name) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise GrammarError(f"`{path}.{name}` must be a string")
    return text


def _list(value: Any, name: str, prefix: str) -> list[Any]:
    items = value.get(name)
    if not isinstance(items, list) or not items:
        raise GrammarError(f"`{prefix}{name}` must be a list that is not empty")
    return items


def _strings(value: Any, name: str, prefix: str) -> list[str]:
    items = _list(value, name, prefix)
    if not all(isinstance(item, str) and item for item in items):
        raise GrammarError(f"`{prefix}{name}` must be a list of strings that are not empty")
    return items
