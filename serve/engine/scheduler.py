"""Scheduler: which requests run in the next step. Policy without tensors: it sees tokens, pages and counts.

schedule() picks a decode token for every running row and, up to one chunk's budget, prompt tokens for the oldest
prompts; the engine runs that; finish() ends a request. First come, first served. When pages run out, the youngest
running request is preempted: its pages go back and it waits, at the front, to be computed again.
"""

from collections import deque
from dataclasses import dataclass, field

from model.kv_cache import PAGE_SIZE
from serve.engine.pages import PagePool
from serve.engine.request import Request, RequestStatus


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """A chunk of one request's tokens."""

    request: Request
    start: int
    length: int

    @property
    def ends_prefill(self) -> bool:
        """Whether the request has nothing left to prefill after it."""
        return self.start + self.length == self.request.prefill_end


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step's work."""

    prefills: list[PrefillWork] = field(default_factory=list)
    decodes: list[Request] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.prefills or self.decodes)


class Scheduler:
    """Waiting and running requests, and the pages they hold."""

    def __init__(self, pool: PagePool, *, max_num_seqs: int, chunk: int) -> None:
        """`max_num_seqs` requests run at once; at most `chunk` prompt tokens are prefilled in a step."""
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._chunk = chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first

    @property
    def num_requests(self) -> int:
        """Waiting and running together."""
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        """Puts a request at the end of the queue."""
        self.waiting.append(request)

    def find(self, request_id: str) -> Request | None:
        """The unfinished request of that id."""
        return next((r for r in (*self.running, *self.waiting) if r.id == request_id), None)

    def schedule(self) -> Schedule:
        """Picks the next step's work and gives it its pages."""
        for request in list(self.running):
            if request.status is RequestStatus.DECODE:  # else an older request has taken its pages by now
                self._reserve_or_preempt(request)
        decodes = [request for request in self.running if request.status is RequestStatus.DECODE]
        return Schedule(self._schedule_prefills(), decodes)

    def finish(self, request: Request) -> None:
        """Takes a request out, wherever it stands, and frees its pages."""
        request.status = RequestStatus.FINISHED
        self._release(request)
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)

    def check(self) -> None:
        """Raises AssertionError unless free and held pages are all pages."""
        self._pool.check([page for request in (*self.running, *self.waiting) for page in request.pages])

    def _schedule_prefills(self) -> list[PrefillWork]:
        """Prompt tokens within the budget. Only the last one may end in the middle of its prompt: were there two,
        each could hold the pages that the other waits for.
        """
        budget = self._chunk
        works: list[PrefillWork] = []
        while budget > 0:
            request = self._next_to_prefill(works)
            if request is None:
                break
            length = min(budget, request.prefill_end - request.num_computed)
            if not self._reserve(request, request.num_computed + length):
                break
            if request.status is RequestStatus.WAITING:
                self.waiting.popleft()
                self.running.append(request)
                request.status = RequestStatus.PREFILL
            works.append(PrefillWork(request, request.num_computed, length))
            budget -= length
        return works

    def _next_to_prefill(self, works: list[PrefillWork]) -> Request | None:
        taken = {id(work.request) for work in works}
        for request in self.running:
            if request.status is RequestStatus.PREFILL and id(request) not in taken:
                return request
        if self.waiting and len(self.running) < self._max_num_seqs:
            return self.waiting[0]
        return None

    def _reserve(self, request: Request, tokens: int) -> bool:
        """Makes the request's pages hold `tokens` tokens, if there are enough."""
        pages = self._pool.take(max(0, -(-tokens // PAGE_SIZE) - len(request.pages)))
        if pages is None:
            return False
        request.pages += pages
        return True

    def _reserve_or_preempt(self, request: Request) -> None:
        """Makes room for the request's next token, from the youngest request's pages if need be, which may be its."""
        while request.status is RequestStatus.DECODE and not self._reserve(request, request.num_tokens):
            self._preempt(self.running[-1])

    def _preempt(self, request: Request) -> None:
        self._release(request)
        self.running.remove(request)
        request.num_computed = 0
        request.status = RequestStatus.WAITING
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self._pool.give_back(request.pages)
        request.pages = []
