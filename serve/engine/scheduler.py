"""Scheduler: decides which requests run in the next step. Policy without tensors: it sees tokens, pages and counts.

A step is prompt chunks within a token budget, packed into one prefill, then blocks of prompt rows to score, then one
token of every request whose prompt is done. Requests are served in order of arrival within a priority. A waiting
request is scheduled when the pool has all pages for its tokens so far, and a slot if it generates. It shares full pages
with the same prefix, and starts with a copy of a page that has the same first tokens. When a running request needs a
page and none is free, the last request in that order is preempted: its pages are deallocated, and it waits to be
recomputed from what is still cached.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable

from compiled.shapes import Buckets
from model.kv_cache import PAGE_SIZE
from serve.engine.page_pool import PagePool, PageStarts, page_hash, root_hash, sortable
from serve.engine.request_state import RequestState, RequestStatus
from serve.engine.schedule import Chunk, DecodeRow, Schedule

_MIN_COPIED = 8  # tokens: on a GPU fewer are computed about as fast as their page is copied
_MIN_AWAITED = 16  # tokens that a request waits for if they are being computed, to copy them a step later


class Scheduler:
    """Waiting, running and pinned requests, their pages and their slots."""

    def __init__(
        self,
        pool: PagePool,
        buckets: Buckets,
        *,
        max_num_batched_tokens: int,
        max_model_len: int,
        on_scheduled: Callable[[RequestState], None] = lambda _: None,
    ) -> None:
        """`on_scheduled` is called with each request that starts to run, which has its pages, before it is planned."""
        self._pool = pool
        self._buckets = buckets
        self._max_num_seqs = buckets.decode_rows[-1]
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._on_scheduled = on_scheduled
        self._slots = self._all_slots()
        self._arrivals = 0
        self._filled = PageStarts()  # pages that the planned step fills
        self.waiting: list[RequestState] = []  # in queue order
        self.running: list[RequestState] = []  # in queue order
        self.pinned: dict[str, RequestState] = {}  # finished requests that keep their pages, by id

    @property
    def num_requests(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request: RequestState) -> None:
        request.arrival = self._arrivals
        self._arrivals += 1
        request.max_output_tokens = min(request.params.max_tokens, self._max_model_len - len(request.prompt_token_ids))
        if request.params.prompt is not None:
            request.num_scored = request.params.prompt.start - 1
        insort(self.waiting, request, key=_queue_order)

    def find(self, request_id: str) -> RequestState | None:
        unfinished = (r for r in (*self.running, *self.waiting) if r.id == request_id)
        return next(unfinished, self.pinned.get(request_id))

    def must_preempt(self) -> bool:
        """True if the next schedule() would preempt; tokens in flight must be read before."""
        return sum(map(_missing_pages, self._decoding())) > self._pool.num_free

    def schedule(self) -> Schedule:
        """Plan the next step and allocate its pages."""
        schedule = Schedule()
        self._index_filled()
        for request in self._decoding():
            self._reserve_or_preempt(request, schedule.preempted)
        rows = min(self._max_num_seqs, sum(request.num_choices for request in self._decoding()))
        self._plan_prompts(schedule, self._max_num_batched_tokens - rows)
        for request in self.running:
            prefilled = request.status is RequestStatus.PREFILL and request.num_computed >= request.prefill_end
            if prefilled and request.num_scored >= _num_score_rows(request):
                request.status = RequestStatus.DECODE if request.generates else RequestStatus.SCORED
                (schedule.started if request.generates else schedule.scored).append(request)
        self._plan_rows(schedule)
        return schedule

    def register_pages(self, request: RequestState) -> None:
        """Register the pages that are full of tokens known to the host."""
        full = request.num_known // PAGE_SIZE
        _extend_hashes(request, full)
        for index in range(request.num_registered, full):
            self._pool.register(request.pages[index], request.hashes[index])
            self._add_filled(request, index)
        request.num_registered = max(request.num_registered, full)

    def discard_pages(self, request: RequestState) -> None:
        """Remove the pages of a request that is about to finish from the cache, because their content is wrong."""
        self._index_filled()
        self._pool.unregister(request.pages)
        request.num_computed = 0  # finish() indexes nothing

    def finish(self, request: RequestState, *, pin: bool = False) -> None:
        """Remove a request in any state and deallocate its pages; `pin` keeps them until the next finish()."""
        if request in self.running:
            self._stop(request)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        self.pinned.pop(request.id, None)
        request.status = RequestStatus.FINISHED
        if pin:
            self.pinned[request.id] = request
        else:
            self._release(request)

    def reset(self) -> list[RequestState]:
        """Free all pages and slots, and return the requests that were running. Waiting requests stay.

        Does not rely on the current bookkeeping, which may be the cause of the failure.
        """
        running, pinned = self.running, list(self.pinned.values())
        self.running, self.pinned = [], {}
        for request in (*running, *pinned):
            request.status, request.pages, request.num_registered = RequestStatus.FINISHED, [], 0
        self._slots = self._all_slots()
        self._filled.clear()
        self._pool.clear()
        return running

    def check(self) -> None:
        """Raise AssertionError if page references or slots are inconsistent."""
        requests = (*self.running, *self.waiting, *self.pinned.values())
        self._pool.check(page for request in requests for page in request.pages)
        used = [request.slot for request in self.running if request.generates]
        if sorted([*self._slots, *used]) != list(range(self._max_num_seqs)):
            raise AssertionError("free and used slots do not add up to all slots")

    def _all_slots(self) -> list[int]:
        return list(reversed(range(self._max_num_seqs)))

    def _decoding(self) -> list[RequestState]:
        """Running requests that can generate another token now, in queue order."""
        decoding = (r for r in self.running if r.status is RequestStatus.DECODE and not r.waits_for_mask)
        return [request for request in decoding if request.num_output_tokens < request.max_output_tokens]

    def _plan_rows(self, schedule: Schedule) -> None:
        """Plan a row for each decoding request, and others for its forced tokens while there are rows in the step."""
        decoding = self._decoding()
        spare = self._max_num_seqs - len(decoding)
        for request in decoding:
            first = request.num_output_tokens
            room = min(request.max_output_tokens - first, len(request.pages) * PAGE_SIZE - request.num_tokens + 1)
            count = min(request.num_choices, room, 1 + spare)
            spare -= count - 1
            request.num_computed += count
            request.num_output_tokens += count
            schedule.decodes.extend(DecodeRow(request, index) for index in range(first, first + count))

    def _plan_prompts(self, schedule: Schedule, budget: int) -> None:
        """Plan prompt chunks that fit into one prefill and a budget of tokens, and as many rows to score.

        Unfinished prompts of running requests come first, then those of waiting ones. A chunk counts as it is packed,
        in whole segments. No request starts to run while a prompt is partly computed: one with the same prefix must
        find all of its pages.
        """
        segment, rows = self._buckets.segment, self._buckets.prefill_chunks[-1]
        budget = min(budget, rows)
        prefilling = deque(request for request in self.running if request.status is RequestStatus.PREFILL)
        is_partial = False
        while True:
            request = prefilling.popleft() if prefilling else None
            if request is None and not is_partial and min(budget, rows) >= segment:
                request = self._schedule_first(schedule)
            if request is None:
                return
            length = min(request.prefill_end - request.num_computed, budget - budget % segment)
            if length > 0:
                start = request.num_computed
                request.num_computed += length
                schedule.prefills.append(Chunk(request, start, request.num_computed))
                budget -= self._buckets.padded(length)
                self.register_pages(request)
                if request.num_computed == request.prefill_end:
                    self._add_filled(request, request.num_registered)
            is_partial |= request.num_computed < request.prefill_end
            first = request.num_scored
            end = min(_num_score_rows(request), request.num_computed, first + rows)
            if end > first:
                schedule.scores.append(Chunk(request, first, end))
                request.num_scored = end
                rows -= end - first

    def _schedule_first(self, schedule: Schedule) -> RequestState | None:
        """Run the first waiting request if there are pages for all its tokens so far, and a slot if it generates.

        One page for each generating request stays free: otherwise these would soon preempt it.
        """
        if not self.waiting or (self.waiting[0].generates and not self._slots):
            return None
        request = self.waiting[0]
        full = request.prefill_end // PAGE_SIZE
        _extend_hashes(request, full)
        cached = self._pool.find(request.hashes[:full])
        start = self._find_start(request, len(cached))
        if start is None:
            return None
        copied, count = start
        needed = -(-(request.num_tokens if request.generates else request.prefill_end) // PAGE_SIZE) - len(cached)
        spare = self._pool.num_free - needed - (self._max_num_seqs - len(self._slots))
        if spare < self._pool.num_unreferenced(cached):
            return None
        if count and spare < self._pool.num_unreferenced([*cached, copied]):
            count = 0
        held = [*cached, copied] if count else cached
        self._pool.share(held)
        allocated = self._pool.allocate(needed)
        assert allocated is not None
        if count:
            schedule.copies.append((copied, allocated[0]))
            self._pool.deallocate([copied])
        self._start(request, cached + allocated, len(cached), count)
        return request

    def _find_start(self, request: RequestState, cached: int) -> tuple[int, int] | None:
        """The page to copy for the tokens after the first `cached` pages, and how many of them it has, 0 if too few.

        None if a page that is filled in this step will have more: the request waits for it.
        """
        start = cached * PAGE_SIZE
        tokens = sortable(request.tokens(start, min(start + PAGE_SIZE, request.prefill_end)))
        key = _start_key(request, cached)
        page, count = self._pool.find_start(key, tokens)
        if self._filled.find(key, tokens)[1] >= count + _MIN_AWAITED:
            return None
        return page, count if count >= _MIN_COPIED else 0

    def _start(self, request: RequestState, pages: list[int], cached: int, copied: int) -> None:
        """Run the first waiting request, with its block table: `cached` shared pages, then one with `copied` tokens."""
        self.waiting.pop(0)
        insort(self.running, request, key=_queue_order)
        request.status = RequestStatus.PREFILL
        request.slot = self._slots.pop() if request.generates else -1
        request.pages = pages
        request.num_registered = cached
        request.num_computed = cached * PAGE_SIZE + copied
        if request.num_cached is None:
            request.num_cached = request.num_computed
        self._on_scheduled(request)

    def _reserve_or_preempt(self, request: RequestState, preempted: list[RequestState]) -> None:
        """Allocate a page for the request's next token, preempting the last in queue order, or itself, if necessary."""
        while request.status is RequestStatus.DECODE:  # else an earlier one has preempted it
            pages = self._pool.allocate(_missing_pages(request))
            if pages is not None:
                request.pages += pages
                return
            preempted.append(next(r for r in reversed(self.running) if r.status is not RequestStatus.SCORED))
            self._preempt(preempted[-1])

    def _preempt(self, request: RequestState) -> None:
        self._release(request)
        self._stop(request)
        request.num_computed = 0
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        insort(self.waiting, request, key=_queue_order)

    def _stop(self, request: RequestState) -> None:
        self.running.remove(request)
        if request.generates:
            self._slots.append(request.slot)

    def _release(self, request: RequestState) -> None:
        self._add_filled(request, request.num_registered)
        self._index_filled()
        self._pool.deallocate(request.pages)
        request.pages, request.num_registered = [], 0

    def _add_filled(self, request: RequestState, index: int) -> None:
        """Note the tokens of a page of a request that are known to the host."""
        start = index * PAGE_SIZE
        tokens = request.tokens(start, min(start + PAGE_SIZE, request.num_known))
        if tokens and self._pool.caching:
            self._filled.add(request.pages[index], _start_key(request, index), sortable(tokens))

    def _index_filled(self) -> None:
        """Index the pages that were filled in the last step: a copy of them now has their tokens."""
        for page, key, tokens in self._filled.items():
            self._pool.index(page, key, tokens)
        self._filled.clear()


def _queue_order(state: RequestState) -> tuple[int, int]:
    return state.request.priority, state.arrival


def _missing_pages(request: RequestState) -> int:
    return max(0, -(-request.num_tokens // PAGE_SIZE) - len(request.pages))


def _num_score_rows(state: RequestState) -> int:
    """Number of rows of prompt_logprobs that must be filled."""
    scoring = state.params.prompt
    return 0 if scoring is None or scoring.full_vocab else len(state.prompt_token_ids) - 1


def _extend_hashes(state: RequestState, pages: int) -> None:
    """Compute the chained hashes of the request's first `pages` pages."""
    while (index := len(state.hashes)) < pages:
        tokens = state.tokens(index * PAGE_SIZE, (index + 1) * PAGE_SIZE)
        state.hashes.append(page_hash(_parent_hash(state, index), tokens))


def _start_key(state: RequestState, page: int) -> bytes:
    """Under which the tokens of a page are indexed; the page before is hashed."""
    return _parent_hash(state, page) + (state.request.owner or "").encode()


def _parent_hash(state: RequestState, page: int) -> bytes:
    """Chained hash of the pages before one, which are hashed."""
    return state.hashes[page - 1] if page else root_hash(state.request.cache_salt)
