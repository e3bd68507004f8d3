"""vLLM's `prompt_logprobs` as JSON text: an object for each of many tokens, so no dictionaries are made for them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from serve.api.logprobs import checked, clamped
from serve.engine.request import TokenScores
from serve.text.token_strings import decoded_tokens, whole_text
from serve.text.tokenizer import Tokenizer

_CONTEXT = 4  # tokens before a token that may hold the beginning of its character


class EntryWriter:
    """Writes entries; keeps the JSON of every token's name once it has been needed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names: dict[int, str | None] = {}  # None: its name depends on the tokens before it

    def entries(self, token_ids: Sequence[int], scores: TokenScores, k: int, start: int) -> bytes:
        """For each token its own entry, then its first k alternatives.

        Args:
            token_ids: the prompt.
            scores: [prompt - 1], of every token but the first.
            k: alternatives.
            start: tokens before it are null; the first token always is.

        Raises:
            APIError: 500 for another number of scores, or one that is not a number.
        """
        checked(scores, len(token_ids) - 1, k)
        rows, width = scores[start - 1 :], k + 1
        logprobs = _texts(np.column_stack((clamped(rows.logprob), clamped(rows.top_logprobs[:, :k]))))
        ranks = _texts(np.column_stack((rows.rank, rows.top_ranks[:, :k])))
        top_ids = rows.top_ids[:, :k].tolist()
        parts = ["null"] * min(start, len(token_ids))
        for row, position in enumerate(range(start, len(token_ids))):
            ids = [token_ids[position], *top_ids[row]]
            names = self._names_of(ids, token_ids, position)
            numbers = slice(row * width, (row + 1) * width)
            parts.append(_entry(ids, logprobs[numbers], ranks[numbers], names))
        return f"[{','.join(parts)}]".encode()

    def _names_of(self, ids: Sequence[int], prompt: Sequence[int], position: int) -> list[str]:
        names = []
        for token_id in ids:
            try:
                name = self._names[token_id]
            except KeyError:
                text = whole_text(self._tokenizer, token_id)
                name = self._names[token_id] = None if text is None else orjson.dumps(text).decode()
            if name is None:
                before = prompt[max(0, position - _CONTEXT) : position]
                name = orjson.dumps(decoded_tokens(self._tokenizer, before, [token_id])[0]).decode()
            names.append(name)
        return names


def _entry(ids: Sequence[int], logprobs: Sequence[str], ranks: Sequence[str], names: Sequence[str]) -> str:
    told = dict.fromkeys(ids)
    # The token itself may be among the best: it is told once, in its own place.
    places = range(len(ids)) if len(told) == len(ids) else [ids.index(token_id) for token_id in told]
    return (
        "{"
        + ",".join(
            f'"{ids[j]}":{{"logprob":{logprobs[j]},"rank":{ranks[j]},"decoded_token":{names[j]}}}' for j in places
        )
        + "}"
    )


def _texts(values: NDArray[Any]) -> list[str]:
    """Every number as orjson prints it, in one line."""
    return orjson.dumps(values.ravel(), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].decode().split(",")
