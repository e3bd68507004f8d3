"""Numbers on their way: from a step's arrays to a request's columns, and between a prompt's columns and its pages."""

import numpy as np

from model.kv_cache import PAGE_SIZE
from model.token_logprobs import TokenLogprobs
from serve.engine.page_pool import PagePool
from serve.engine.request import PromptScoring, Request, TokenScores, empty_scores


def token_scores(logprobs: TokenLogprobs, rows: slice, ids: tuple[int, ...]) -> TokenScores:
    """Rows of a step's numbers; the alternatives are the named `ids`, or the K best where none are named."""
    own = logprobs.logprob[rows], logprobs.rank[rows]
    if not ids:
        top_ids = logprobs.top_ids[rows]
        ranks = np.broadcast_to(np.arange(1, top_ids.shape[1] + 1, dtype=np.int32), top_ids.shape)
        return TokenScores(*own, top_ids, ranks, logprobs.top_logprobs[rows])
    named = np.broadcast_to(np.asarray(ids, np.int32), (len(own[0]), len(ids)))
    count = len(ids)
    return TokenScores(*own, named, logprobs.requested_ranks[rows, :count], logprobs.requested_logprobs[rows, :count])


def begin_prompt_scores(request: Request, pool: PagePool, k: int) -> None:
    """Room for the numbers of a prompt that is about to run, and those that its cached pages have kept."""
    scoring = request.params.prompt
    if scoring is None or scoring.whole:
        return
    if request.prompt_scores is None:
        alternatives = len(scoring.token_ids) or k
        request.prompt_scores = empty_scores(len(request.prompt_token_ids) - 1, alternatives)
    if scoring.token_ids:
        return
    full = min(len(request.prompt_token_ids) // PAGE_SIZE, request.num_registered)  # after a preemption more are cached
    for index in range((request.num_scored + 1) // PAGE_SIZE, full):
        kept = pool.scores(request.hashes[index])
        if kept is None:
            return
        rows, _ = _rows_of(index)
        count = rows.stop - request.num_scored
        write(request.prompt_scores, slice(request.num_scored, rows.stop), kept[PAGE_SIZE - count :])
        request.num_scored = rows.stop


def keep_prompt_scores(request: Request, pool: PagePool) -> None:
    """Keeps the numbers of the prompt's full pages beside the pages, for the next prompt that begins alike."""
    scores, scoring = request.prompt_scores, request.params.prompt
    if scores is None or scoring is None or scoring.token_ids:
        return
    full = min(len(request.prompt_token_ids) // PAGE_SIZE, request.num_registered)
    for index in range(_first_whole_page(scoring), full):
        if pool.scores(request.hashes[index]) is None:
            rows, first = _rows_of(index)
            page = empty_scores(PAGE_SIZE, scores.top_ids.shape[1])
            write(page, slice(first, PAGE_SIZE), scores[rows])
            pool.keep_scores(request.hashes[index], page)


def write(into: TokenScores, rows: slice, scores: TokenScores) -> None:
    """Copies all of `scores` into some rows of a larger one."""
    for name in TokenScores.__slots__:
        getattr(into, name)[rows] = getattr(scores, name)


def holds_nan(scores: TokenScores, start: int = 0) -> bool:
    """Whether any number from row `start` on is not one."""
    return bool(np.isnan(scores.logprob[start:]).any() or np.isnan(scores.top_logprobs[start:]).any())


def _rows_of(page: int) -> tuple[slice, int]:
    """The rows of a prompt's scores that score the tokens of its page, and the first such token's offset.

    Row i scores token i + 1, so that the numbers of a page's tokens depend on nothing behind the page.
    """
    first = 1 if page == 0 else 0
    start = page * PAGE_SIZE + first - 1
    return slice(start, (page + 1) * PAGE_SIZE - 1), first


def _first_whole_page(scoring: PromptScoring) -> int:
    """The first page all of whose tokens are scored."""
    return 0 if scoring.start <= 1 else -(-scoring.start // PAGE_SIZE)
