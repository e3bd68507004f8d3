"""Grammars for tests of the engine: any rule from the tokens so far to the ids that may follow."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

type Rule = Callable[[Sequence[int]], Collection[int]]


@dataclass(frozen=True)
class FakeGrammar:
    """Allows the ids of `allowed` after the tokens so far."""

    allowed: Rule
    ends: Callable[[Sequence[int]], bool] = lambda _: False  # whether only the end may follow
    error: Callable[[Sequence[int]], str | None] = lambda _: None
    before_fill: Callable[[Sequence[int]], None] = lambda _: None  # may raise, or wait for a test

    def matcher(self) -> "FakeMatcher":
        return FakeMatcher(self)


@dataclass
class FakeMatcher:
    grammar: FakeGrammar
    tokens: list[int] = field(default_factory=list)

    @property
    def error(self) -> str | None:
        return self.grammar.error(self.tokens)

    @property
    def is_finished(self) -> bool:
        return self.grammar.ends(self.tokens)

    def fill(self, words: NDArray[np.uint32]) -> None:
        self.grammar.before_fill(self.tokens)
        words[:] = 0
        tokens = np.fromiter(self.grammar.allowed(self.tokens), np.int64)
        np.bitwise_or.at(words, tokens // 32, np.uint32(1) << (tokens % 32).astype(np.uint32))

    def advance(self, token: int) -> None:
        assert token in self.grammar.allowed(self.tokens)
        self.tokens.append(token)


def sequence(*tokens: int, then: Collection[int]) -> FakeGrammar:
    """The tokens, then any of `then`, again and again."""
    return FakeGrammar(lambda before: [tokens[len(before)]] if len(before) < len(tokens) else then)


def hashed(vocab_size: int, *, seed: int = 0) -> FakeGrammar:
    """After some texts one token, after others several, after others all."""

    def allowed(before: Sequence[int]) -> Collection[int]:
        kind = (seed + 3 * len(before) + sum(before)) % 8
        if kind == 7:
            return range(vocab_size)
        return {(5 * i + sum(before) + seed) % vocab_size for i in range(max(1, kind - 3))}

    return FakeGrammar(allowed)
