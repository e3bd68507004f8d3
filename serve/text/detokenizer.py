"""Token ids to text as they come: whole characters only, ended by stop strings."""

import codecs
from collections import deque
from collections.abc import Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """What a Detokenizer needs of a tokenizer."""

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text."""

    def is_special(self, token_id: int) -> bool:
        """Whether the token is markup."""


class Detokenizer:
    """The text of one output, in pieces. However the pieces are cut, joined they are the same text.

    The text is that of the tokens' true bytes as one UTF-8 string, with U+FFFD where it is not valid. For a
    SentencePiece tokenizer the space before the first word stays, as the output continues a prompt.

    Attributes:
        stopped_by: the stop string that ended the text, None so far. Where several end at the same character, the
            longest of them.
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        *,
        skip_special_tokens: bool,
        stop: "StopStrings",
        include_stop_str_in_output: bool,
    ) -> None:
        """Starts with empty text; `stop` may be shared with others."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._include_stop = include_stop_str_in_output
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = stop
        self._node = 0  # of `stop`: what the text ends with
        self._held = ""  # text that may turn out to begin a stop string
        self.stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; "" once the text has ended."""
        if self.stopped_by is not None or (self._skip_special_tokens and self._tokenizer.is_special(token_id)):
            return ""
        return self._release(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """The rest: what was held back, with U+FFFD for a character that was never completed."""
        if self.stopped_by is not None:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        known = self._held + text
        for index, character in enumerate(text, start=len(self._held) + 1):
            self._node, stop = self._stop.advance(self._node, character)
            if stop is not None:
                self.stopped_by, self._held = stop, ""
                return known[: index if self._include_stop else index - len(stop)]
        certain = len(known) - self._stop.matched(self._node)
        self._held = known[certain:]
        return known[:certain]


class StopStrings:
    """Aho-Corasick automaton over stop strings: constant time per character on average, however many there are.

    A node is a prefix of some stop string; 0 is the empty one. A text stands at the longest that it ends with. Nothing
    changes once it is made, so all answers to a request share one: 100,000 characters take 0.1 s and 24 MB.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        """Makes the automaton. False if there are no strings.

        Raises:
            ValueError: a string is empty.
        """
        self._next: list[dict[str, int]] = [{}]
        self._length = [0]  # characters of the prefix
        self._found: list[str | None] = [None]  # the longest stop string that the prefix ends with
        for string in stop:
            self._insert(string)
        self._fallback = [0] * len(self._next)  # the longest other prefix that this one ends with
        self._link()

    def __bool__(self) -> bool:
        return len(self._next) > 1

    def matched(self, node: int) -> int:
        """Characters at the end of a text at this node that may begin a stop string."""
        return self._length[node]

    def advance(self, node: int, character: str) -> tuple[int, str | None]:
        """The node after one more character, and the stop string that it completes, if any."""
        node = self._after(node, character)
        return node, self._found[node]

    def _insert(self, string: str) -> None:
        if not string:
            raise ValueError("a stop string is empty")
        node = 0
        for character in string:
            if character not in self._next[node]:
                self._next[node][character] = len(self._next)
                self._next.append({})
                self._length.append(self._length[node] + 1)
                self._found.append(None)
            node = self._next[node][character]
        self._found[node] = string

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:  # shorter prefixes first, so that a fallback is complete before it is needed
            node = queue.popleft()
            for character, child in self._next[node].items():
                self._fallback[child] = self._after(self._fallback[node], character)
                queue.append(child)
            if self._found[node] is None:
                self._found[node] = self._found[self._fallback[node]]

    def _after(self, node: int, character: str) -> int:
        while node and character not in self._next[node]:
            node = self._fallback[node]
        return self._next[node].get(character, 0)
