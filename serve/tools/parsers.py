"""Parsers of tool calls in the text formats of models. A text that is no call stays content: none is lost."""

import ast
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from serve.text.output_parts import CallFormatError, Reading
from serve.tools.call_reader import CallReader

_CONSTANTS: dict[str, Any] = {"true": True, "false": False, "null": None, "none": None}

type ReadCalls = Callable[[CallReader, int], Reading[None]]  # the position is the start of the calls


@dataclass(frozen=True, slots=True)
class Marked:
    """Calls between marks. Text around them is content."""

    begin: tuple[str, ...]
    end: tuple[str, ...]
    read: ReadCalls

    def __call__(self, calls: CallReader) -> Reading[None]:
        reader = calls.reader
        while (mark := (yield from reader.text_until("content", self.begin))) is not None:
            begin, count = reader.position - len(mark), calls.count
            try:
                yield from self.read(calls, begin)
                yield from reader.accept(*self.end, cut=True)
            except CallFormatError as error:
                if calls.count == count:  # the mark is content
                    reader.rewind()
                    yield from reader.emit("content", begin + len(mark))
                    continue
                calls.recover(error)
                continue
            yield from reader.skip_spaces()
            reader.release()


@dataclass(frozen=True, slots=True)
class Leading:
    """Calls without a mark at the start of the output, which call known tools, or between marks."""

    first: str  # character of a call
    read: ReadCalls
    marked: Marked

    def __call__(self, calls: CallReader) -> Reading[None]:
        reader, calls.known_only = calls.reader, True
        try:
            yield from reader.skip_spaces()
            if (yield from reader.peek()) == self.first:
                yield from self.read(calls, reader.position)
            if calls.count:
                yield from reader.skip_spaces()
                reader.release()
        except CallFormatError as error:
            calls.recover(error)
        if not calls.count:
            reader.rewind()
        yield from self.marked(calls)


def json_objects(calls: CallReader, begin: int) -> Reading[None]:
    """Objects with a name and arguments, in a list or separated by semicolons."""
    yield from calls.objects(begin)
    while (yield from calls.reader.accept(";")) is not None:
        begin = calls.reader.position
        yield from calls.separate()
        yield from calls.objects(begin)


def mistral(calls: CallReader, begin: int) -> Reading[None]:
    """`add[ARGS]{"a": 1}` with an id before the arguments, or a list of objects."""
    reader = calls.reader
    yield from reader.skip_spaces()
    if (yield from reader.peek()) in "[{":
        yield from calls.objects(begin)
        return
    name, mark = yield from reader.until("[ARGS]", "[CALL_ID]", "{")
    call_id = None
    if mark == "[CALL_ID]":
        call_id, mark = yield from reader.until("[ARGS]", "{")
    if mark == "{":
        reader.position -= 1
    calls.check(name.strip())
    yield from reader.skip_spaces()
    if (yield from reader.peek()) != "{":
        raise CallFormatError
    yield from calls.start(name.strip(), begin, call_id and call_id.strip())
    yield from calls.json_arguments()


def qwen_coder(calls: CallReader, begin: int) -> Reading[None]:
    """`<function=add>`, a `<parameter=a>` for each argument; or an object."""
    reader = calls.reader
    if (yield from reader.accept("<function=")) is None and reader.text(begin, reader.position) != "<function=":
        yield from json_objects(calls, begin)
        return
    name, _ = yield from reader.until(">")
    calls.check(name.strip())
    yield from calls.start(name.strip(), begin)
    schemas = calls.tools.get(name.strip(), {}).get("properties")
    spans: list[tuple[str, int, int]] = []
    start = reader.position
    while (yield from reader.expect("<parameter=", "</function>")) == "<parameter=":
        key, _ = yield from reader.until(">")
        position = reader.position
        value, mark = yield from reader.until("</parameter>")
        schema = schemas.get(key) if isinstance(schemas, Mapping) else None
        member = json.dumps(_typed(value.removeprefix("\n").removesuffix("\n"), schema), ensure_ascii=False)
        text = f"{', ' if spans else '{'}{json.dumps(key, ensure_ascii=False)}: {member}"
        yield from calls.arguments(text, start, reader.position)
        spans.append((key, position, reader.position - len(mark)))
        start = reader.position
        reader.release()
    yield from calls.arguments("}" if spans else "{}", start, reader.position)
    yield from calls.end(spans)


