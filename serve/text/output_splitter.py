"""OutputSplitter: the parts of one request's output, token by token."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from serve.text.output_parts import CallEnd, Parser, Part, PartReader, Reading, TextPart, TokenOffsets
from serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    start: str
    end: str
    turn: str = ""  # start of each message, at the end of a prompt, if reasoning and answer are messages of their own
    answer: str = ""  # header of the answer


class OutputSplitter:
    """Splits the output of one request into parts, token by token."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        parse: Parser | None = None,
        *,
        reasoning: ReasoningMarks | None = None,
        starts_in_reasoning: bool = False,
        kept_ids: Collection[int] = (),
        skip_special_tokens: bool = True,
        single_call: bool = False,
    ) -> None:
        """Make a splitter.

        Args:
            parse: reads content and calls; None: all is content.
            starts_in_reasoning: the prompt ends with the start mark.
            kept_ids: special tokens whose text is in the text; those of marks.
            single_call: the output ends after one complete call.
        """

        def is_visible(token_id: int) -> bool:
            return token_id in kept_ids or not (skip_special_tokens and tokenizer.is_special(token_id))

        self._offsets = TokenOffsets(tokenizer, is_visible)
        self._reader = PartReader(self._offsets)
        self._marks = reasoning
        self._starts_in_reasoning = starts_in_reasoning
        self._parts = self._run(parse)
        self._single_call = single_call
        self._started_reasoning = False
        self.kept_ids = frozenset(kept_ids)
        self.answer_start: int | None = None if reasoning else 0  # index of the token where the answer begins
        self.has_ended = False  # after the only call that is allowed

    @property
    def reasoning_tokens(self) -> int:
        """Number of tokens before the answer, marks included."""
        if not self._started_reasoning:
            return 0
        return len(self._offsets) if self.answer_start is None else self.answer_start

    def push(self, token_ids: Sequence[int], text: str, *, is_complete: bool) -> list[Part]:
        """The parts that are certain after further tokens, and the text that they add to the output."""
        for token_id in token_ids:
            self._offsets.add(token_id)
        self._reader.feed(text, is_complete=is_complete)
        parts: list[Part] = []
        for part in self._parts:
            if part is None or self.has_ended:
                break
            if self._marks is None and isinstance(part, TextPart):
                part = replace(part, kind="content")
            parts.append(part)
            self.has_ended = self._single_call and isinstance(part, CallEnd)
        return parts

    def _run(self, parse: Parser | None) -> Reading[None]:
        reader = self._reader
        if self._marks is not None:
            yield from self._reasoning(self._marks)
        yield from parse(reader) if parse is not None else plain_text(reader)

    def _reasoning(self, marks: ReasoningMarks) -> Reading[None]:
        reader = self._reader
        if self._starts_in_reasoning:
            self._started_reasoning = True
            yield from reader.accept(marks.start)  # some models repeat it
        else:
            self._started_reasoning = (yield from reader.accept(marks.start)) is not None
        if self._started_reasoning:
            yield from reader.skip_spaces()
            if (yield from reader.text_until("reasoning", (marks.end,))) is None:
                return  # it was cut off
            if marks.answer:
                yield from reader.accept(marks.answer)
            start = reader.tokens(0, reader.position).stop
            yield from reader.skip_spaces()
            reader.release()
            self.answer_start = start
        else:
            self.answer_start = 0


def plain_text(reader: PartReader) -> Reading[None]:
    """All text is content."""
    yield from reader.text_until("content", ())
