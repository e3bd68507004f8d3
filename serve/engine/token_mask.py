"""TokenMask: which tokens a request may choose next, as packed words that a grammar's mask can be ANDed with later."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from compiled.state import mask_words
from serve.engine.request import SamplingParams

type Words = NDArray[np.uint32]  # [W], W = mask_words(V)


class TokenMask:
    """The mask of one request. Bit i of word w is set if token 32 w + i may be chosen (llguidance's layout).

    What does not depend on the output is packed once; a request without constraints costs nothing.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        """Packs what the parameters forbid whatever has been chosen before."""
        self._size = mask_words(vocab_size)
        self._min_tokens = params.min_tokens
        self._phrases = [word for word in params.bad_words if len(word) > 1]
        self.waits = bool(self._phrases)
        self._late = self._only(params.allowed_token_ids)
        if words := [word[0] for word in params.bad_words if len(word) == 1]:
            self._late = self._without(self._late, words)
        self._early = self._late  # until min_tokens are chosen
        if params.min_tokens and params.stop_token_ids:
            self._early = self._without(self._late, params.stop_token_ids)

    def row(self, output_token_ids: Sequence[int], num_chosen: int) -> Words | None:
        """The words for the token after `output_token_ids`, of which `num_chosen` came before it; None = any token."""
        words = self._early if num_chosen < self._min_tokens else self._late
        forbidden = [phrase[-1] for phrase in self._phrases if _ends_with(output_token_ids, phrase[:-1])]
        return self._without(words, forbidden) if forbidden else words

    def _only(self, ids: Iterable[int] | None) -> Words | None:
        if ids is None:
            return None
        words = np.zeros(self._size, np.uint32)
        index, bits = _places(ids)
        np.bitwise_or.at(words, index, bits)
        return words

    def _without(self, words: Words | None, ids: Iterable[int]) -> Words:
        left = np.full(self._size, 0xFFFFFFFF, np.uint32) if words is None else words.copy()
        index, bits = _places(ids)
        np.bitwise_and.at(left, index, ~bits)
        return left


def _ends_with(tokens: Sequence[int], run: tuple[int, ...]) -> bool:
    return len(tokens) >= len(run) and tuple(tokens[len(tokens) - len(run) :]) == run


def _places(ids: Iterable[int]) -> tuple[NDArray[np.int64], Words]:
    """The words in which tokens lie, and their bits there."""
    index = np.fromiter(ids, np.int64)
    return index // 32, np.uint32(1) << (index % 32).astype(np.uint32)
