"""TokenMask: the tokens that a request may generate next, as a bit mask in llguidance's layout."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from compiled.state import mask_words
from serve.engine.request import SamplingParams

type Words = NDArray[np.uint32]  # packed mask [W], W = mask_words(V)


class TokenMask:
    """The mask of one request. Bit i of word w is set if token 32 w + i is allowed.

    Words that do not depend on the output are packed once; a request without constraints has none.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self._size = mask_words(vocab_size)
        self._min_tokens = params.min_tokens
        self._phrases = [word for word in params.bad_words if len(word) > 1]
        self.waits = bool(self._phrases)  # the last token must be read before the next step is dispatched
        allowed = params.allowed_token_ids
        self._words = None if allowed is None else ~self._without(None, allowed)
        if tokens := [word[0] for word in params.bad_words if len(word) == 1]:
            self._words = self._without(self._words, tokens)
        self._words_before_min_tokens = self._words
        if params.min_tokens and params.stop_token_ids:
            self._words_before_min_tokens = self._without(self._words, params.stop_token_ids)

    def row(self, output_token_ids: Sequence[int], index: int) -> Words | None:
        """Mask of the output token `index`; None allows all.

        `output_token_ids` may lack tokens that have not been read, unless `waits` is true.
        """
        words = self._words_before_min_tokens if index < self._min_tokens else self._words
        forbidden = [phrase[-1] for phrase in self._phrases if _ends_with(output_token_ids, phrase[:-1])]
        return self._without(words, forbidden) if forbidden else words

    def _without(self, words: Words | None, ids: Iterable[int]) -> Words:
        result = np.full(self._size, 0xFFFFFFFF, np.uint32) if words is None else words.copy()
        tokens = np.fromiter(ids, np.int64)
        np.bitwise_and.at(result, tokens // 32, ~(np.uint32(1) << (tokens % 32).astype(np.uint32)))
        return result


def _ends_with(tokens: Sequence[int], suffix: tuple[int, ...]) -> bool:
    return len(tokens) >= len(suffix) and tuple(tokens[len(tokens) - len(suffix) :]) == suffix
