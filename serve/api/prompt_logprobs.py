"""The prompt's log-probs in an answer: vLLM's `prompt_logprobs`, as entries, columns, or full rows.

Entries and rows are written as JSON text, as building dictionaries for them would be slow.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from model.token_logprobs import TokenLogprobs
from serve.api.errors import engine_error
from serve.api.generation import Prompt, check_event, engine_errors
from serve.api.json_stream import Placeholder
from serve.api.logprobs import clamp
from serve.api.validation import PromptLogprobs
from serve.engine.client import EngineClient
from serve.engine.request import DeadlineError, EngineStoppedError, NotPinnedError, Request
from serve.text.detokenizer import decoded_tokens, whole_text
from serve.text.tokenizer import Tokenizer

_CONTEXT = 4  # preceding tokens that may contain the beginning of a token's character
_LARGE = 4096  # alternatives in entries of 80 bytes; fewer are written at once
_BLOCK_ENTRIES = 512
_BLOCK_ROWS = 8  # 5 MB for a vocabulary of 152k; one row of JSON is 10 MB


class PromptLogprobsWriter:
    """Writes the fields of an answer that contain a prompt's log-probs."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer) -> None:
        limits = engine.limits
        self._engine = engine
        self._entries = EntryWriter(tokenizer)
        self._rows = RowWriter(tokenizer, limits.vocab_size) if limits.full_vocab else None

    def fields(self, requested: PromptLogprobs, prompt: Prompt) -> dict[str, Any]:
        """`prompt_logprobs`, null unless requested, or `prompt_logprobs_columns`. Slow: run it in a thread."""
        k, start, ids = requested.k, requested.start, prompt.ids
        if k is None:
            return {"prompt_logprobs": None}
        if prompt.full_vocab_request is not None:
            logprobs = prompt.logprobs(self._engine.limits.max_logprobs, start)
            return {"prompt_logprobs": Placeholder(self._full_vocab(prompt.full_vocab_request, logprobs, k))}
        logprobs = prompt.logprobs(k, start)
        if requested.columns:
            columns = {
                "start": start,
                "token_ids": ids[start:],  # [n], n = prompt - start
                "logprobs": logprobs.logprob,  # [n]
                "ranks": logprobs.rank,  # [n]
                "top_token_ids": np.ascontiguousarray(logprobs.top_ids),  # [n, k]
                "top_logprobs": np.ascontiguousarray(logprobs.top_logprobs),  # [n, k]
                "top_ranks": np.ascontiguousarray(logprobs.top_ranks),  # [n, k]
            }
            return {"prompt_logprobs": None, "prompt_logprobs_columns": columns}
        blocks = self._entries.blocks(ids, logprobs, start)
        if logprobs.top_ids.size > _LARGE:
            return {"prompt_logprobs": Placeholder(_in_thread(blocks))}
        return {"prompt_logprobs": orjson.Fragment(b"".join(blocks))}

    async def _full_vocab(self, request: Request, logprobs: TokenLogprobs, k: int) -> AsyncGenerator[bytes]:
        """`prompt_logprobs` over the full vocabulary, one row at a time, to bound the memory.

        The pages of `request` (PromptScoring.full_vocab) are pinned while its rows are read, and it needs no others, so
        two answers never wait for each other's pages. `logprobs` starts at the same token and has the K best.
        """
        engine, writer, prompt, scoring = self._engine, self._rows, request.prompt_token_ids, request.params.prompt
        assert writer is not None
        assert scoring is not None
        start = min(scoring.start, len(prompt))
        piece = b"[" + b",".join([b"null"] * start)
        if start == len(prompt):
            yield piece + b"]"
            return
        # The prompt's choices have finished, so this request takes their place in the queue.
        with engine_errors(), engine.admit(request, bypass_limits=True) as handle:
            async for event in handle:
                check_event(event)
            for first in range(start - 1, len(prompt) - 1, _BLOCK_ROWS):
                rows = await _rows(engine, request, first, min(_BLOCK_ROWS, len(prompt) - 1 - first))
                for i, row in enumerate(rows, first):
                    row_logprobs = logprobs[i + 1 - start : i + 2 - start]
                    entry = await asyncio.to_thread(writer.row, row, prompt[i + 1], row_logprobs, k)
                    yield piece + b"," + entry
                    piece = b""
            yield b"]"


