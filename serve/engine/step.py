"""Step: a dispatched step, and how its output becomes tokens, events and log-probs of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from compiled.state import StepOutput
from model.kv_cache import PAGE_SIZE
from model.token_logprobs import TokenLogprobs
from serve.engine.batch import ScoreRow
from serve.engine.logprob_store import select_logprobs, write
from serve.engine.request import FinishReason, TokenEvent
from serve.engine.request_state import RequestState
from serve.engine.schedule import DecodeRow


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tokens that a step chose for a request, which are in its output; their event has not been made."""

    request: RequestState
    rows: slice
    num_forced: int  # of the first of them


@dataclass(slots=True)
class Step:
    """A dispatched step that has not been read, or whose tokens alone have."""

    prefilled: Any = None  # ready when the chunks are computed
    blocks: list[tuple[Sequence[ScoreRow], TokenLogprobs]] = field(default_factory=list)
    experts: list[tuple[RequestState, list[Any]]] = field(default_factory=list)  # of the pages of prompts
    scored: list[RequestState] = field(default_factory=list)
    rows: list[DecodeRow] = field(default_factory=list)
    output: StepOutput | None = None
    chosen: list[Chosen] | None = None  # None: the output has not been read


def ending(request: RequestState) -> FinishReason | None:
    """Why a request ends after the last token of its output; None if it does not."""
    if request.output_token_ids[-1] in request.params.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(request.output_token_ids) >= request.max_output_tokens else None


def token_event(chosen: Chosen, output: StepOutput) -> TokenEvent:
    rows, params = chosen.rows, chosen.request.params
    tokens = output.tokens[rows].tolist()
    processed = select_logprobs(output.processed, rows, params.requested_ids) if params.return_processed else None
    return TokenEvent(
        tokens,
        select_logprobs(output.logprobs, rows, params.requested_ids),
        processed=processed,
        allowed_mass=np.exp(output.allowed_logmass[rows]),
        forced=[index < chosen.num_forced for index in range(len(tokens))],
        stop_token_id=tokens[-1] if tokens[-1] in params.stop_token_ids else None,
        experts=None if params.experts_start is None else output.experts[rows].astype(np.int16),
    )


def write_prompt_logprobs(block: Sequence[ScoreRow], logprobs: TokenLogprobs) -> None:
    """Copy a block's log-probs to its requests, all consecutive rows of a request together."""
    start = 0
    for request, rows in groupby(block, key=lambda row: row[0]):
        indices = [index for _, index in rows]
        end = start + len(indices)
        scoring = request.params.prompt
        assert request.prompt_logprobs is not None
        assert scoring is not None
        selected = select_logprobs(logprobs, slice(start, end), scoring.requested_ids)
        write(request.prompt_logprobs, slice(indices[0], indices[-1] + 1), selected)
        start = end


def write_prompt_experts(request: RequestState, blocks: Sequence[Any]) -> None:
    """Copy experts [C, S, L, k] of the pages of `batch.prompt_pages` to the request."""
    start = request.params.experts_start
    assert start is not None
    pages = np.concatenate(blocks)
    first = start % PAGE_SIZE
    count = len(request.prompt_token_ids) - 1 - start
    request.prompt_experts = pages.reshape(-1, *pages.shape[2:])[first : first + count].astype(np.int16)
