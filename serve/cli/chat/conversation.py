"""Conversation: the messages so far, and the replies with the log-probs of each token."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from model.token_logprobs import TokenLogprobs
from serve.jobs.output import Output
from serve.text.detokenizer import Detokenizer, StopStrings
from serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """Complete characters, with the lowest log-prob of their tokens."""

    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """A candidate for a position of a reply."""

    id: int
    logprob: float  # raw: before temperature and filters
    rank: int


@dataclass(frozen=True, slots=True)
class Token(Alternative):
    alternatives: tuple[Alternative, ...]  # the most likely tokens at its position


class Reply:
    """A reply, which grows while the engine generates it."""

    def __init__(self, tokenizer: Tokenizer, now: Callable[[], float]) -> None:
        """Create an empty reply; `now` is a clock in seconds."""
        self.text = ""  # complete characters; U+FFFD for invalid UTF-8
        self.tokens: list[Token] = []  # including one that ended the reply
        self.finish_reason: str | None = None  # None while it grows, and after it was stopped
        self._tokenizer = tokenizer
        self._now = now
        self._times: list[float] = []
        self._detokenizer = Detokenizer(tokenizer, StopStrings())
        self._pending = Piece("", 0.0)  # a character may take several tokens

    def add(self, output: Output) -> list[Piece]:
        """Append tokens. Returns the new pieces of text; each ends where both a token and a character end."""
        pieces: list[Piece] = []
        logprobs = output.all_logprobs(0)
        for row, token_id in enumerate(output.token_ids):
            token = _token(token_id, logprobs, row)
            self.tokens.append(token)
            self._times.append(self._now())
            if token_id in self._tokenizer.eos_token_ids or self._tokenizer.is_special(token_id):
                continue
            text, logprob = self._detokenizer.push(token_id), min(self._pending.logprob, token.logprob)
            self._pending = Piece(self._pending.text + text, logprob)
            if self._detokenizer.is_complete:
                pieces += self._release()
        self.finish_reason = output.finish_reason
        return pieces

    def end(self) -> list[Piece]:
        """The rest of the text after the last token."""
        self._pending = Piece(self._pending.text + self._detokenizer.finish(), self._pending.logprob)
        return self._release()

    def _release(self) -> list[Piece]:
        piece, self._pending = self._pending, Piece("", 0.0)
        self.text += piece.text
        return [piece] if piece.text else []

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
            "text": self._tokenizer.token_text(token.id),
            "bytes": [*self._tokenizer.token_bytes(token.id)],
            "logprob": token.logprob if math.isfinite(token.logprob) else None,
            "rank": token.rank,
        }


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


def _token(token_id: int, logprobs: TokenLogprobs, row: int) -> Token:
    top = (column[row].tolist() for column in (logprobs.top_ids, logprobs.top_logprobs, logprobs.top_ranks))
    alternatives = tuple(Alternative(*values) for values in zip(*top, strict=True))
    return Token(token_id, float(logprobs.logprob[row]), int(logprobs.rank[row]), alternatives)
