"""TokenMask: the tokens that a request may generate next, as a bit mask in llguidance's layout."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from compiled.state import mask_words
from serve.engine.request import SamplingParams

type Words = NDArray[np.uint32]  # packed mask [W], W = mask_words(V)


class TokenMask:
    """The mask of one request. Bit i of word w is set if token 32 w + i is allowed.

    Words that do not depend on the output are packed once; a request without constraints has none. With a grammar the
    masks come from `update`, which may run on another thread.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self._size = mask_words(vocab_size)
        self._params = params
        self._phrases = [word for word in params.bad_words if len(word) > 1]
        self._longest = max(map(len, self._phrases), default=1)
        allowed = params.allowed_token_ids
        self._words = None if allowed is None else ~self._without(None, allowed)
        if tokens := [word[0] for word in params.bad_words if len(word) == 1]:
            self._words = self._without(self._words, tokens)
        self._words_before_min_tokens = self._words
        if params.min_tokens and params.stop_token_ids:
            self._words_before_min_tokens = self._without(self._words, params.stop_token_ids)
        self._matcher = params.grammar.matcher() if params.grammar else None
        self._num_read = 0  # output tokens that update() has seen
        self._next: Words | None = None  # mask of the token after the forced ones
        self.is_quick: bool | None = None  # whether updates take little time; None before the first
        self.forced: list[int] = []  # tokens after the output: the mask of each allows no other
        self.error: str | None = None  # why the output cannot continue after the forced tokens
        self.is_complete = False  # nothing may follow them, not even a stop token

    @property
    def waits(self) -> bool:
        """True if the last token must be read before the next mask is known."""
        return bool(self._phrases) or self.has_grammar

    @property
    def has_grammar(self) -> bool:
        return self._matcher is not None

    @property
    def num_choices(self) -> int:
        """Number of tokens that one step can choose.

        Penalties count the tokens of earlier steps, so the token after forced ones is chosen in a later step.
        """
        if not self.forced:
            return 1
        return len(self.forced) + (self._next is not None and not self._params.adjusts)

    def row(self, output_token_ids: Sequence[int], index: int) -> Words | None:
        """Mask of the output token `index`; None allows all.

        `output_token_ids` may lack tokens that have not been read, unless `waits` is true. With a grammar, update()
        must have seen them.
        """
        if not self.has_grammar:
            return self._static(output_token_ids, index)
        offset = index - len(output_token_ids)
        return self._next if offset == len(self.forced) else _only(self.forced[offset], self._size)

    def update(self, output_token_ids: Sequence[int], limit: int) -> None:
        """Read new tokens into the grammar and compute the next mask, after at most `limit` forced tokens.

        The output must stay as it is until this returns.
        """
        assert self._matcher is not None
        new = output_token_ids[self._num_read :]
        self._num_read = len(output_token_ids)
        chosen, self.forced = new[len(self.forced) :], self.forced[len(new) :]
        for chosen_token in chosen:
            self._next = None
            self._matcher.advance(chosen_token)
        self.error = self._matcher.error
        while self._next is None and self.error is None and len(self.forced) < limit and not self._is_stopped:
            words = self._allowed(output_token_ids)
            token = None if words is None else _single_token(words)
            if token is None:
                self._next = words
                return
            self.forced.append(token)
            if not self._is_stopped:
                self._matcher.advance(token)
                self.error = self._matcher.error

    @property
    def _is_stopped(self) -> bool:
        return bool(self.forced) and self.forced[-1] in self._params.stop_token_ids

    def _allowed(self, output_token_ids: Sequence[int]) -> Words | None:
        """Mask of the token after the forced ones; None if there can be none: then it sets `error` or `is_complete`."""
        assert self._matcher is not None
        words = np.zeros(self._size, np.uint32)
        self._matcher.fill(words)
        self.error = self._matcher.error
        self.is_complete = self._matcher.is_finished and not _contains_any(words, self._params.stop_token_ids)
        if self.error is not None or self.is_complete:
            return None
        recent = [*output_token_ids[-self._longest :], *self.forced]
        others = self._static(recent, len(output_token_ids) + len(self.forced))
        if others is not None:
            words &= others
        if not (words != 0).any():  # several times as fast as words.any()
            self.error = "the grammar and the other constraints of the request allow no token"
            return None
        return words

    def _static(self, output_token_ids: Sequence[int], index: int) -> Words | None:
        """Mask of the output token `index` without the grammar."""
        words = self._words_before_min_tokens if index < self._params.min_tokens else self._words
        forbidden = [phrase[-1] for phrase in self._phrases if _ends_with(output_token_ids, phrase[:-1])]
        return self._without(words, forbidden) if forbidden else words

    def _without(self, words: Words | None, ids: Iterable[int]) -> Words:
        result = np.full(self._size, 0xFFFFFFFF, np.uint32) if words is None else words.copy()
        tokens = np.fromiter(ids, np.int64)
        np.bitwise_and.at(result, tokens // 32, ~(np.uint32(1) << (tokens % 32).astype(np.uint32)))
        return result


def _only(token: int, size: int) -> Words:
    """Mask [size] of one token."""
    words = np.zeros(size, np.uint32)
    words[token // 32] = 1 << token % 32
    return words


def _single_token(words: Words) -> int | None:
    """The token that a mask allows, or None if it allows several or none."""
    used = words != 0
    if np.count_nonzero(used) != 1:
        return None
    index = int(used.argmax())
    word = int(words[index])
    return None if word & (word - 1) else index * 32 + word.bit_length() - 1


def _contains_any(words: Words, tokens: Iterable[int]) -> bool:
    return any(int(words[token // 32]) >> token % 32 & 1 for token in tokens)


def _ends_with(tokens: Sequence[int], suffix: tuple[int, ...]) -> bool:
    return len(tokens) >= len(suffix) and tuple(tokens[len(tokens) - len(suffix) :]) == suffix
