"""ThinkingGrammar: any text up to the end of the reasoning, within a budget, and then a grammar."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from compiled.state import mask_words
from serve.engine.grammar import Grammar, Matcher
from serve.text.output_splitter import ReasoningMarks
from serve.text.tokenizer import Tokenizer

_ALL = np.uint32(0xFFFFFFFF)


class ThinkingGrammar:
    """A `Grammar` of reasoning and an answer. Immutable."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        marks: ReasoningMarks,
        answer: Grammar | None,
        *,
        is_open: bool,
        budget: int | None,
        vocab_size: int,
        has_header: bool = False,
    ) -> None:
        """Make a grammar.

        Args:
            answer: None allows any text.
            is_open: the prompt ends with the start mark; else the model may write it first.
            budget: maximum number of tokens between the marks.
            vocab_size: the model's.
            has_header: the answer starts with the header of a message, in formats that have them.
        """
        self.tokenizer = tokenizer
        self.start_ids = tokenizer.encode(marks.start, add_special_tokens=False)
        self.start = marks.start.encode()
        self.end_ids = tokenizer.encode(marks.end, add_special_tokens=False)
        self.end = marks.end.encode()
        self.must_think = answer is not None and bool(marks.turn)  # an empty text, if there is no budget
        header = "" if answer is None or has_header else marks.answer
        self.header_ids = tokenizer.encode(header, add_special_tokens=False) if header else []
        self.words = mask_words(vocab_size)
        self.answer = answer
        self.is_open = is_open
        self.budget = budget

    def matcher(self) -> "ThinkingMatcher":
        return ThinkingMatcher(self)


class ThinkingMatcher:
    """A `Matcher`."""

    def __init__(self, grammar: ThinkingGrammar) -> None:
        self._grammar = grammar
        self._answer: Matcher | None = None if grammar.answer is None else grammar.answer.matcher()
        self._phase = "thinking" if grammar.is_open else "start"
        self._text = b""  # of the phase: all, or as much as may belong to the end mark
        self._count = 0  # tokens of the reasoning, or of its start mark
        self._may_think = grammar.answer is None or grammar.budget != 0 or grammar.must_think
        self._may_answer = True
        self._forced: list[int] = []  # tokens that come next
        if grammar.is_open:
            self._check_budget()
        elif grammar.must_think:
            self._forced = list(grammar.start_ids)

    @property
    def error(self) -> str | None:
        return self._answer.error if self._answer is not None and self._phase != "thinking" else None

    @property
    def is_finished(self) -> bool:
        return self._answer is not None and self._phase == "answer" and self._answer.is_finished

    def fill(self, words: NDArray[np.uint32]) -> None:
        if self._forced:
            words[:] = 0
            _allow(words, self._forced[:1])
        elif self._phase == "thinking" or self._answer is None:
            words[:] = _ALL
            if self._answer is not None:  # without an answer, the output cannot end
                for index in self._grammar.tokenizer.eos_token_ids:
                    words[index // 32] &= ~np.uint32(1 << index % 32)
        else:
            words[:] = 0
            if self._may_answer:
                self._answer.fill(words)
            if self._phase == "start" and self._may_think:
                _allow(words, self._grammar.start_ids[self._count : self._count + 1])

    def advance(self, token: int) -> None:
        if self._forced:
            self._forced.pop(0)
            if self._phase == "answer":  # its header
                return
        match self._phase:
            case "start":
                self._start(token)
            case "thinking":
                self._think(token)
            case _:
                if self._answer is not None:
                    self._answer.advance(token)

    def _start(self, token: int) -> None:
        grammar = self._grammar
        self._text += grammar.tokenizer.token_bytes(token)
        if self._answer is None:
            self._may_think = grammar.start.startswith(self._text.lstrip()[: len(grammar.start)])
            starts = self._may_think and len(self._text.lstrip()) >= len(grammar.start)
        else:
            self._may_think = self._may_think and token == grammar.start_ids[self._count]
            self._count += 1
            starts = self._may_think and self._count == len(grammar.start_ids)
            self._may_answer = self._may_answer and _is_allowed(self._answer, token, grammar.words)
            if self._may_answer and not starts:
                self._answer.advance(token)
        if starts:
            self._answer = None if grammar.answer is None else grammar.answer.matcher()
            self._phase, self._count, self._text, self._may_answer = "thinking", 0, b"", True
            self._check_budget()
        elif not self._may_think:
            self._phase = "answer"

    def _think(self, token: int) -> None:
        grammar = self._grammar
        self._count += 1
        self._text += grammar.tokenizer.token_bytes(token)
        if grammar.end in self._text:
            self._phase, self._forced = "answer", list(grammar.header_ids)
            return
        self._text = self._text[-len(grammar.end) :]
        if not self._forced:
            self._check_budget()

    def _check_budget(self) -> None:
        if self._grammar.budget is not None and self._count >= self._grammar.budget:
            self._forced = list(self._grammar.end_ids)


def _is_allowed(matcher: Matcher, token: int, size: int) -> bool:
    words = np.zeros(size, np.uint32)
    matcher.fill(words)
    return bool(int(words[token // 32]) >> token % 32 & 1)


def _allow(words: NDArray[np.uint32], ids: Iterable[int]) -> None:
    for index in ids:
        words[index // 32] |= np.uint32(1 << index % 32)
