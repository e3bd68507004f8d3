"""Conversation: the messages so far, and the replies with the log-probs of each token."""

import codecs
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from model.token_logprobs import TokenLogprobs
from serve.jobs.generate import Output
from serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """Complete characters, with the lowest log-prob of their tokens."""

    text: str
    logprob: float


class TextStream:
    """Joins tokens until their bytes end with a character: a character may take several tokens.

    The concatenated pieces are the text, with U+FFFD for invalid UTF-8.
    """

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._logprob = 0.0

    def push(self, data: bytes, logprob: float) -> Piece | None:
        """Add the bytes of a token. Returns the piece that ends with it, if one does."""
        self._text += self._utf8.decode(data)
        self._logprob = min(self._logprob, logprob)
        incomplete, _ = self._utf8.getstate()
        return None if incomplete else self._release()

    def finish(self) -> Piece | None:
        """The rest, with U+FFFD for an incomplete character."""
        self._text += self._utf8.decode(b"", final=True)
        return self._release()

    def _release(self) -> Piece | None:
        piece = Piece(self._text, self._logprob) if self._text else None
        self._text, self._logprob = "", 0.0
        return piece


@dataclass(frozen=True, slots=True)
class Alternative:
    """A candidate for a position of a reply."""

    id: int
    logprob: float  # raw: before temperature and filters
    rank: int


@dataclass(frozen=True, slots=True)
class Token(Alternative):
    alternatives: tuple[Alternative, ...]  # the most likely tokens at its position


@dataclass(slots=True)
class Reply:
    """A reply; grows with the engine's events."""

    tokenizer: Tokenizer
    now: Callable[[], float]  # clock, seconds
    text: str = ""
    tokens: list[Token] = field(default_factory=list)  # including one that ended the reply
    finish_reason: str | None = None  # None while it grows and after it was stopped
    _times: list[float] = field(default_factory=list)
    _stream: TextStream = field(default_factory=TextStream)

    def add(self, output: Output) -> list[Piece]:
        """Append tokens. Returns the new pieces of text."""
        pieces: list[Piece | None] = []
        scores = output.all_scores(0)
        for row, token_id in enumerate(output.token_ids):
            token = _token(token_id, scores, row)
            self.tokens.append(token)
            self._times.append(self.now())
            if token_id not in self.tokenizer.eos_token_ids and not self.tokenizer.is_special(token_id):
                pieces.append(self._stream.push(self.tokenizer.token_bytes(token_id), token.logprob))
        self.finish_reason = output.finish_reason
        return self._append(pieces)

    def end(self) -> list[Piece]:
        """The rest of the text after the last token."""
        return self._append([self._stream.finish()])

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token, which includes the prefill."""
        seconds = self._times[-1] - self._times[0] if self._times else 0.0
        return (len(self._times) - 1) / seconds if seconds > 0 else None

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-prob; 1 without tokens."""
        return math.exp(-sum(token.logprob for token in self.tokens) / max(1, len(self.tokens)))

    def most_surprising(self, count: int) -> list[int]:
        """Indices of tokens with a rank above 1, the least likely first."""
        indices = [i for i, token in enumerate(self.tokens) if token.rank > 1]
        return sorted(indices, key=lambda i: self.tokens[i].logprob)[:count]

    def as_json(self) -> dict[str, Any]:
        tokens = [self._as_json(token) | {"best": [*map(self._as_json, token.alternatives)]} for token in self.tokens]
        return {"text": self.text, "finish_reason": self.finish_reason or "stopped", "tokens": tokens}

    def _as_json(self, token: Alternative) -> dict[str, Any]:
        return {
            "id": token.id,
            "text": self.tokenizer.token_text(token.id),
            "bytes": [*self.tokenizer.token_bytes(token.id)],
            "logprob": token.logprob if math.isfinite(token.logprob) else None,
            "rank": token.rank,
        }

    def _append(self, pieces: list[Piece | None]) -> list[Piece]:
        complete = [piece for piece in pieces if piece is not None]
        self.text += "".join(piece.text for piece in complete)
        return complete


@dataclass(frozen=True, slots=True)
class Turn:
    user: str
    reply: Reply


@dataclass(slots=True)
class Conversation:
    """Turns after an optional system message."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    unsent: str | None = None  # the last message, if it has no reply

    def messages(self, text: str | None = None) -> list[dict[str, Any]]:
        """All messages for the template, with `text` as the user's last one."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.reply.text}]
        return messages if text is None else [*messages, {"role": "user", "content": text}]

    def undo(self) -> str | None:
        """The message to send again: the one without a reply, or the last one, whose reply is removed."""
        if self.unsent is None and self.turns:
            self.unsent = self.turns.pop().user
        return self.unsent

    def as_json(self) -> dict[str, Any]:
        return {"messages": self.messages(), "replies": [turn.reply.as_json() for turn in self.turns]}


def _token(token_id: int, scores: TokenLogprobs, row: int) -> Token:
    ids, ranks, logprobs = (column[row].tolist() for column in (scores.top_ids, scores.top_ranks, scores.top_logprobs))
    alternatives = tuple(Alternative(*values) for values in zip(ids, logprobs, ranks, strict=True))
    return Token(token_id, float(scores.logprob[row]), int(scores.rank[row]), alternatives)
