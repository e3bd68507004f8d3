"""Scheduler: decides which requests run in the next step. Policy without tensors: it sees tokens, pages and counts.

A step is prompt chunks within a token budget, then blocks of prompt rows to score, then one token of every request
whose prompt is done. Requests are served in order of arrival within a priority. A waiting request is scheduled when the
pool has all pages for its tokens so far. When a running request needs a page and none is free, the last request in that
order is preempted: its pages are deallocated, and it waits to be recomputed from what is still cached.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

from compiled.shapes import Buckets, bucket
from model.kv_cache import PAGE_SIZE
from serve.engine.page_pool import PagePool, page_hash, root_hash
from serve.engine.request_state import RequestState, RequestStatus


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start..end-1 to prefill, or rows start..end-1 of prompt_logprobs; row i scores prompt token i + 1."""

    request: RequestState
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """The work of one step, in order of dispatch."""

    preempted: list[RequestState] = field(default_factory=list)  # while it was planned
    prefills: list[Chunk] = field(default_factory=list)
    scores: list[Chunk] = field(default_factory=list)
    scored: list[RequestState] = field(default_factory=list)  # finished when this step is read: nothing to generate
    started: list[RequestState] = field(
        default_factory=list
    )  # part of `decodes`: the first decode since the request waited
    decodes: list[RequestState] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.prefills or self.scores or self.scored or self.decodes)


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
        self._chunks = buckets.prefill_chunks
        self._max_num_seqs = buckets.decode_rows[-1]
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._on_scheduled = on_scheduled
        self._slots = self._all_slots()
        self._arrivals = 0
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
        for request in self._decoding():
            self._reserve_or_preempt(request, schedule.preempted)
        self._plan_prompts(schedule, self._max_num_batched_tokens - len(self._decoding()))
        for request in self.running:
            prefilled = request.status is RequestStatus.PREFILL and request.num_computed >= request.prefill_end
            if prefilled and request.num_scored >= _num_score_rows(request):
                decodes = request.max_output_tokens > 0
                request.status = RequestStatus.DECODE if decodes else RequestStatus.SCORED
                (schedule.started if decodes else schedule.scored).append(request)
        for request in self._decoding():
            request.num_computed += 1
            request.num_output_tokens += 1
            schedule.decodes.append(request)
        return schedule

    def register_pages(self, request: RequestState) -> None:
        """Register the pages that are full of tokens known to the host."""
        known = len(request.prompt_token_ids) + len(request.output_token_ids)
        full = min(request.num_computed, known) // PAGE_SIZE
        _extend_hashes(request, full)
        for index in range(request.num_registered, full):
            self._pool.register(request.pages[index], request.hashes[index])
        request.num_registered = max(request.num_registered, full)

    def finish(self, request: RequestState, *, pin: bool = False) -> None:
        """Remove a request in any state and deallocate its pages; `pin` keeps them until the next finish()."""
        if request in self.running:
            self.running.remove(request)
            self._slots.append(request.slot)
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
        self._pool.clear()
        return running

    def check(self) -> None:
        """Raise AssertionError if page references or slots are inconsistent."""
        requests = (*self.running, *self.waiting, *self.pinned.values())
        self._pool.check(page for request in requests for page in request.pages)
        if sorted([*self._slots, *(request.slot for request in self.running)]) != list(range(self._max_num_seqs)):
            raise AssertionError("free and used slots do not add up to all slots")

    def _all_slots(self) -> list[int]:
        return list(reversed(range(self._max_num_seqs)))

    def _decoding(self) -> list[RequestState]:
        """Running requests that will generate another token, in queue order."""
        return [
            r for r in self.running if r.status is RequestStatus.DECODE and r.num_output_tokens < r.max_output_tokens
        ]

    def _plan_prompts(self, schedule: Schedule, budget: int) -> None:
        """Plan prompt chunks within a budget of tokens, including padding, and at most one chunk of rows to score."""
        rows = self._chunks[-1]
        planned: set[str] = set()
        while (request := self._next_prompt(planned, budget)) is not None:
            planned.add(request.id)
            remaining = request.prefill_end - request.num_computed
            chunks = [chunk for chunk in self._chunks if chunk <= budget]
            if remaining > 0 and chunks:
                length = min(remaining, chunks[-1])
                start = request.num_computed
                request.num_computed += length
                schedule.prefills.append(Chunk(request, start, request.num_computed))
                budget -= bucket(self._chunks, length)
                self.register_pages(request)
            first = request.num_scored
            end = min(_num_score_rows(request), request.num_computed, first + rows)
            if end > first:
                schedule.scores.append(Chunk(request, first, end))
                request.num_scored = end
                rows -= end - first

    def _next_prompt(self, planned: set[str], budget: int) -> RequestState | None:
        """The next request with an unfinished prompt: a running one, otherwise the first waiting one.

        No request starts to run while a prompt is partly computed: one with the same prefix must find all of its pages.
        """
        prefilling = [request for request in self.running if request.status is RequestStatus.PREFILL]
        for request in prefilling:
            if request.id not in planned:
                return request
        if budget < self._chunks[0] or any(request.num_computed < request.prefill_end for request in prefilling):
            return None
        return self._schedule_first()

    def _schedule_first(self) -> RequestState | None:
        """Run the first waiting request if there are a slot and pages for all its tokens so far.

        One page for each running request stays free: otherwise these would soon preempt it.
        """
        if not self.waiting or not self._slots:
            return None
        request = self.waiting[0]
        _extend_hashes(request, request.prefill_end // PAGE_SIZE)
        cached = self._pool.find(request.hashes[: request.prefill_end // PAGE_SIZE])
        needed = -(-(request.num_tokens if request.max_output_tokens else request.prefill_end) // PAGE_SIZE)
        if needed - len(cached) + self._pool.num_unreferenced(cached) + len(self.running) > self._pool.num_free:
            return None
        self._pool.share(cached)
        allocated = self._pool.allocate(needed - len(cached))
        assert allocated is not None
        self.waiting.pop(0)
        insort(self.running, request, key=_queue_order)
        request.status = RequestStatus.PREFILL
        request.slot = self._slots.pop()
        request.pages = cached + allocated
        request.num_registered = len(cached)
        request.num_computed = len(cached) * PAGE_SIZE
        if request.num_cached is None:
            request.num_cached = request.num_computed
        self._on_scheduled(request)
        return request

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
        self.running.remove(request)
        self._slots.append(request.slot)
        request.num_computed = 0
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        insort(self.waiting, request, key=_queue_order)

    def _release(self, request: RequestState) -> None:
        self._pool.deallocate(request.pages)
        request.pages, request.num_registered = [], 0


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
        parent = state.hashes[-1] if index else root_hash(state.request.cache_salt)
        tokens = state.tokens(index * PAGE_SIZE, (index + 1) * PAGE_SIZE)
        state.hashes.append(page_hash(parent, tokens))
