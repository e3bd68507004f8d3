"""Reads tool calls from the text of an output: their names, and their arguments as they arrive."""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from serve.text.output_parts import (
    ArgumentsDelta,
    ArgumentSpan,
    CallEnd,
    CallFormatError,
    CallStart,
    CutOffError,
    PartReader,
    Reading,
)

_NAME_KEYS = ("name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")
_NAME = re.compile(r"[\w.\-]+\Z")


class CallReader:
    """Reads the calls of one output."""

    def __init__(self, reader: PartReader, tools: Mapping[str, Mapping[str, Any]], *, short_ids: bool = False) -> None:
        """Make a reader.

        Args:
            tools: schemas of the tools' parameters by name.
            short_ids: ids have nine characters, as Mistral's templates require.
        """
        self.reader = reader
        self.tools = tools
        self.count = 0
        self.known_only = False  # a call of an unknown tool is content
        self._short_ids = short_ids
        self._begin = 0
        self._is_between = False  # after a separator: no further call has started

    def check(self, name: str) -> None:
        """Raise CallFormatError for an invalid name."""
        if not _NAME.match(name) or (self.known_only and name not in self.tools):
            raise CallFormatError

    def start(self, name: str, begin: int, call_id: str | None = None) -> Reading[None]:
        """Yield the start of the call that stands at `begin`."""
        self._begin, self._is_between = begin, False
        tokens = self.reader.tokens(begin, self.reader.position)
        digits = uuid.uuid4().hex
        yield CallStart(self.count, call_id or (digits[:9] if self._short_ids else f"call_{digits[:24]}"), name, tokens)
        self.count += 1
        self.reader.release()

    def separate(self) -> Reading[None]:
        """Leave the calls so far: if no further one follows, the text from here on is content."""
        yield from self.reader.skip_spaces()
        self.reader.release()
        self._is_between = True

    def recover(self, error: CallFormatError) -> None:
        """After an error behind a call: the rest is content, unless the output ends within a call that has started."""
        if isinstance(error, CutOffError) and not self._is_between:
            self.reader.drop()
        else:
            self.reader.rewind()

    def arguments(self, text: str, start: int, end: int) -> Reading[None]:
        yield ArgumentsDelta(self.count - 1, text, self.reader.tokens(start, end))

    def end(self, spans: Sequence[tuple[str, int, int]]) -> Reading[None]:
        """Yield the end of the call; `spans` are names and positions of its arguments."""
        reader = self.reader
        arguments = tuple(ArgumentSpan(name, reader.tokens(start, end)) for name, start, end in spans)
        yield CallEnd(self.count - 1, reader.tokens(self._begin, reader.position), arguments)
        reader.release()

    def json_arguments(self) -> Reading[None]:
        """Yield the JSON value that comes next as the arguments, as it arrives, and the end of the call."""
        reader = self.reader
        yield from reader.skip_spaces()
        if (yield from reader.peek()) == '"':  # JSON within a string
            start = reader.position
            text = yield from reader.string()
            yield from self.arguments(text, start, reader.position)
            yield from self.end(())
            return
        scanner = JsonScanner(reader.position)
        while not scanner.is_complete:
            yield from reader.peek()
            text = reader.available()
            start = reader.position
            reader.position += scanner.feed(text)
            if reader.position > start:
                yield from self.arguments(text[: reader.position - start], start, reader.position)
            reader.release()
        yield from self.end(scanner.members)

    def objects(self, begin: int) -> Reading[None]:
        """Read an object with a name and arguments, or a list of such objects; `begin` is the start of the call."""
        if (yield from self.reader.accept("[")) is None:
            yield from self._object(begin)
            return
        while (yield from self.reader.accept("]")) is None:
            yield from self._object(begin)
            begin = self.reader.position
            yield from self.reader.accept(",", ";")
            yield from self.separate()

    def _object(self, begin: int) -> Reading[None]:
        reader, number = self.reader, self.count
        yield from reader.expect("{")
        name, early = None, None  # arguments that precede the name: their position
        while (yield from reader.accept("}")) is None:
            key = yield from reader.string()
            if self.known_only and name is None and key not in (*_NAME_KEYS, "type", "id"):
                raise CallFormatError
            yield from reader.expect(":")
            if key in _NAME_KEYS and name is None:
                name = yield from reader.string()
                self.check(name)
            elif key in _ARGUMENT_KEYS and self.count == number:
                yield from reader.skip_spaces()
                if name is None:
                    early = reader.position
                    yield from self._skip_value()
                else:
                    yield from self.start(name, begin)
                    yield from self.json_arguments()
            else:
                yield from self._skip_value()
            yield from reader.accept(",")
        if self.count > number:
            return
        if name is None:
            raise CallFormatError
        end = reader.position
        reader.position = early or end
        yield from self.start(name, begin)
        if early is None:
            yield from self.arguments("{}", end, end)
            yield from self.end(())
        else:
            yield from self.json_arguments()
        reader.position = end

    def _skip_value(self) -> Reading[None]:
        reader = self.reader
        yield from reader.skip_spaces()
        if (yield from reader.peek()) == '"':
            yield from reader.string()
            return
        scanner = JsonScanner(reader.position)
        while not scanner.is_complete:
            yield from reader.peek()
            reader.position += scanner.feed(reader.available())

    def whole(self, name: str, begin: int, values: Mapping[str, tuple[Any, int, int]]) -> Reading[None]:
        """Yield a call whose arguments are known: values and their positions by name."""
        reader = self.reader
        end = reader.position
        yield from self.start(name, begin)
        text = json.dumps({key: value for key, (value, *_) in values.items()}, ensure_ascii=False)
        yield from self.arguments(text, begin, end)
        yield from self.end([(key, first, last) for key, (_, first, last) in values.items()])


