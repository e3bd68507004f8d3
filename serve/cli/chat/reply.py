"""Reply: what the model said, with the numbers of each token."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serve.cli.chat.pieces import Piece, Pieces
from serve.engine.request import FinishReason, TokenEvent, TokenScores
from serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have stood at a place."""

    id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class Said:
    """One token of a reply; `best` are the most likely ones at its place."""

    id: int
    logprob: float  # raw: before temperature and filters
    rank: int
    best: tuple[Alternative, ...]


@dataclass(slots=True)
class Reply:
    """Grows with the engine's events."""

    tokenizer: Tokenizer
    now: Callable[[], float]  # seconds
    text: str = ""
    tokens: list[Said] = field(default_factory=list)  # the one that ended it included
    finish_reason: FinishReason | None = None  # None: it was stopped, or still comes
    _times: list[float] = field(default_factory=list)
    _pieces: Pieces = field(default_factory=Pieces)

    def add(self, event: TokenEvent) -> list[Piece]:
        """Takes an event; the pieces of text that came with it."""
        pieces: list[Piece | None] = []
        for i, token_id in enumerate(event.token_ids):
            said = _said(token_id, event.scores, i)
            self.tokens.append(said)
            self._times.append(self.now())
            if token_id != event.stop_token_id and not self.tokenizer.is_special(token_id):
                pieces.append(self._pieces.push(self.tokenizer.token_bytes(token_id), said.logprob))
        self.finish_reason = event.finish_reason
        return self._noted(pieces)

    def end(self) -> list[Piece]:
        """What is left of the text, when no more events come."""
        return self._noted([self._pieces.finish()])

    @property
    def tokens_per_second(self) -> float | None:
        """Of those after the first, for which the prompt had to be read."""
        seconds = self._times[-1] - self._times[0] if self._times else 0.0
        return (len(self._times) - 1) / seconds if seconds > 0 else None

    @property
    def perplexity(self) -> float:
        """exp of the mean surprise; 1 where nothing was surprising."""
        return math.exp(-sum(said.logprob for said in self.tokens) / max(1, len(self.tokens)))

    def most_surprising(self, count: int) -> list[int]:
        """Places of tokens, the least likely first, as far as something else was likelier than they."""
        places = [i for i, said in enumerate(self.tokens) if said.rank > 1]
        return sorted(places, key=lambda i: self.tokens[i].logprob)[:count]

    def as_json(self) -> dict[str, Any]:
        """All there is to know of it."""
        return {
            "text": self.text,
            "finish_reason": str(self.finish_reason or "stopped"),
            "tokens": [self._token_json(said) | {"best": [*map(self._token_json, said.best)]} for said in self.tokens],
        }

    def _token_json(self, token: Said | Alternative) -> dict[str, Any]:
        finite = token.logprob if math.isfinite(token.logprob) else None
        data = self.tokenizer.token_bytes(token.id)
        text = self.tokenizer.token_text(token.id)
        return {"id": token.id, "text": text, "bytes": [*data], "logprob": finite, "rank": token.rank}

    def _noted(self, pieces: list[Piece | None]) -> list[Piece]:
        whole = [piece for piece in pieces if piece is not None]
        self.text += "".join(piece.text for piece in whole)
        return whole


def _said(token_id: int, scores: TokenScores, row: int) -> Said:
    ids, ranks, logprobs = (column[row].tolist() for column in (scores.top_ids, scores.top_ranks, scores.top_logprobs))
    best = tuple(Alternative(*each) for each in zip(ids, logprobs, ranks, strict=True))
    return Said(token_id, float(scores.logprob[row]), int(scores.rank[row]), best)
