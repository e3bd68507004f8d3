"""Requests to arrays: the numpy inputs of a step, padded to a compiled shape."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compiled.shapes import StepShape
from compiled.state import MAX_BANNED, SamplingArrays, StepInput, greedy_sampling
from compiled.step import place_of
from model.kv_cache import PAGE_SIZE
from serve.engine.request import Request
from serve.engine.scheduler import PrefillWork


def prefill_input(work: PrefillWork, shape: StepShape) -> StepInput:
    """A chunk of one request as [1, T]."""
    inputs = _padded(shape)
    end = work.start + work.length
    inputs.tokens[0, : work.length] = work.request.tokens(work.start, end)
    inputs.positions[0, : work.length] = np.arange(work.start, end)
    inputs.tables[0, : len(work.request.pages)] = work.request.pages
    return inputs


def decode_input(requests: Sequence[Request], shape: StepShape) -> StepInput:
    """The last token of each request as [R, 1]."""
    inputs = _padded(shape)
    for row, request in enumerate(requests):
        inputs.tokens[row, 0] = request.output_token_ids[-1]
        inputs.positions[row, 0] = request.num_tokens - 1
        inputs.tables[row, : len(request.pages)] = request.pages
    return inputs


def sampling_arrays(requests: Sequence[Request], rows: int) -> SamplingArrays:
    """How each request chooses its next token; padding rows are greedy."""
    arrays = greedy_sampling(rows)
    for row, request in enumerate(requests):
        params = request.params
        arrays.temperature[row] = params.temperature
        arrays.top_k[row] = params.top_k
        arrays.top_p[row] = params.top_p
        arrays.min_p[row] = params.min_p
        arrays.seed[row] = (request.seed >> 32) & 0xFFFFFFFF, request.seed & 0xFFFFFFFF
        arrays.step[row] = len(request.output_token_ids)
        if len(request.output_token_ids) < params.min_tokens:
            banned = sorted(params.stop_token_ids)[:MAX_BANNED]
            arrays.banned[row, : len(banned)] = banned
    return arrays


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One prompt token to be scored: row `index` of a request's prompt_scores."""

    request: Request
    index: int

    @property
    def place(self) -> int:
        """Where the hidden state that predicts it lies."""
        return place_of(self.request.pages[self.index // PAGE_SIZE], self.index)

    @property
    def target(self) -> int:
        """The token itself."""
        return self.request.prompt_token_ids[self.index + 1]


def score_input(rows: Sequence[ScoreRow], size: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Places and targets [M] of a block of prompt rows, padded with the null page's first place."""
    places, targets = np.zeros(size, np.int32), np.zeros(size, np.int32)
    places[: len(rows)] = [row.place for row in rows]
    targets[: len(rows)] = [row.target for row in rows]
    return places, targets


def last_place(request: Request) -> NDArray[np.int32]:
    """Where the hidden state of a request's last token lies, [1]."""
    last = request.num_tokens - 1
    return np.array([place_of(request.pages[last // PAGE_SIZE], last)], np.int32)


def _padded(shape: StepShape) -> StepInput:
    tokens = np.zeros((shape.rows, shape.chunk), np.int32)
    return StepInput(tokens, np.full_like(tokens, -1), np.zeros((shape.rows, shape.pages), np.int32))
