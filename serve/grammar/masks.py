"""Grammars that llguidance compiled for a tokenizer, and the state of one output in such a grammar."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from serve.grammar.json_schema import GrammarError

type Encode = Callable[[str], list[int]]
type Words = NDArray[np.uint32]  # packed mask [W], as in SamplingArrays.mask

# A lexer state takes up to 600 bytes, and a token of a string with `maxLength` adds about 20.
_LIMITS = LLParserLimits(max_lexer_states=100_000, verbose_errors=False)
_MAX_TOKENS = 2_000  # of all outputs in one grammar, before it is compiled again: they share the lexer's states


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What llguidance must know about a tokenizer."""

    tokens: Sequence[bytes]  # [V] of the model, which may be more than the tokenizer has; b"" is never allowed
    special_ids: frozenset[int]  # allowed only where a grammar names them
    eos_token_ids: frozenset[int]  # allowed where the text may end

    @property
    def special_tokens(self) -> dict[str, int]:
        """Texts and ids of the special tokens."""
        return {
            self.tokens[index].decode("utf-8", "replace"): index for index in self.special_ids if self.tokens[index]
        }

    def tokenizer(self, encode: Encode | None = None) -> LLTokenizer:
        """Hold the interpreter for about 2 us per token.

        With `encode`, a grammar without `no_forcing` allows only the tokens that it gives for text that is fixed.
        """
        return LLTokenizer(_Tokens(self, encode), eos_token=sorted(self.eos_token_ids))  # type: ignore[arg-type]


class _Tokens:
    """The interface that LLTokenizer expects of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, encode: Encode | None) -> None:
        self.eos_token_id = min(vocabulary.eos_token_ids)
        self.tokens = list(vocabulary.tokens)
        self.special_token_ids = sorted(vocabulary.special_ids | vocabulary.eos_token_ids)
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        if self._encode is None:
            raise NotImplementedError("grammars are compiled without fixed tokens")
        ids, data = self._encode(text), text.encode()
        # A tokenizer may add a space or normalize the text; llguidance needs tokens of this text.
        return ids if b"".join(self.tokens[index] for index in ids) == data else self._longest(data)

    def _longest(self, data: bytes) -> list[int]:
        """The longest token at each position."""
        ids: list[int] = []
        while data:
            lengths = range(min(len(data), self._max_length), 0, -1)
            ids.append(next(self._ids[data[:length]] for length in lengths if data[:length] in self._ids))
            data = data[len(self.tokens[ids[-1]]) :]
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        special = {*self.special_token_ids}
        return {token: index for index, token in enumerate(self.tokens) if token and index not in special}

    @cached_property
    def _max_length(self) -> int:
        return max(map(len, self._ids))


def compile_source(tokenizer: LLTokenizer, source: str) -> tuple[LLMatcher, str]:
    """The initial state, with its first mask computed, and llguidance's error message, or an empty text."""
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher, matcher.get_error()


class LlguidanceGrammar:
    """A compiled grammar. Thread-safe."""

    def __init__(self, start: LLMatcher, source: str) -> None:
        self.source = source
        self.is_exhausted = False  # its lexer has many states, or too many; new outputs need a grammar compiled again
        self._start = start
        self._num_tokens = 0

    def matcher(self) -> "LlguidanceMatcher":
        return LlguidanceMatcher(self._start.deep_copy(), self)

    def after(self, tokens: Sequence[int]) -> "ResumedGrammar":
        """This grammar for the rest of a text that begins with `tokens`. Raise GrammarError if it forbids one."""
        matcher = self.matcher()
        for index, token in enumerate(tokens):
            matcher.advance(token)
            if matcher.error is not None:
                raise GrammarError(f"the grammar does not allow token {token} at index {index} of its text")
        return ResumedGrammar(matcher)

    def count_token(self) -> None:
        self._num_tokens += 1
        self.is_exhausted |= self._num_tokens >= _MAX_TOKENS


@dataclass(frozen=True, slots=True)
class ResumedGrammar:
    """The rest of a grammar. Thread-safe."""

    start: "LlguidanceMatcher"

    def matcher(self) -> "LlguidanceMatcher":
        return self.start.copy()


class LlguidanceMatcher:
    """The state of one output."""

    def __init__(self, state: LLMatcher, grammar: LlguidanceGrammar) -> None:
        self._state = state
        self._grammar = grammar
        self._error: str | None = None

    def copy(self) -> "LlguidanceMatcher":
        return LlguidanceMatcher(self._state.deep_copy(), self._grammar)

    @property
    def error(self) -> str | None:
        return self._error

    @property
    def is_finished(self) -> bool:
        return self._state.is_stopped()

    def fill(self, words: Words) -> None:
        self._state.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()

    def advance(self, token: int) -> None:
        self._grammar.count_token()
        self._state.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._state.is_error() and self._error is None:
            is_complex = self._state.get_error().startswith(("lexer error: ", "parser error: "))
            self._error = "the grammar is too complex" if is_complex else "the grammar allows no token"
            self._grammar.is_exhausted |= is_complex
