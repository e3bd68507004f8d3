"""`prompt_logprobs` over the full vocabulary, written row by row so that memory is bounded.

A prompt's rows are part of its first choice only; the other choices have null.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator

import numpy as np
import orjson
from numpy.typing import NDArray

from serve.api.errors import engine_error
from serve.api.generation import check_event, deadline_exceeded, engine_errors
from serve.api.logprobs import checked, clamped
from serve.engine.client import EngineClient
from serve.engine.request import EngineStoppedError, NotPinnedError, Request, TokenScores
from serve.text.token_strings import decoded_tokens
from serve.text.tokenizer import Tokenizer

_BLOCK_ROWS = 8  # 5 MB for a vocabulary of 152k; one row of JSON is 10 MB


class RowWriter:
    """Writes rows as JSON. The parts that do not depend on the row are prepared once, at start-up.

    `decoded_token` is the text of the token alone; it is empty for a part of a character.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        names = decoded_tokens(tokenizer, (), range(vocab_size))
        self._vocab_size = vocab_size  # V
        self._heads = [f',"{token_id}":{{"logprob":' for token_id in range(vocab_size)]
        self._ranks = [f',"rank":{rank},"decoded_token":' for rank in range(1, vocab_size + 1)]
        self._tails = [orjson.dumps(name).decode() + "}" for name in names]

    def row(self, row: NDArray[np.float32], actual: int, scores: TokenScores, k: int) -> bytes:
        """The entry of one prompt token: the token itself, then the alternatives, best first.

        Ranks follow a stable sort of the row. The token and the K best keep the numbers that all other answers have:
        their ranks come from logits, and different logits may give the same log-prob.

        Args:
            row: [V] log-probs.
            actual: id of the prompt token.
            scores: one row, with the token and the K best.
            k: number of alternatives.

        Raises:
            APIError: 500 for a wrong length or NaN.
        """
        if row.shape != (self._vocab_size,):
            raise engine_error("The engine returned a row with the wrong length.")
        index = int(scores.rank[0]) - 1
        order = _order(row, scores.top_ids[0], actual, index)
        values = clamped(row)
        values[scores.top_ids[0]] = clamped(scores.top_logprobs[0])
        values[actual] = clamped(scores.logprob)[0]
        indices = np.concatenate(([index], np.delete(np.arange(k), index) if index < k else np.arange(k)))
        ids = order[indices]
        logprobs = orjson.dumps(values[ids], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].decode().split(",")
        parts = [""] * (4 * len(ids))
        parts[0::4], parts[1::4] = _pick(self._heads, ids), logprobs
        parts[2::4], parts[3::4] = _pick(self._ranks, indices), _pick(self._tails, ids)
        return b"{" + "".join(parts).encode()[1:] + b"}"


def _order(row: NDArray[np.float32], top_ids: NDArray[np.int32], actual: int, index: int) -> NDArray[np.intp]:
    """All ids [V], best first: the K best as given, then the others, with `actual` at `index`."""
    others = np.ones(len(row), np.bool_)
    others[top_ids] = others[actual] = False
    rest = np.argsort(-row, kind="stable")
    rest = rest[others[rest]]
    if index >= len(top_ids):
        rest = np.insert(rest, index - len(top_ids), actual)
    order = np.concatenate((top_ids.astype(np.intp), rest))
    if order[index] != actual:
        raise engine_error("The engine returned the rank of another token.")
    return order


def _pick(strings: list[str], indices: NDArray[np.intp]) -> list[str]:
    return [strings[index] for index in indices.tolist()]


async def whole_rows(
    engine: EngineClient, writer: RowWriter, request: Request, scores: TokenScores, k: int
) -> AsyncGenerator[bytes]:
    """The JSON of `prompt_logprobs`, one row at a time.

    Args:
        engine: runs the request.
        writer: formats the rows.
        request: has PromptScoring.full_vocab. Its pages are pinned while rows are read, and it needs no others then,
            so two answers never wait for each other's pages.
        scores: [prompt - 1] of the same prompt, from another request.
        k: number of alternatives.

    Raises:
        APIError: the engine failed, see `engine_errors`; 500 for inconsistent scores.
    """
    prompt, scoring = request.prompt_token_ids, request.params.prompt
    assert scoring is not None
    start = min(scoring.start, len(prompt))
    checked(scores, len(prompt) - 1, engine.limits.max_logprobs)
    piece = b"[" + b",".join([b"null"] * start)
    if start == len(prompt):
        yield piece + b"]"
        return
    # Takes the place in the queue of the prompt's choices, which have finished.
    with engine_errors(), engine.admit(request, bypass_limits=True) as handle:
        async for event in handle:
            check_event(event)
        for first in range(start - 1, len(prompt) - 1, _BLOCK_ROWS):
            rows = await _rows(engine, request, first, min(_BLOCK_ROWS, len(prompt) - 1 - first))
            for i, row in enumerate(rows, first):
                entry = await asyncio.to_thread(writer.row, row, prompt[i + 1], scores[i : i + 1], k)
                yield piece + b"," + entry
                piece = b""
        yield b"]"


async def _rows(engine: EngineClient, request: Request, start: int, count: int) -> NDArray[np.float32]:
    try:
        timeout = None if request.deadline == math.inf else max(0.0, request.deadline - time.monotonic())
        async with asyncio.timeout(timeout):
            rows = await engine.full_logprobs(request.id, start, count)
    except TimeoutError:
        raise deadline_exceeded() from None
    except EngineStoppedError:
        raise engine_error("The engine failed: it has no rows for this prompt.") from None
    except NotPinnedError:
        raise engine_error("The rows were read too slowly: the prompt has been evicted from the cache.") from None
    if len(rows) != count:
        raise engine_error("The engine returned the wrong number of rows.")
    return rows
