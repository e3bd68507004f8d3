"""Reasoning before a grammar: what the mask allows, token by token. The tokens are bytes."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from compiled.state import mask_words
from serve.text.output_splitter import ReasoningMarks
from serve.tools.thinking import ThinkingGrammar, ThinkingMatcher
from tests.support.http_client import END, VOCAB_SIZE, byte_tokenizer

MARKS = ReasoningMarks("<think>", "</think>")
ALL = set(range(VOCAB_SIZE))
TEXT = b"<t>{}"


class FixedText:
    """A grammar of one text."""

    def matcher(self) -> "FixedTextMatcher":
        return FixedTextMatcher()


class FixedTextMatcher:
    """A matcher of it, which rejects all else."""

    def __init__(self) -> None:
        self.position = 0
        self.error: str | None = None

    @property
    def is_finished(self) -> bool:
        return self.position == len(TEXT)

    def fill(self, words: NDArray[np.uint32]) -> None:
        """Allow the next byte, or the end."""
        token = END if self.is_finished else TEXT[self.position]
        words[:] = 0
        words[token // 32] = 1 << token % 32

    def advance(self, token: int) -> None:
        """Append a token."""
        if token != (END if self.is_finished else TEXT[self.position]):
            self.error = "no"
        self.position = min(self.position + 1, len(TEXT))


def grammar(*, answer: bool = True, is_open: bool = False, budget: int | None = None) -> ThinkingGrammar:
    text = FixedText() if answer else None
    return ThinkingGrammar(byte_tokenizer(), MARKS, text, is_open=is_open, budget=budget, vocab_size=VOCAB_SIZE)


def allowed(matcher: ThinkingMatcher) -> set[int]:
    words = np.zeros(mask_words(VOCAB_SIZE), np.uint32)
    matcher.fill(words)
    return {index for index in range(VOCAB_SIZE) if int(words[index // 32]) >> index % 32 & 1}


def advance(matcher: ThinkingMatcher, tokens: Sequence[int]) -> None:
    """Append tokens, each of which must be allowed."""
    for token in tokens:
        assert token in allowed(matcher)
        matcher.advance(token)
        assert matcher.error is None


def test_answer_without_reasoning() -> None:
    matcher = grammar().matcher()
    assert allowed(matcher) == {*b"<"}
    advance(matcher, b"<t")
    assert allowed(matcher) == {*b"h", *b">"}
    advance(matcher, TEXT[2:])
    assert matcher.is_finished
    assert allowed(matcher) == {END}


def test_answer_after_reasoning() -> None:
    matcher = grammar().matcher()
    advance(matcher, b"<th")
    assert allowed(matcher) == {*b"i"}
    advance(matcher, b"ink>")
    assert allowed(matcher) == ALL - {END}
    advance(matcher, b"Hm. </thin</think")
    assert not matcher.is_finished
    advance(matcher, b">")
    assert allowed(matcher) == {*b"<"}
    advance(matcher, TEXT)
    assert matcher.is_finished


def test_reasoning_that_the_prompt_opened() -> None:
    matcher = grammar(is_open=True).matcher()
    assert allowed(matcher) == ALL - {END}
    advance(matcher, b"Hm.</think><t>{}")
    assert matcher.is_finished


def test_matchers_are_independent() -> None:
    shared = grammar()
    first, second = shared.matcher(), shared.matcher()
    advance(first, b"<think>")
    advance(second, TEXT)


@pytest.mark.parametrize("answer", [False, True])
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_budget_forces_the_end(answer: bool, budget: int) -> None:
    matcher = grammar(answer=answer, is_open=True, budget=budget).matcher()
    advance(matcher, b"abcdefg"[:budget])
    for token in b"</think>":
        assert allowed(matcher) == {token}
        matcher.advance(token)
    assert allowed(matcher) == ({*b"<"} if answer else ALL)
    assert not matcher.is_finished


def test_budget_counts_from_the_start_mark() -> None:
    matcher = grammar(answer=False, budget=2).matcher()
    assert allowed(matcher) == ALL
    advance(matcher, b"\n<think>ab")
    assert allowed(matcher) == {*b"<"}
    advance(matcher, b"</think>")
    assert allowed(matcher) == ALL


def test_budget_of_an_answer_without_reasoning() -> None:
    matcher = grammar(answer=False, budget=2).matcher()
    advance(matcher, b"<thing> is long")
    assert allowed(matcher) == ALL


def test_reasoning_that_ends_within_its_budget() -> None:
    matcher = grammar(is_open=True, budget=20).matcher()
    advance(matcher, b"ab</think><t>{}")
    assert matcher.is_finished


def test_budget_of_zero_allows_no_start_mark() -> None:
    matcher = grammar(budget=0).matcher()
    advance(matcher, b"<t")
    assert allowed(matcher) == {*b">"}


def test_error_of_the_answer() -> None:
    matcher = grammar().matcher()
    advance(matcher, b"<t>")
    matcher.advance(ord("x"))
    assert matcher.error == "no"