class JsonScanner:
    """Finds the end of a JSON value, and the members of an object, as its text arrives."""

    def __init__(self, position: int) -> None:
        self.members: list[tuple[str, int, int]] = []  # name, start and end of the value
        self.is_complete = False
        self._position = position
        self._depth = 0
        self._in_string = self._escaped = self._is_scalar = False
        self._key = ""
        self._reads_key = False
        self._value: int | None = None  # start of a member's value
        self._end = 0  # after the last character that is not white space

    def feed(self, text: str) -> int:
        """Number of characters of `text` that belong to the value."""
        for count, char in enumerate(text):
            if self._is_scalar and char in ",}] \t\r\n":
                self.is_complete = True
                return count
            self._add(char)
            self._position += 1
            if self.is_complete:
                return count + 1
        return len(text)

    def _add(self, char: str) -> None:
        if self._in_string:
            self._add_to_string(char)
        elif char in "}]":
            if self._depth == 1:
                self._end_member()
            self._depth -= 1
            self.is_complete = self._depth <= 0
        elif self._depth == 1 and char == "," and not self._reads_key:
            self._end_member()
            self._reads_key, self._key = True, ""
        elif self._depth == 1 and char == ":" and self._reads_key:
            self._reads_key, self._value = False, None
        elif not char.isspace():
            if self._depth == 0:
                self._is_scalar = char not in "{["
                self._reads_key = char == "{"
            elif self._depth == 1 and not self._reads_key and self._value is None:
                self._value = self._position
            self._depth += char in "{["
            self._in_string = char == '"'
            if self._reads_key and self._depth == 1 and char == '"':
                self._key = char
        if not char.isspace() or self._in_string:
            self._end = self._position + 1

    def _add_to_string(self, char: str) -> None:
        if self._reads_key and self._depth == 1:
            self._key += char
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False

    def _end_member(self) -> None:
        if self._value is None:
            return
        try:
            name = json.loads(self._key, strict=False)
        except ValueError:
            name = self._key.strip('"')
        self.members.append((str(name), self._value, self._end))
        self._value = None
