"""The parts of an output: reasoning, content and tool calls, found incrementally, with the tokens that each covers.

A parser is a generator over a `PartReader`: it yields parts, and None when it needs more text. So the parts of a text,
joined, do not depend on how it arrives.
"""

import codecs
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from serve.text.tokenizer import Tokenizer

_SPACES = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class TextPart:
    kind: Literal["reasoning", "content"]
    text: str
    tokens: range  # of the output


@dataclass(frozen=True, slots=True)
class CallStart:
    index: int  # of the call
    id: str
    name: str
    tokens: range


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    index: int
    text: str  # of the arguments' JSON
    tokens: range


@dataclass(frozen=True, slots=True)
class ArgumentSpan:
    """A top-level argument of a call."""

    name: str
    tokens: range  # of its value; the first and the last may reach beyond it


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A complete call. A call that the output's end cuts off has no such part."""

    index: int
    tokens: range  # of the call, with the mark before it
    arguments: tuple[ArgumentSpan, ...]


type Part = TextPart | CallStart | ArgumentsDelta | CallEnd
type Reading[T] = Generator[Part | None, None, T]
type Parser = Callable[["PartReader"], Reading[None]]


class CallFormatError(ValueError):
    """The text is not a call in the expected form."""


class CutOffError(CallFormatError):
    """The output ends within a call."""


class TokenOffsets:
    """The code points of the text that each token covers. A character of several tokens belongs to all of them."""

    def __init__(self, tokenizer: Tokenizer, is_visible: Callable[[int], bool]) -> None:
        self._tokenizer = tokenizer
        self._is_visible = is_visible
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._length = 0

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, token_id: int) -> None:
        self._starts.append(self._length)
        if self._is_visible(token_id):
            self._length += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        self._ends.append(self._length + bool(self._decoder.getstate()[0]))

    def tokens(self, start: int, end: int) -> range:
        """The tokens that overlap the code points from `start` to `end`."""
        return range(bisect_right(self._ends, start), bisect_left(self._starts, end))


class PartReader:
    """The text of an output, as far as it is known, and the position up to which it has been parsed.

    Methods that return a `Reading` yield None while they need more text, and raise CutOffError if the output ends.
    """

    def __init__(self, offsets: TokenOffsets) -> None:
        self._offsets = offsets
        self._text = ""
        self._start = 0  # of `_text` in the output
        self._floor = 0  # that `rewind` returns to
        self.position = 0
        self.is_complete = False  # all text is known

    def feed(self, text: str, *, is_complete: bool) -> None:
        self._text = self._text[self._floor - self._start :] + text
        self._start = self._floor
        self.is_complete = is_complete

    def release(self) -> None:
        """Let `rewind` return to the current position, and no further."""
        self._floor = self.position

    def rewind(self) -> None:
        self.position = self._floor

    def drop(self) -> None:
        """Skip the rest of the known text."""
        self.position = self._start + len(self._text)

    def available(self) -> str:
        """The known text from the position on."""
        return self._text[self.position - self._start :]

    def text(self, start: int, end: int) -> str:
        return self._text[start - self._start : end - self._start]

    def tokens(self, start: int, end: int) -> range:
        return self._offsets.tokens(start, end)

    def peek(self) -> Reading[str]:
        """The next character."""
        while self.position - self._start == len(self._text):
            if self.is_complete:
                raise CutOffError
            yield None
        return self._text[self.position - self._start]

    def skip_spaces(self) -> Reading[None]:
        """Skip white space; also at the end of the output."""
        while True:
            found = _SPACES.match(self._text, self.position - self._start)
            assert found is not None
            self.position = self._start + found.end()
            if found.end() < len(self._text) or self.is_complete:
                return
            yield None

    def accept(self, *marks: str, cut: bool = False) -> Reading[str | None]:
        """Consume the first of `marks` that the text continues with, after white space; None leaves the position.

        With `cut`, the output may end within the mark.
        """
        start = self.position
        yield from self.skip_spaces()
        while True:
            text = self.available()
            for mark in marks:
                if text.startswith(mark) or (cut and self.is_complete and text and mark.startswith(text)):
                    self.position += min(len(mark), len(text))
                    return mark
            if self.is_complete or not any(mark.startswith(text) for mark in marks):
                self.position = start
                return None
            yield None

    def expect(self, *marks: str) -> Reading[str]:
        if (mark := (yield from self.accept(*marks))) is None:
            rest = self.available().lstrip()
            raise CutOffError if any(mark.startswith(rest) for mark in marks) else CallFormatError
        return mark

    def until(self, *marks: str) -> Reading[tuple[str, str]]:
        """The text before the first of `marks`, and the mark; both are consumed."""
        start = searched = self.position
        while True:
            text = self.text(searched, self._start + len(self._text))
            if found := _first(text, marks):
                index, mark = found
                self.position = searched + index + len(mark)
                return self.text(start, searched + index), mark
            if self.is_complete:
                raise CutOffError
            searched = max(start, searched + len(text) - max(map(len, marks)) + 1)
            yield None

    def string(self) -> Reading[str]:
        """A JSON string."""
        yield from self.skip_spaces()
        if (yield from self.peek()) != '"':
            raise CallFormatError
        start = self.position
        self.position += 1
        while (char := (yield from self.peek())) != '"':
            self.position += 1
            if char == "\\":
                yield from self.peek()
                self.position += 1
        self.position += 1
        try:
            return str(json.loads(self.text(start, self.position), strict=False))
        except ValueError:
            raise CallFormatError from None

    def emit(self, kind: Literal["reasoning", "content"], end: int) -> Reading[None]:
        """Yield the text up to `end` as a part."""
        if end > self.position:
            yield TextPart(kind, self.text(self.position, end), self.tokens(self.position, end))
            self.position = end
        self.release()

    def text_until(self, kind: Literal["reasoning", "content"], marks: Sequence[str]) -> Reading[str | None]:
        """Yield text up to the first of `marks`, without white space before it. The mark is consumed and returned.

        Returns None at the end of the output. `rewind` returns to the end of the text.
        """
        while True:
            text = self.available()
            if found := _first(text, marks):
                index, mark = found
                end = self.position + index + len(mark)
                yield from self.emit(kind, self.position + len(text[:index].rstrip()))
                self.position = end
                return mark
            held = 0 if self.is_complete else _held(text, marks)
            yield from self.emit(kind, self.position + len(text) - held)
            if self.is_complete:
                return None
            yield None


def _first(text: str, marks: Sequence[str]) -> tuple[int, str] | None:
    """Index and value of the first of `marks` in `text`; the longest if several start there."""
    found = [(index, -len(mark), mark) for mark in marks if (index := text.find(mark)) >= 0]
    return (min(found)[0], min(found)[2]) if found else None


def _held(text: str, marks: Sequence[str]) -> int:
    """Number of characters at the end of `text` that may belong to a mark or be white space before it."""
    start = min(
        (len(text) - k for mark in marks for k in range(1, len(mark)) if text.endswith(mark[:k])), default=len(text)
    )
    return len(text) - len(text[:start].rstrip())
