"""Copies log-probs from a step's arrays to a request's columns, and between a prompt's columns and the page pool."""

import numpy as np

from model.kv_cache import PAGE_SIZE
from model.token_logprobs import TokenLogprobs, empty_logprobs
from serve.engine.page_pool import PagePool
from serve.engine.request_state import RequestState


def select_logprobs(logprobs: TokenLogprobs, rows: slice, ids: tuple[int, ...]) -> TokenLogprobs:
    """Rows of a step's log-probs; the alternatives are the requested `ids`, or the K best without any."""
    logprob, rank, count = logprobs.logprob[rows], logprobs.rank[rows], len(ids)
    if ids:
        top_ids = np.broadcast_to(np.asarray(ids, np.int32), (len(logprob), count))
        top_logprobs, top_ranks = logprobs.requested_logprobs[rows, :count], logprobs.requested_ranks[rows, :count]
    else:
        top_ids, top_logprobs = logprobs.top_ids[rows], logprobs.top_logprobs[rows]
        top_ranks = np.broadcast_to(np.arange(1, top_ids.shape[1] + 1, dtype=np.int32), top_ids.shape)
    return TokenLogprobs(logprob, rank, top_ids, top_logprobs, top_ranks=top_ranks)


def begin_prompt_logprobs(request: RequestState, pool: PagePool, k: int) -> None:
    """Allocate the log-probs of a prompt that is about to run, and fill in those stored with its cached pages."""
    scoring = request.params.prompt
    if scoring is None or scoring.full_vocab:
        return
    if request.prompt_logprobs is None:
        alternatives = len(scoring.requested_ids) or k
        size = len(request.prompt_token_ids) - 1
        request.prompt_logprobs = empty_logprobs(size, alternatives, scoring.start - 1)
    if scoring.requested_ids:
        return
    # After a preemption the registered pages include some of the output.
    full = min(len(request.prompt_token_ids) // PAGE_SIZE, request.num_registered)
    for index in range((request.num_scored + 1) // PAGE_SIZE, full):
        stored = pool.logprobs(request.hashes[index])
        if stored is None:
            return
        rows, _ = _rows_of(index)
        count = rows.stop - request.num_scored
        write(request.prompt_logprobs, slice(request.num_scored, rows.stop), stored[PAGE_SIZE - count :])
        request.num_scored = rows.stop


def store_prompt_logprobs(request: RequestState, pool: PagePool) -> None:
    """Store the log-probs of the prompt's full pages in the pool, for later prompts with the same prefix."""
    logprobs, scoring = request.prompt_logprobs, request.params.prompt
    if logprobs is None or scoring is None or scoring.requested_ids:
        return
    full = min(len(request.prompt_token_ids) // PAGE_SIZE, request.num_registered)
    first_scored = 0 if scoring.start <= 1 else -(-scoring.start // PAGE_SIZE)  # page with all tokens scored
    for index in range(first_scored, full):
        if pool.logprobs(request.hashes[index]) is None:
            rows, first = _rows_of(index)
            page = empty_logprobs(PAGE_SIZE, logprobs.top_ids.shape[1])
            write(page, slice(first, PAGE_SIZE), logprobs[rows])
            pool.store_logprobs(request.hashes[index], page)


def write(into: TokenLogprobs, rows: slice, logprobs: TokenLogprobs) -> None:
    """Copy `logprobs` into a range of rows of `into`."""
    for name in TokenLogprobs.__slots__:
        if (column := getattr(into, name)) is not None:
            column[rows] = getattr(logprobs, name)


def has_nan(logprobs: TokenLogprobs, start: int = 0) -> bool:
    """True if any log-prob from row `start` on is NaN."""
    return bool(np.isnan(logprobs.logprob[start:]).any() or np.isnan(logprobs.top_logprobs[start:]).any())


def _rows_of(page: int) -> tuple[slice, int]:
    """The rows of a prompt's log-probs for the tokens of one page, and the offset of the first of these in the page.

    Row i scores token i + 1, so the log-probs of a page's tokens depend on no later page.
    """
    first = 1 if page == 0 else 0
    start = page * PAGE_SIZE + first - 1
    return slice(start, (page + 1) * PAGE_SIZE - 1), first
