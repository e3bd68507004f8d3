"""OpenAI's harmony format: an output is a sequence of messages in channels ("OpenAI harmony response format", 2025).

    <|channel|>analysis<|message|>TEXT<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGUMENTS<|call|>
    <|start|>assistant<|channel|>final<|message|>TEXT<|return|>

The prompt ends with the first message's `<|start|>assistant`. The recipient of a call may also precede its channel.
"""

import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

from serve.text.output_parts import CallFormatError, Reading, TextPart
from serve.tools.call_reader import CallReader

TURN = "<|start|>assistant"
ANSWER = f"{TURN}<|channel|>final<|message|>"
CALL = f"{TURN}<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>"
MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
_BEGINS, _ENDS = MARKS[:2], MARKS[4:]
_FUNCTIONS = "functions."
_HEADER = re.compile(
    r"(?:<\|start\|>assistant)?\s*(?:to=(?P<before>[^\s<]+))?\s*"
    r"(?:<\|channel\|>\s*(?P<channel>\w+))?\s*(?:to=(?P<after>[^\s<]+))?\s*(?:<\|constrain\|>)?\s*\w*\s*\Z"
)

type _Kind = Literal["reasoning", "content"]


@dataclass(frozen=True, slots=True)
class Channels:
    """Reads messages. Text outside of them, or in a message whose header is malformed, is content."""

    begin: tuple[str, ...] = ("to=functions.",)  # in no content that a grammar holds

    def __call__(self, calls: CallReader) -> Reading[None]:
        reader, begin = calls.reader, calls.reader.position
        kind: _Kind = "content"
        written: set[_Kind] = {"reasoning"} if begin else set()  # kinds of earlier text; reasoning precedes the parser
        if (yield from reader.accept("to=")) is not None:
            kind = yield from _message(calls, begin, begin + len("to="), written)
        while True:
            start = reader.position
            mark = yield from reader.text_until(kind, (*_BEGINS, *_ENDS))
            written |= {kind} if reader.position - len(mark or "") > start else set()
            if mark is None:
                return
            if mark in _ENDS:
                reader.release()
                kind = "content"
            else:
                kind = yield from _message(calls, reader.position - len(mark), reader.position, written)


def _message(calls: CallReader, begin: int, end: int, written: Set[_Kind]) -> Reading[_Kind]:
    """Read the header of the message at `begin`, whose first mark ends at `end`; return the kind of the text after it.

    A call is read to its end. Text of a kind that is already written starts a new paragraph.
    """
    reader, count = calls.reader, calls.count
    try:
        _, mark = yield from reader.until("<|message|>", "<|start|>", *_ENDS)
        found = _HEADER.match(reader.text(begin, reader.position - len(mark)).lstrip())
        if mark != "<|message|>" or found is None:
            raise CallFormatError
        recipient = found["before"] or found["after"] or ""
        if recipient.startswith(_FUNCTIONS) and calls.tools:
            name = recipient.removeprefix(_FUNCTIONS)
            calls.check(name)
            yield from calls.start(name, begin)
            yield from calls.json_arguments()
            yield from reader.accept(*_ENDS, cut=True)
            yield from reader.skip_spaces()
            reader.release()
            return "content"
    except CallFormatError as error:
        if calls.count > count:
            calls.recover(error)
        else:  # the mark is content
            reader.rewind()
            yield from reader.emit("content", end)
        return "content"
    kind: _Kind = "reasoning" if found["channel"] == "analysis" else "content"
    if kind in written:
        yield TextPart(kind, "\n\n", reader.tokens(begin, reader.position))
    reader.release()
    return kind
