"""Scheduler: which requests run in the next step. Policy without tensors: it sees tokens, pages and counts.

A step is prompt chunks within a budget of tokens, then blocks of prompt rows to be scored, then one token of every
request whose prompt is done. First come, first served within a priority. A request is admitted when the pool holds all
pages of what it has so far. When a running request needs a page and none is left, the last in line is preempted: its
pages go back, and it waits to be computed again from what the cache still has of it.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

from compiled.shapes import Buckets, bucket
from model.kv_cache import PAGE_SIZE
from serve.engine.page_pool import PagePool, page_hash, root_hash
from serve.engine.request import Request, RequestStatus


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """A chunk of one request's tokens."""

    request: Request
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class ScoreWork:
    """Rows start..end-1 of one request's prompt_scores: row i scores prompt token i + 1."""

    request: Request
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step's work, in the order in which it has to be begun."""

    prefills: list[PrefillWork] = field(default_factory=list)
    scores: list[ScoreWork] = field(default_factory=list)
    scored: list[Request] = field(default_factory=list)  # with this step's scores they are done: nothing to choose
    begun: list[Request] = field(default_factory=list)  # those of `decodes` for which it is the first since admission
    decodes: list[Request] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.prefills or self.scores or self.scored or self.decodes)


class Scheduler:
    """Waiting, running and held requests, their pages and their slots."""

    def __init__(
        self,
        pool: PagePool,
        buckets: Buckets,
        *,
        max_num_batched_tokens: int,
        max_model_len: int,
        on_admit: Callable[[Request], None] = lambda _: None,
    ) -> None:
        """`on_admit` is told of a request that has got its pages, before its work is planned."""
        self._pool = pool
        self._chunks = buckets.prefill_chunks
        self._max_num_seqs = buckets.decode_rows[-1]
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._on_admit = on_admit
        self._slots = self._all_slots()
        self._arrivals = 0
        self.num_preempted = 0  # ever
        self.waiting: list[Request] = []  # in line
        self.running: list[Request] = []  # in line
        self.held: dict[str, Request] = {}  # ended, but their pages are still asked about

    @property
    def num_requests(self) -> int:
        """Waiting and running together."""
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        """Puts a request in line."""
        request.arrival = self._arrivals
        self._arrivals += 1
        request.max_chosen = min(request.params.max_tokens, self._max_model_len - len(request.prompt_token_ids))
        if request.params.prompt is not None:
            request.num_scored = request.params.prompt.start - 1
        insort(self.waiting, request, key=_place_in_line)

    def find(self, request_id: str) -> Request | None:
        """The request of that id that waits, runs or is held."""
        unfinished = (r for r in (*self.running, *self.waiting) if r.id == request_id)
        return next(unfinished, self.held.get(request_id))

    def must_preempt(self) -> bool:
        """Whether the next schedule() would preempt. Tokens on their way must be read before it may."""
        wanted = sum(_missing_pages(request, request.num_tokens) for request in self._decoding())
        return wanted > self._pool.num_free

    def schedule(self) -> Schedule:
        """Picks the next step's work and gives it its pages."""
        for request in self._decoding():
            if request.status is RequestStatus.DECODE:  # else one before it in line has taken its pages by now
                self._reserve_or_preempt(request)
        schedule = Schedule()
        self._plan_prompts(schedule, self._max_num_batched_tokens - len(self._decoding()))
        for request in self.running:
            if request.status is RequestStatus.PREFILL and _prompt_is_done(request):
                self._end_prompt(request, schedule)
        for request in self._decoding():
            request.num_computed += 1
            request.num_chosen += 1
            schedule.decodes.append(request)
        return schedule

    def register_pages(self, request: Request) -> None:
        """Makes those of its pages known that are full of tokens that the host knows."""
        full = min(request.num_computed, _known_tokens(request)) // PAGE_SIZE
        _extend_hashes(request, full)
        for index in range(request.num_registered, full):
            self._pool.register(request.pages[index], request.hashes[index])
        request.num_registered = max(request.num_registered, full)

    def finish(self, request: Request, *, hold: bool = False) -> None:
        """Takes a request out, wherever it stands, and frees its pages; `hold` keeps them until the next finish()."""
        if request in self.running:
            self.running.remove(request)
            self._slots.append(request.slot)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        self.held.pop(request.id, None)
        request.status = RequestStatus.FINISHED
        if hold:
            self.held[request.id] = request
        else:
            self._release(request)

    def end_all(self) -> list[Request]:
        """Takes out whatever holds a page, and opens new books; the requests that ran. Those that wait stay.

        It does not go by the old books: they may be what is wrong.
        """
        running, held = self.running, list(self.held.values())
        self.running, self.held = [], {}
        for request in (*running, *held):
            request.status, request.pages, request.num_registered = RequestStatus.FINISHED, [], 0
        self._slots = self._all_slots()
        self._pool.clear()
        return running

    def check(self) -> None:
        """Raises AssertionError unless pages and slots add up."""
        holders = (*self.running, *self.waiting, *self.held.values())
        self._pool.check(page for request in holders for page in request.pages)
        if sorted([*self._slots, *(request.slot for request in self.running)]) != list(range(self._max_num_seqs)):
            raise AssertionError("free and used slots are not all slots")

    def _all_slots(self) -> list[int]:
        return list(reversed(range(self._max_num_seqs)))

    def _decoding(self) -> list[Request]:
        """Running requests that will choose one more token, in line."""
        return [r for r in self.running if r.status is RequestStatus.DECODE and r.num_chosen < r.max_chosen]

    def _plan_prompts(self, schedule: Schedule, budget: int) -> None:
        """Chunks of prompts within a budget of tokens, padding included, and rows to be scored within one chunk's."""
        rows = self._chunks[-1]
        planned: set[str] = set()
        while (request := self._next_prompt(planned, budget)) is not None:
            planned.add(request.id)
            left = request.prefill_end - request.num_computed
            fitting = [chunk for chunk in self._chunks if chunk <= budget]
            if left > 0 and fitting:
                length = min(left, fitting[-1])
                schedule.prefills.append(PrefillWork(request, request.num_computed, length))
                budget -= bucket(self._chunks, length)
                request.num_computed += length
                self.register_pages(request)
            rows -= self._plan_scores(schedule, request, rows)

    def _plan_scores(self, schedule: Schedule, request: Request, most: int) -> int:
        start = request.num_scored
        end = min(_rows_to_score(request), request.num_computed, start + most)
        if end <= start:
            return 0
        schedule.scores.append(ScoreWork(request, start, end))
        request.num_scored = end
        return end - start

    def _next_prompt(self, planned: set[str], budget: int) -> Request | None:
        """The next in line with a prompt to work on: one that runs, or else one that can be admitted.

        Nobody is admitted beside a prompt that is not computed to its end: a newcomer that begins alike shall find all
        of its pages.
        """
        prompts = [request for request in self.running if request.status is RequestStatus.PREFILL]
        for request in prompts:
            if request.id not in planned:
                return request
        if budget < self._chunks[0] or any(request.num_computed < request.prefill_end for request in prompts):
            return None
        return self._admit()

    def _admit(self) -> Request | None:
        """Lets the first in line run if there is a slot and pages for all its tokens so far, else nobody.

        While others run, a page for each of them is left over, or they would soon preempt the newcomer.
        """
        if not self.waiting or not self._slots:
            return None
        request = self.waiting[0]
        _extend_hashes(request, request.prefill_end // PAGE_SIZE)
        cached = self._pool.find(request.hashes[: request.prefill_end // PAGE_SIZE])
        wanted = -(-(request.num_tokens if request.max_chosen else request.prefill_end) // PAGE_SIZE)
        if wanted - len(cached) + self._pool.num_idle(cached) + len(self.running) > self._pool.num_free:
            return None
        self._pool.hold(cached)
        taken = self._pool.take(wanted - len(cached))
        assert taken is not None
        self.waiting.pop(0)
        insort(self.running, request, key=_place_in_line)
        request.status = RequestStatus.PREFILL
        request.slot = self._slots.pop()
        request.pages = cached + taken
        request.num_registered = len(cached)
        request.num_computed = len(cached) * PAGE_SIZE
        if request.num_cached is None:
            request.num_cached = request.num_computed
        self._on_admit(request)
        return request

    def _end_prompt(self, request: Request, schedule: Schedule) -> None:
        if request.max_chosen:
            request.status = RequestStatus.DECODE
            schedule.begun.append(request)
        else:
            request.status = RequestStatus.SCORED
            schedule.scored.append(request)

    def _reserve_or_preempt(self, request: Request) -> None:
        """Makes room for the request's next token, from the last in line if need be, which may be itself."""
        while request.status is RequestStatus.DECODE:
            pages = self._pool.take(_missing_pages(request, request.num_tokens))
            if pages is not None:
                request.pages += pages
                return
            self._preempt(next(r for r in reversed(self.running) if r.status is not RequestStatus.SCORED))

    def _preempt(self, request: Request) -> None:
        self._release(request)
        self.running.remove(request)
        self._slots.append(request.slot)
        request.num_computed = 0
        request.status = RequestStatus.WAITING
        self.num_preempted += 1
        insort(self.waiting, request, key=_place_in_line)

    def _release(self, request: Request) -> None:
        self._pool.give_back(request.pages)
        request.pages, request.num_registered = [], 0


def _place_in_line(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival


def _known_tokens(request: Request) -> int:
    return len(request.prompt_token_ids) + len(request.output_token_ids)


def _missing_pages(request: Request, tokens: int) -> int:
    """Pages that the request lacks to hold so many tokens."""
    return max(0, -(-tokens // PAGE_SIZE) - len(request.pages))


def _rows_to_score(request: Request) -> int:
    """Where the rows that are asked for end; num_scored begins with the first of them."""
    scoring = request.params.prompt
    return 0 if scoring is None or scoring.whole else len(request.prompt_token_ids) - 1


def _prompt_is_done(request: Request) -> bool:
    return request.num_computed >= request.prefill_end and request.num_scored >= _rows_to_score(request)


def _extend_hashes(request: Request, pages: int) -> None:
    """The chained hashes of the request's first `pages` pages."""
    while (index := len(request.hashes)) < pages:
        before = request.hashes[-1] if index else root_hash(request.cache_salt)
        tokens = request.tokens(index * PAGE_SIZE, (index + 1) * PAGE_SIZE)
        request.hashes.append(page_hash(before, tokens))
