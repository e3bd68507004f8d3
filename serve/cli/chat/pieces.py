"""Tokens to pieces of text that can be shown: a character may take several tokens, and a token end inside of one."""

import codecs
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole characters, and how likely the least likely of their tokens was."""

    text: str
    logprob: float


class Pieces:
    """Collects tokens until their bytes end with a character. Joined, the pieces are the text, with U+FFFD for what
    is no UTF-8.
    """

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._logprob = 0.0

    def push(self, data: bytes, logprob: float) -> Piece | None:
        """Takes the bytes of one token; the piece that ends with it, if one does."""
        self._text += self._utf8.decode(data)
        self._logprob = min(self._logprob, logprob)
        waiting, _ = self._utf8.getstate()
        return None if waiting else self._release()

    def finish(self) -> Piece | None:
        """What is left, with U+FFFD for a character that was never completed."""
        self._text += self._utf8.decode(b"", final=True)
        return self._release()

    def _release(self) -> Piece | None:
        piece = Piece(self._text, self._logprob) if self._text else None
        self._text, self._logprob = "", 0.0
        return piece