class EntryWriter:
    """Writes one entry per token. Caches the JSON of token texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names: dict[int, str | None] = {}  # None: the text depends on the tokens before it

    def blocks(self, token_ids: Sequence[int], logprobs: TokenLogprobs, start: int) -> Iterator[bytes]:
        """JSON of a list: for each token an object with its own entry, then those of its alternatives.

        Args:
            token_ids: the prompt.
            logprobs: result of `wire_logprobs` for the tokens from `start` on.
            start: tokens before it are null; at least 1.
        """
        yield b"[" + b",".join([b"null"] * min(start, len(token_ids)))
        for first in range(start, len(token_ids), _BLOCK_ENTRIES):
            rows = logprobs[first - start : first - start + _BLOCK_ENTRIES]
            yield b"," + ",".join(self._block(token_ids, rows, first)).encode()
        yield b"]"

    def _block(self, token_ids: Sequence[int], logprobs: TokenLogprobs, start: int) -> Iterator[str]:
        """The entries of the tokens from `start` on, one per row."""
        width = logprobs.top_ids.shape[1] + 1
        numbers = _json_numbers(np.column_stack((logprobs.logprob, logprobs.top_logprobs)))
        ranks = _json_numbers(np.column_stack((logprobs.rank, logprobs.top_ranks)))
        for row, top_ids in enumerate(logprobs.top_ids.tolist()):
            ids = [token_ids[start + row], *top_ids]
            names = self._names_of(ids, token_ids, start + row)
            columns = slice(row * width, (row + 1) * width)
            yield _entry(ids, numbers[columns], ranks[columns], names)

    def _names_of(self, ids: Sequence[int], prompt: Sequence[int], position: int) -> list[str]:
        names = []
        for token_id in ids:
            try:
                name = self._names[token_id]
            except KeyError:
                text = whole_text(self._tokenizer, token_id)
                name = self._names[token_id] = None if text is None else orjson.dumps(text).decode()
            if name is None:
                preceding = prompt[max(0, position - _CONTEXT) : position]
                name = orjson.dumps(decoded_tokens(self._tokenizer, preceding, [token_id])[0]).decode()
            names.append(name)
        return names


def _entry(ids: Sequence[int], logprobs: Sequence[str], ranks: Sequence[str], names: Sequence[str]) -> str:
    unique = dict.fromkeys(ids)
    # The token itself may be among the best: it is written once, as the first.
    indices = range(len(ids)) if len(unique) == len(ids) else [ids.index(token_id) for token_id in unique]
    return (
        "{"
        + ",".join(
            f'"{ids[j]}":{{"logprob":{logprobs[j]},"rank":{ranks[j]},"decoded_token":{names[j]}}}' for j in indices
        )
        + "}"
    )


def _json_numbers(values: NDArray[Any]) -> list[str]:
    return orjson.dumps(values.ravel(), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].decode().split(",")


class RowWriter:
    """Writes rows as JSON. The parts that do not depend on the row are prepared once, at start-up.

    `decoded_token` is the text of the token alone; it is empty for a part of a character.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        names = decoded_tokens(tokenizer, (), range(vocab_size))
        self._vocab_size = vocab_size  # V
        self._heads = np.array([f',"{token_id}":{{"logprob":' for token_id in range(vocab_size)], object)
        self._ranks = np.array([f',"rank":{rank},"decoded_token":' for rank in range(1, vocab_size + 1)], object)
        self._tails = np.array([orjson.dumps(name).decode() + "}" for name in names], object)

    def row(self, row: NDArray[np.float32], actual: int, logprobs: TokenLogprobs, k: int) -> bytes:
        """The entry of one prompt token: the token itself, then the alternatives, best first.

        Ranks follow a stable sort of the row. The token and the K best keep the numbers that all other answers have:
        their ranks come from logits, and different logits may give the same log-prob.

        Args:
            row: [V] log-probs.
            actual: id of the prompt token.
            logprobs: one row of the result of `wire_logprobs`, with the token and the K best.
            k: number of alternatives.

        Raises:
            APIError: 500 for a wrong length or NaN.
        """
        if row.shape != (self._vocab_size,):
            raise engine_error("The engine returned a row with the wrong length.")
        index = int(logprobs.rank[0]) - 1
        order = _order(row, logprobs.top_ids[0], actual, index)
        values = clamp(row)
        values[logprobs.top_ids[0]], values[actual] = logprobs.top_logprobs[0], logprobs.logprob[0]
        indices = np.concatenate(([index], np.delete(np.arange(k), index) if index < k else np.arange(k)))
        ids = order[indices]
        parts = [""] * (4 * len(ids))
        parts[0::4], parts[1::4] = self._heads[ids], _json_numbers(values[ids])
        parts[2::4], parts[3::4] = self._ranks[indices], self._tails[ids]
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


async def _in_thread(pieces: Iterator[bytes]) -> AsyncGenerator[bytes]:
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


async def _rows(engine: EngineClient, request: Request, start: int, count: int) -> NDArray[np.float32]:
    try:
        timeout = None if request.deadline == math.inf else max(0.0, request.deadline - time.monotonic())
        async with asyncio.timeout(timeout):
            rows = await engine.full_vocab_logprobs(request.id, start, count)
    except TimeoutError:
        raise DeadlineError from None
    except EngineStoppedError:
        raise engine_error("The engine failed: it has no rows for this prompt.") from None
    except NotPinnedError:
        message = "The prompt is no longer in the cache: its rows were read too slowly, or a step failed."
        raise engine_error(message) from None
    if len(rows) != count:
        raise engine_error("The engine returned the wrong number of rows.")
    return rows