def _typed(text: str, schema: Any) -> Any:
    """A value written without quotes: a string if the schema says so or it is no JSON."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def llama_tag(calls: CallReader, begin: int) -> Reading[None]:
    """Objects, or `add.call(a=1)`."""
    yield from calls.reader.skip_spaces()
    if (yield from calls.reader.peek()) == "{":
        yield from json_objects(calls, begin)
    else:
        yield from python_call(calls, begin)


def python_list(calls: CallReader, begin: int) -> Reading[None]:
    """`[add(a=1, b="x"), ...]`."""
    yield from calls.reader.expect("[")
    while (yield from calls.reader.accept("]")) is None:
        yield from python_call(calls, begin)
        begin = calls.reader.position
        yield from calls.reader.accept(",")
        yield from calls.separate()


def python_lines(calls: CallReader, begin: int) -> Reading[None]:
    """`add(a=1, b="x")`, a call a line, until something else comes."""
    reader = calls.reader
    while True:
        yield from python_call(calls, begin)
        begin = reader.position
        yield from calls.separate()
        if (reader.is_complete and not reader.available()) or not (yield from reader.peek()).isalpha():
            return


def python_call(calls: CallReader, begin: int) -> Reading[None]:
    """`add(a=1, b="x")` with Python's or JSON's literals; `add.call(...)` calls `add`."""
    reader = calls.reader
    yield from reader.skip_spaces()
    start = reader.position
    name, _ = yield from reader.until("(")
    calls.check(name.removesuffix(".call"))
    depth, quote = 1, ""
    while depth:
        char = yield from reader.peek()
        reader.position += 1
        if quote:
            if char == "\\":
                yield from reader.peek()
                reader.position += 1
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
    yield from calls.whole(name.removesuffix(".call"), begin, _keywords(reader.text(start, reader.position), start))


def _keywords(source: str, start: int) -> dict[str, tuple[Any, int, int]]:
    """Values of the keyword arguments of a call in Python, and their positions; `source` stands at `start`."""
    name, bracket, rest = source.partition("(")
    try:
        node = ast.parse("f" + bracket + rest, mode="eval").body
        if not isinstance(node, ast.Call) or node.args:
            raise CallFormatError
        lines = ("f" + bracket + rest).encode().splitlines(keepends=True)

        def position(line: int, column: int) -> int:
            before = b"".join(lines[: line - 1]) + lines[line - 1][:column]
            return start + len(name) - 1 + len(before.decode())

        return {
            item.arg or "": (
                _literal(item.value),
                position(item.value.lineno, item.value.col_offset),
                position(item.value.end_lineno or 1, item.value.end_col_offset or 0),
            )
            for item in node.keywords
        }
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise CallFormatError from None


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {str(_literal(key)): _literal(value) for key, value in zip(keys, values, strict=True) if key}
    raise CallFormatError


class GemmaCall:
    """`call:add{a:1,b:<|"|>x<|"|>}`; strings stand between two `quote`s."""

    def __init__(self, quote: str, end: str) -> None:
        self._quote = quote
        self._end = end

    def __call__(self, calls: CallReader, begin: int) -> Reading[None]:
        reader = calls.reader
        yield from reader.expect("call:")
        name, _ = yield from reader.until("{")
        start = reader.position
        calls.check(name)
        body, _ = yield from reader.until(f"}}{self._end}")
        try:
            values, end = self._members(body, 0)
        except RecursionError:
            raise CallFormatError from None
        if body[end:].strip():
            raise CallFormatError
        spans = {key: (value, start + first, start + last) for key, (value, first, last) in values.items()}
        yield from calls.whole(name, begin, spans)

    def _members(self, text: str, index: int) -> tuple[dict[str, tuple[Any, int, int]], int]:
        """Members up to a closing brace or the end of the text."""
        members: dict[str, tuple[Any, int, int]] = {}
        while index < len(text) and text[index] != "}":
            if text[index] in ", \n":
                index += 1
                continue
            if text.startswith(self._quote, index):
                key, index = self._value(text, index)
                index = text.find(":", index)
            else:
                key, index = text[index : text.find(":", index)].strip(), text.find(":", index)
            if index < 0:
                raise CallFormatError
            value, end = self._value(text, index + 1)
            members[str(key)] = value, index + 1, end
            index = end
        return members, index

    def _value(self, text: str, index: int) -> tuple[Any, int]:
        if text.startswith(self._quote, index):
            start = index + len(self._quote)
            end = text.find(self._quote, start)
            if end < 0:
                raise CallFormatError
            return text[start:end], end + len(self._quote)
        if text[index : index + 1] == "{":
            members, end = self._members(text, index + 1)
            return {key: value for key, (value, *_) in members.items()}, end + 1
        if text[index : index + 1] == "[":
            items: list[Any] = []
            index += 1
            while text[index : index + 1] != "]":
                if index >= len(text):
                    raise CallFormatError
                if text[index] in ", \n":
                    index += 1
                    continue
                item, index = self._value(text, index)
                items.append(item)
            return items, index + 1
        end = next((i for i in range(index, len(text)) if text[i] in ",}]"), len(text))
        if end == index:
            raise CallFormatError
        return _typed(text[index:end].strip(), None), end
