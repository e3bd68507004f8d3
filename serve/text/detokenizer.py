"""Token ids to text: incrementally until a stop string, or one token in its context."""

import codecs
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

from serve.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_CONTEXT = 4  # tokens: a UTF-8 character has at most four bytes


class Detokenizer:
    """The text of one output, in pieces. The concatenated text does not depend on how the tokens arrive.

    The text is the tokens' bytes decoded as UTF-8, with U+FFFD for invalid bytes. With SentencePiece, the space before
    the first word is kept, because the output continues a prompt.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: "StopStrings",
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
        prefix: bytes = b"",
        kept_ids: Collection[int] = (),
    ) -> None:
        """Make a detokenizer.

        Args:
            prefix: start of an incomplete character, which the output completes.
            kept_ids: special tokens that are never skipped.
        """
        self._tokenizer = tokenizer
        self._held_tokens = min_tokens  # number of tokens to come that cannot complete a stop string
        self._skip_special_tokens = skip_special_tokens
        self._kept_ids = kept_ids
        self.include_stop = include_stop  # the text includes the stop string
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._utf8.decode(prefix)
        self._stop = stop
        self._node = 0  # of `stop`: what the text ends with
        self._pending = ""  # text that may be the start of a stop string
        self.stopped_by: str | None = None  # stop string that ended the text; the longest if several end together

    @property
    def is_complete(self) -> bool:
        """True if the tokens so far end with a complete character."""
        return not self._utf8.getstate()[0]

    def push(self, token_id: int) -> str:
        """Add a token. Returns the text that is now certain; "" after a stop string."""
        self._held_tokens -= 1
        is_skipped = self._skip_special_tokens and self._tokenizer.is_special(token_id)
        if self.stopped_by is not None or (is_skipped and token_id not in self._kept_ids):
            return ""
        return self._release(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """The remaining text, with U+FFFD for an incomplete character."""
        if self.stopped_by is not None:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        rest, self._pending = self._pending, ""
        return text + rest

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        known = self._pending + text
        for index, character in enumerate(text, start=len(self._pending) + 1):
            self._node, stop = self._stop.advance(self._node, character)
            if stop is not None and self._held_tokens < 0:
                self.stopped_by, self._pending = stop, ""
                return known[: index if self.include_stop else index - len(stop)]
        certain = len(known) - self._stop.matched(self._node)
        self._pending = known[certain:]
        return known[:certain]


class StopStrings:
    """Aho-Corasick automaton of stop strings: constant time per character on average, for any number of strings.

    A node is a prefix of a stop string, 0 the empty one; the state of a text is the longest prefix that it ends with.
    Immutable, so that all outputs of a request share one. 100,000 characters take 0.1 s and 24 MB.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        """Build the automaton, which is falsy without strings. Raise ValueError for an empty string."""
        self._next: list[dict[str, int]] = [{}]
        self._length = [0]  # characters of the prefix
        self._stop: list[str | None] = [None]  # longest stop string at the end of the prefix
        for string in stop:
            if not string:
                raise ValueError("a stop string is empty")
            node = 0
            for character in string:
                if character not in self._next[node]:
                    self._next[node][character] = len(self._next)
                    self._next.append({})
                    self._length.append(self._length[node] + 1)
                    self._stop.append(None)
                node = self._next[node][character]
            self._stop[node] = string
        self._fallback = [0] * len(self._next)  # longest other prefix at its end
        queue = deque(self._next[0].values())
        while queue:  # shorter prefixes first: a fallback is complete before it is used
            node = queue.popleft()
            for character, child in self._next[node].items():
                self._fallback[child] = self._after(self._fallback[node], character)
                queue.append(child)
            if self._stop[node] is None:
                self._stop[node] = self._stop[self._fallback[node]]

    def __bool__(self) -> bool:
        return len(self._next) > 1

    def matched(self, node: int) -> int:
        """Number of characters at the end of a text in this state that may be the start of a stop string."""
        return self._length[node]

    def advance(self, node: int, character: str) -> tuple[int, str | None]:
        """The state after another character, and the stop string that it completes, if any."""
        node = self._after(node, character)
        return node, self._stop[node]

    def _after(self, node: int, character: str) -> int:
        while node and character not in self._next[node]:
            node = self._fallback[node]
        return self._next[node].get(character, 0)


@dataclass(frozen=True, slots=True)
class Echo:
    """Text of a prompt, which an output continues."""

    text: str = ""
    offsets: Sequence[int] = ()  # for each token of the prompt, the code points of the text before it
    tail: bytes = b""  # start of a character after the text, which the output may complete

    @classmethod
    def decode(cls, tokenizer: Tokenizer, token_ids: Sequence[int]) -> Self:
        """The text of a prompt's tokens, special ones included."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [utf8.decode(tokenizer.token_bytes(token_id)) for token_id in token_ids]
        text = "".join(pieces)
        dropped = int(tokenizer.drops_space and text.startswith(" "))
        ends = accumulate(map(len, pieces), initial=-dropped)
        return cls(text[dropped:], [max(end, 0) for end, _ in zip(ends, pieces, strict=False)], utf8.getstate()[0])


def decoded_tokens(tokenizer: Tokenizer, context_ids: Sequence[int], candidate_ids: Sequence[int]) -> list[str]:
    """The `decoded_token` of each candidate for a position, as in vLLM. Special tokens are written out.

    A candidate whose text ends in an incomplete character is decoded together with up to four preceding tokens: it gets
    the character if that completes it, else "". The tokens that start a character have "".
    """
    context = [tokenizer.token_bytes(index) for index in context_ids[-_MAX_CONTEXT:]]
    return [_decoded(context, tokenizer.token_bytes(index)) for index in candidate_ids]


def whole_text(tokenizer: Tokenizer, token_id: int) -> str | None:
    """The text of a token; None if it ends in an incomplete character, whose text depends on the preceding tokens."""
    data = tokenizer.token_bytes(token_id)
    return None if _is_incomplete(data) else _text(data)


def _decoded(context: list[bytes], token: bytes) -> str:
    if not _is_incomplete(token):
        return _text(token)
    for start in range(len(context) - 1, -1, -1):
        if _is_incomplete(b"".join(context[start:]) + token):
            continue
        while start < len(context) and not all(map(_is_incomplete, context[start:])):
            start += 1  # this token is complete and has its own text
        return _text(b"".join(context[start:]) + token)
    return ""


def _is_incomplete(data: bytes) -> bool:
    """True if the data ends in an incomplete character: its text ends in U+FFFD, but the data does not."""
    return _text(data).endswith(_REPLACEMENT) and not data.endswith(_REPLACEMENT.encode())


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
