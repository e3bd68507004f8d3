"""Rows of `prompt_logprobs` that hold (nearly) the whole vocabulary: written one at a time, never held together.

A prompt's rows are told once: in its first choice, and null in its others.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import numpy as np
import orjson
from numpy.typing import NDArray

from serve.api.errors import engine_error
from serve.api.generation import Engine, events_of, too_late
from serve.api.logprobs import checked, clamped
from serve.engine.request import EngineStoppedError, NotHeldError, Place, Request, TokenScores
from serve.text.token_strings import decoded_tokens
from serve.text.tokenizer import Tokenizer

_ROWS_AT_ONCE = 8  # of a vocabulary of 152k they take 5 MB; as JSON one row takes 10 MB


class RowWriter:
    """Writes rows as JSON. What does not depend on the row is written once, when the server starts.

    A token is named by its own text alone: one that is a part of a character has none.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        names = decoded_tokens(tokenizer, (), range(vocab_size))
        self._vocab_size = vocab_size  # V
        self._heads = [f',"{token_id}":{{"logprob":' for token_id in range(vocab_size)]
        self._ranks = [f',"rank":{rank},"decoded_token":' for rank in range(1, vocab_size + 1)]
        self._tails = [orjson.dumps(name).decode() + "}" for name in names]

    def row(self, row: NDArray[np.float32], actual: int, scores: TokenScores, k: int) -> bytes:
        """The entry of one prompt token: the token itself, then the others, best first.

        A rank is the place in a stable sort from the best down. The token and the K best have the very numbers that
        are told of them elsewhere: their ranks come from logits, two of which may have one log-prob.

        Args:
            row: [V] log-probs.
            actual: the token.
            scores: one row, of the token and of the K best.
            k: how many of the best are shown.

        Raises:
            APIError: 500 for another length, or a number that is not one.
        """
        if row.shape != (self._vocab_size,):
            raise engine_error("The engine returned a row of another length than the vocabulary's.")
        place = int(scores.rank[0]) - 1
        order = _order(row, scores.top_ids[0], actual, place)
        values = clamped(row)
        values[scores.top_ids[0]] = clamped(scores.top_logprobs[0])
        values[actual] = clamped(scores.logprob)[0]
        places = np.concatenate(([place], np.delete(np.arange(k), place) if place < k else np.arange(k)))
        ids = order[places]
        numbers = orjson.dumps(values[ids], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].decode().split(",")
        parts = [""] * (4 * len(ids))
        parts[0::4], parts[1::4] = _pick(self._heads, ids), numbers
        parts[2::4], parts[3::4] = _pick(self._ranks, places), _pick(self._tails, ids)
        return b"{" + "".join(parts).encode()[1:] + b"}"


def _order(row: NDArray[np.float32], top_ids: NDArray[np.int32], actual: int, place: int) -> NDArray[np.intp]:
    """All ids [V], best first: the K that are known to be the best, then the others, `actual` at its place."""
    others = np.ones(len(row), np.bool_)
    others[top_ids] = others[actual] = False
    rest = np.argsort(-row, kind="stable")
    rest = rest[others[rest]]
    if place >= len(top_ids):
        rest = np.insert(rest, place - len(top_ids), actual)
    order = np.concatenate((top_ids.astype(np.intp), rest))
    if order[place] != actual:
        raise engine_error("The engine returned a rank that is not the token's.")
    return order


def _pick(strings: list[str], at: NDArray[np.intp]) -> list[str]:
    return [strings[index] for index in at.tolist()]


async def whole_rows(
    engine: Engine, writer: RowWriter, request: Request, scores: TokenScores, k: int
) -> AsyncGenerator[bytes]:
    """The JSON of `prompt_logprobs`, in pieces of a row each.

    Args:
        request: scores its prompt whole, and is submitted here. It holds its pages while rows are asked for, and waits
            for nobody then: two answers can never wait for each other's pages.
        scores: [prompt - 1] of the same prompt, as told by another request.
        k: how many of the best are shown.

    Raises:
        APIError: as in `Choice.deltas`.
    """
    prompt, scoring = request.prompt_token_ids, request.params.prompt
    assert scoring is not None
    start = min(scoring.start, len(prompt))
    checked(scores, len(prompt) - 1, engine.limits.max_logprobs)
    piece = b"[" + b",".join([b"null"] * start)
    request.place = Place.GIVEN  # its choices', which have ended
    try:
        if start < len(prompt):
            async with aclosing(events_of(engine, request)) as events:
                async for _ in events:
                    pass
        for first in range(start - 1, len(prompt) - 1, _ROWS_AT_ONCE):
            rows = await _rows(engine, request, first, min(_ROWS_AT_ONCE, len(prompt) - 1 - first))
            for i, row in enumerate(rows, first):
                entry = await asyncio.to_thread(writer.row, row, prompt[i + 1], scores[i : i + 1], k)
                yield piece + b"," + entry
                piece = b""
        yield piece + b"]"
    finally:
        engine.abort(request.id)


async def _rows(engine: Engine, request: Request, start: int, count: int) -> NDArray[np.float32]:
    try:
        left = None if request.end_by == math.inf else max(0.0, request.end_by - time.monotonic())
        async with asyncio.timeout(left):
            rows = await engine.vocabulary(request.id, start, count)
    except TimeoutError:
        raise too_late() from None
    except EngineStoppedError:
        raise engine_error("The engine failed: it has no rows for this prompt.") from None
    except NotHeldError:
        raise engine_error("The rows were not read for so long that the cache forgot the prompt.") from None
    if len(rows) != count:
        raise engine_error("The engine returned another number of rows than asked for.")
    return rows
