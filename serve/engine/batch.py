"""Requests to arrays: the numpy inputs of a step, padded to a compiled shape. Every step gets new arrays."""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from compiled.shapes import Buckets, DecodeShape
from compiled.state import (
    FROM_SLOT,
    PAGE_COPIES,
    DecodeInput,
    PageCopies,
    SamplingArrays,
    ScoreInput,
    SlotPenalties,
    StepInput,
    greedy_sampling,
    no_requested_ids,
)
from compiled.step import cache_index
from model.kv_cache import NULL_PAGE, PAGE_SIZE
from serve.engine.request import SamplingParams
from serve.engine.request_state import RequestState
from serve.engine.schedule import Chunk, DecodeRow

_ARRAYS = {field.name for field in fields(SamplingArrays)}
# Fields of SamplingParams that are copied to the arrays of the same names; not the seed, which may have to be drawn.
_COPIED = tuple(field.name for field in fields(SamplingParams) if field.name in _ARRAYS - {"seed"})

type ScoreRow = tuple[RequestState, int]  # request and row i of its prompt_logprobs, which scores prompt token i + 1


def prefill_input(chunks: Sequence[Chunk], buckets: Buckets) -> StepInput:
    """Chunks as rows [R, T]: one chunk may be a row, several are packed into rows of `buckets.segment` tokens."""
    shape = buckets.prefill(*(chunk.end - chunk.start for chunk in chunks))
    R, T = shape.rows, shape.tokens
    tokens, positions = np.zeros(R * T, np.int32), np.full(R * T, -1, np.int32)
    tables = np.zeros((R, shape.pages), np.int32)
    first = 0
    for chunk in chunks:
        last = first + chunk.end - chunk.start
        tokens[first:last] = chunk.request.tokens(chunk.start, chunk.end)
        positions[first:last] = np.arange(chunk.start, chunk.end)
        tables[first // T : -(-last // T), : len(chunk.request.pages)] = chunk.request.pages
        first = -(-last // T) * T
    return StepInput(tokens.reshape(R, T), positions.reshape(R, T), tables)


def page_copies(copies: Sequence[tuple[int, int]]) -> PageCopies:
    """Sources and targets [C], padded with the null page."""
    sources, targets = np.full((2, PAGE_COPIES), NULL_PAGE, np.int32)
    sources[: len(copies)], targets[: len(copies)] = zip(*copies, strict=True)
    return PageCopies(sources, targets)


def prompt_pages(request: RequestState) -> list[NDArray[np.int32]]:
    """Pages [C], padded with the null page, of the prompt's tokens from `experts_start` on but the last one."""
    start, end = request.params.experts_start, len(request.prompt_token_ids) - 1
    if start is None or start >= end:
        return []
    pages = np.asarray(request.pages[start // PAGE_SIZE : -(-end // PAGE_SIZE)], np.int32)
    padded = np.pad(pages, (0, -len(pages) % PAGE_COPIES), constant_values=NULL_PAGE)
    return [*padded.reshape(-1, PAGE_COPIES)]


def decode_input(rows: Sequence[DecodeRow], shape: DecodeShape, padding_slot: int) -> DecodeInput:
    """The token before each row's as [R]."""
    tokens = np.zeros(shape.rows, np.int32)
    positions = np.full(shape.rows, -1, np.int32)
    tables = np.zeros((shape.rows, shape.pages), np.int32)
    slots = np.full(shape.rows, padding_slot, np.int32)
    requested_ids = no_requested_ids(shape.rows)
    for i, row in enumerate(rows):
        request = row.request
        tokens[i] = _token_before(row)
        positions[i] = len(request.prompt_token_ids) + row.index - 1
        tables[i, : len(request.pages)] = request.pages
        slots[i] = request.slot
        if ids := request.params.requested_ids:
            requested_ids[i, : len(ids)] = ids
    return DecodeInput(tokens, positions, tables, slots, requested_ids)


def sampling_arrays(rows: Sequence[DecodeRow], size: int, vocab_size: int) -> SamplingArrays:
    """Sampling parameters of each row [R]; padding rows are greedy."""
    arrays = greedy_sampling(size, vocab_size)
    for i, row in enumerate(rows):
        request, params = row.request, row.request.params
        for name in _COPIED:
            getattr(arrays, name)[i] = getattr(params, name)
        arrays.seed[i] = (request.seed >> 32) & 0xFFFFFFFF, request.seed & 0xFFFFFFFF
        arrays.step[i] = row.index
        arrays.penalized[i] = params.adjusts
        words = request.mask.row(request.output_token_ids, row.index) if request.mask else None
        if words is not None:
            arrays.mask[i] = words
    return arrays


def slot_penalties(request: RequestState, vocab_size: int) -> SlotPenalties:
    """The penalty state to load into a request's slot. All its tokens must have been read."""
    bias = np.zeros(vocab_size, np.float32)
    for token, value in request.params.logit_bias:
        bias[token] = value
    counts = np.bincount(np.asarray(request.output_token_ids, np.int64), minlength=vocab_size).astype(np.int32)
    seen = np.zeros(vocab_size, np.bool_)
    seen[request.prompt_token_ids] = True
    return SlotPenalties(bias, counts, seen)


def score_input(rows: Sequence[ScoreRow], size: int) -> ScoreInput:
    """A block of prompt rows [M], padded with index 0, which is in the null page."""
    indices, targets, requested_ids = np.zeros(size, np.int32), np.zeros(size, np.int32), no_requested_ids(size)
    for i, (request, index) in enumerate(rows):
        indices[i] = cache_index(request.pages[index // PAGE_SIZE], index)
        targets[i] = request.prompt_token_ids[index + 1]
        if request.params.prompt and (ids := request.params.prompt.requested_ids):
            requested_ids[i, : len(ids)] = ids
    return ScoreInput(indices, targets, requested_ids)


def cache_indices(request: RequestState, start: int, size: int, count: int) -> NDArray[np.int32]:
    """Cache indices of a request's tokens start..start+count-1, padded to [size]."""
    indices = np.zeros(size, np.int32)
    indices[:count] = [cache_index(request.pages[index // PAGE_SIZE], index) for index in range(start, start + count)]
    return indices


def _token_before(row: DecodeRow) -> int:
    """The token before the row's, or FROM_SLOT if it has not been read yet."""
    request, index = row.request, row.index - 1
    if index < 0:
        return request.prompt_token_ids[-1]
    if index < len(request.output_token_ids):
        return request.output_token_ids[index]
    forced = request.mask.forced if request.mask else []
    index -= len(request.output_token_ids)
    return forced[index] if index < len(forced) else FROM_SLOT
