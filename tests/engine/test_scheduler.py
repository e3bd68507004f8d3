"""Scheduler: chunks, order, admission, preemption, pages and slots."""

import pytest

from compiled.shapes import Buckets
from model.kv_cache import PAGE_SIZE
from serve.engine.page_pool import PagePool
from serve.engine.request import PromptScoring, Request, SamplingParams
from serve.engine.request_state import RequestState, RequestStatus
from serve.engine.schedule import Schedule
from serve.engine.scheduler import Scheduler

CHUNK = 64


def request(
    name: str, length: int, *, token: int = 1, max_tokens: int = 1000, priority: int = 0, salt: str = ""
) -> RequestState:
    return RequestState(Request(name, [token] * length, SamplingParams(max_tokens), priority, salt))


def scored(name: str, length: int, *, start: int = 1, max_tokens: int = 0) -> RequestState:
    return RequestState(Request(name, [1] * length, SamplingParams(max_tokens, prompt=PromptScoring(start))))


class Bench:
    """A scheduler driven as by the core: a token (7) is read one step after it is generated."""

    def __init__(
        self,
        *,
        pages: int,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = CHUNK + 4,
        caching: bool = False,
        chunk: int = CHUNK,
    ) -> None:
        self.pool = PagePool(pages + 1, caching=caching)
        self.scheduler = Scheduler(
            self.pool,
            Buckets((1, max_num_seqs), prefill_chunks=(16, chunk), score_rows=8, pages_per_row=16),
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=1024,
        )
        self.unread: list[RequestState] = []

    def add(self, *requests: RequestState) -> None:
        for item in requests:
            self.scheduler.add(item)

    def step(self) -> Schedule:
        if self.scheduler.must_preempt():
            self.read()
        schedule = self.scheduler.schedule()
        self.scheduler.check()
        for work in schedule.prefills:
            assert len(work.request.pages) * PAGE_SIZE >= work.end
        for item in decoding(schedule):
            assert item.num_computed == item.num_tokens - 1
            assert len(item.pages) * PAGE_SIZE >= item.num_computed
        self.read()
        self.unread = decoding(schedule)
        return schedule

    def read(self) -> None:
        for item in self.unread:
            if item.status is not RequestStatus.FINISHED:
                item.output_token_ids.append(7)
                self.scheduler.register_pages(item)
        self.unread = []

    def plan(self) -> tuple[list[tuple[str, int, int]], list[str]]:
        """step(), as ids and lengths."""
        schedule = self.step()
        prefills = [(work.request.id, work.start, work.end - work.start) for work in schedule.prefills]
        return prefills, [item.id for item in decoding(schedule)]

    def scores(self) -> list[tuple[str, int, int]]:
        """step(), as rows to score."""
        return [(work.request.id, work.start, work.end) for work in self.step().scores]


def test_schedule_empty() -> None:
    bench = Bench(pages=4)
    assert not bench.step()
    assert bench.scheduler.num_requests == 0


def test_prefill_in_chunks_and_last_token_decoded() -> None:
    bench = Bench(pages=8)
    bench.add(request("a", 150))
    assert bench.plan() == ([("a", 0, 64)], [])
    assert bench.plan() == ([("a", 64, 64)], [])
    assert bench.plan() == ([("a", 128, 21)], ["a"])
    assert bench.plan() == ([], ["a"])


def test_prefill_not_needed_for_one_token() -> None:
    bench = Bench(pages=8)
    bench.add(request("a", 1))
    assert bench.plan() == ([], ["a"])


def test_prefill_budget_includes_padding() -> None:
    bench = Bench(pages=8)
    bench.add(request("a", 10), request("b", 17), request("c", 50), request("d", 5))
    assert bench.plan() == ([("a", 0, 9), ("b", 0, 16), ("c", 0, 32)], ["a", "b"])
    assert bench.plan() == ([("c", 32, 17), ("d", 0, 4)], ["a", "b", "c", "d"])


def decoding(schedule: Schedule) -> list[RequestState]:
    return [row.request for row in schedule.decodes]


def test_prefill_budget_excludes_decodes() -> None:
    bench = Bench(pages=20, max_num_batched_tokens=CHUNK)
    bench.add(request("a", 1))
    bench.step()
    bench.add(request("b", 100))
    assert bench.plan() == ([("b", 0, 48)], ["a"])


def test_decode_beside_long_prefill() -> None:
    bench = Bench(pages=20)
    bench.add(request("a", 3))
    bench.step()
    bench.add(request("b", 300, token=2))
    for start in (0, 64, 128, 192):
        assert bench.plan() == ([("b", start, 64)], ["a"])
    assert bench.plan() == ([("b", 256, 43)], ["a", "b"])


def test_admit_up_to_max_num_seqs() -> None:
    bench = Bench(pages=8, max_num_seqs=2)
    a, b, c = request("a", 3), request("b", 3), request("c", 3)
    bench.add(a, b, c)
    assert bench.plan() == ([("a", 0, 2), ("b", 0, 2)], ["a", "b"])
    assert bench.plan() == ([], ["a", "b"])
    assert {a.slot, b.slot} == {0, 1}
    bench.scheduler.finish(a)
    assert bench.plan() == ([("c", 0, 2)], ["b", "c"])
    assert {b.slot, c.slot} == {0, 1}


def test_decode_stops_at_max_tokens_before_read() -> None:
    bench = Bench(pages=8)
    a = request("a", 3, max_tokens=2)
    bench.add(a)
    assert bench.plan()[1] == ["a"]
    assert bench.plan()[1] == ["a"]
    assert bench.plan()[1] == []
    assert a.status is RequestStatus.DECODE
    assert a.num_output_tokens == 2


def test_decode_allocates_page_when_needed() -> None:
    bench = Bench(pages=4)
    a = request("a", PAGE_SIZE)
    bench.add(a)
    bench.step()
    assert len(a.pages) == 1
    for _ in range(PAGE_SIZE):
        bench.step()
        assert len(a.pages) == 2
    assert a.num_computed == 2 * PAGE_SIZE
    bench.step()
    assert len(a.pages) == 3


def test_admit_keeps_order_when_pages_are_short() -> None:
    bench = Bench(pages=4)
    a, b, c = request("a", 100), request("b", 100), request("c", 1)
    bench.add(a, b, c)
    bench.step()
    assert bench.plan() == ([("a", 64, 35)], ["a"])  # b would leave no free page for a
    assert [item.id for item in bench.scheduler.waiting] == ["b", "c"]
    bench.scheduler.finish(a)
    assert bench.plan() == ([("b", 0, 64)], [])
    assert bench.plan() == ([("b", 64, 35)], ["b", "c"])


def test_admit_by_priority_then_arrival() -> None:
    bench = Bench(pages=20, max_num_seqs=1)
    requests = [request(name, 1, priority=priority) for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 0))]
    bench.add(*requests)
    order = []
    for _ in requests:
        (name,) = bench.plan()[1]
        order.append(name)
        bench.scheduler.finish(next(item for item in requests if item.id == name))
    assert order == ["c", "a", "d", "b"]


def test_preempt_last_and_recompute() -> None:
    bench = Bench(pages=3)
    a, b = request("a", PAGE_SIZE - 2), request("b", PAGE_SIZE - 3)
    bench.add(a, b)
    assert bench.plan() == ([("a", 0, 61)], ["a"])
    assert bench.plan() == ([("b", 0, 60)], ["a", "b"])
    assert bench.plan() == ([], ["a", "b"])  # a has 65 tokens: the third page
    b.num_scored = 1
    assert bench.plan() == ([], ["a", "b"])
    assert bench.plan() == ([], ["a", "b"])
    assert bench.plan() == ([], ["a"])  # b needs a page, and none is free
    assert b.status is RequestStatus.WAITING
    assert (b.pages, b.num_computed, b.num_scored, b.output_token_ids) == ([], 0, 1, [7, 7, 7, 7])
    assert b.num_output_tokens == 4
    bench.scheduler.finish(a)
    assert bench.plan() == ([("b", 0, 64)], ["b"])  # all but its last token, which the decode step runs
    assert b.num_computed == 65


def test_preempted_request_waits_for_all_its_pages() -> None:
    bench = Bench(pages=3)
    a, b = request("a", PAGE_SIZE - 2), request("b", PAGE_SIZE - 3)
    bench.add(a, b)
    for _ in range(6):
        bench.step()
    assert b.status is RequestStatus.WAITING
    for _ in range(PAGE_SIZE):
        assert bench.plan() == ([], ["a"])


@pytest.mark.parametrize("priorities", [(0, 1), (1, 0)])
def test_preempt_by_priority_before_arrival(priorities: tuple[int, int]) -> None:
    bench = Bench(pages=3)
    a, b = (request(name, PAGE_SIZE - 3, priority=p) for name, p in zip("ab", priorities, strict=True))
    bench.add(a, b)
    for _ in range(8):
        bench.step()
    assert (a.status is RequestStatus.WAITING) == (priorities == (1, 0))
    assert (b.status is RequestStatus.WAITING) == (priorities == (0, 1))


def test_must_preempt_with_unread_tokens() -> None:
    bench = Bench(pages=3)
    a, b = request("a", PAGE_SIZE - 2), request("b", PAGE_SIZE - 3)
    bench.add(a, b)
    for _ in range(5):
        assert not bench.scheduler.must_preempt()
        bench.step()
    assert bench.unread == [a, b]
    assert bench.scheduler.must_preempt()


def test_scores_follow_prefill() -> None:
    bench = Bench(pages=8)
    a = scored("a", 150, max_tokens=5)
    bench.add(a)
    assert bench.scores() == [("a", 0, 64)]
    assert bench.scores() == [("a", 64, 128)]
    schedule = bench.step()
    assert [(work.start, work.end) for work in schedule.scores] == [(128, 149)]
    assert schedule.started == decoding(schedule) == [a]
    assert bench.scores() == []


def test_scores_of_cached_prompt_one_chunk_per_step() -> None:
    bench = Bench(pages=16, caching=True)
    bench.add(first := request("a", 200))
    for _ in range(4):
        bench.step()
    bench.scheduler.finish(first)
    bench.add(b := scored("b", 200, max_tokens=1))
    schedule = bench.step()
    assert [(work.start, work.end - work.start) for work in schedule.prefills] == [(192, 7)]
    assert [(work.start, work.end) for work in schedule.scores] == [(0, 64)]
    assert schedule.decodes == []  # its first token comes after its prompt's log-probs
    assert bench.scores() == [("b", 64, 128)]
    schedule = bench.step()
    assert [(work.start, work.end) for work in schedule.scores] == [(128, 192)]
    assert schedule.decodes == []
    schedule = bench.step()
    assert [(work.start, work.end) for work in schedule.scores] == [(192, 199)]
    assert decoding(schedule) == [b]


def test_scores_from_start() -> None:
    bench = Bench(pages=8)
    bench.add(scored("a", 50, start=40))
    assert bench.scores() == [("a", 39, 49)]


@pytest.mark.parametrize(("length", "pages"), [(1, 0), (2, 1), (65, 1), (66, 2)])
def test_scoring_without_output(length: int, pages: int) -> None:
    bench = Bench(pages=8)
    bench.add(a := scored("a", length))
    schedules = [bench.step() for _ in range(1 + (length > 65))]
    assert schedules[-1].scored == [a]
    assert a.status is RequestStatus.SCORED
    assert len(a.pages) == pages
    assert not bench.step()
    bench.scheduler.finish(a)
    bench.scheduler.check()


def test_cached_prefix_is_shared() -> None:
    bench = Bench(pages=16, caching=True)
    a, b, c = request("a", 150), request("b", 150), request("c", 150, token=2)
    bench.add(a)
    bench.step()
    bench.add(b)
    assert bench.plan() == ([("a", 64, 64)], [])
    assert bench.plan() == ([("a", 128, 21)], ["a"])  # b waits for tokens 128 to 148
    assert bench.plan() == ([], ["a", "b"])
    assert b.pages[:2] == a.pages[:2]
    assert b.pages[2] != a.pages[2]
    assert (a.num_cached, b.num_cached) == (0, 149)
    bench.add(c)
    bench.step()
    assert c.num_cached == 0
    assert bench.plan()[0] == [("c", 64, 64)]


def test_cached_prompt_still_computes_last_token() -> None:
    bench = Bench(pages=16, caching=True)
    bench.add(a := request("a", 128))
    for _ in range(3):
        bench.step()
    a_pages = a.pages
    bench.scheduler.finish(a)
    bench.add(b := request("b", 128))
    schedule = bench.step()
    assert not schedule.prefills
    assert decoding(schedule) == [b]
    assert b.num_cached == 127
    assert schedule.copies == [(a_pages[1], b.pages[1])]


def prompts(*numbers: int, shared: int, own: int, max_tokens: int = 0) -> list[RequestState]:
    """Requests named by their numbers, with `shared` equal tokens and then `own` tokens of their number."""
    return [RequestState(Request(str(n), [1] * shared + [n] * own + [0], SamplingParams(max_tokens))) for n in numbers]


def test_scored_prompts_need_no_slot() -> None:
    bench = Bench(pages=16, max_num_seqs=1)
    bench.add(request("a", 1), *prompts(2, 3, 4, shared=0, own=10))
    assert bench.plan() == ([("2", 0, 10), ("3", 0, 10), ("4", 0, 10)], ["a"])


@pytest.mark.parametrize("shared", [16, 80, 90])
def test_prompts_wait_for_a_shared_start_and_copy_it(shared: int) -> None:
    bench = Bench(pages=32, caching=True, max_num_batched_tokens=1000, chunk=512)
    first, *others = prompts(2, 3, 4, shared=shared, own=20)
    bench.add(first, *others)
    assert bench.plan() == ([("2", 0, shared + 20)], [])
    schedule = bench.step()
    assert [(work.request, work.start) for work in schedule.prefills] == [(other, shared) for other in others]
    page = shared // PAGE_SIZE
    assert schedule.copies == [(first.pages[page], other.pages[page]) for other in others]
    assert len({tuple(item.pages[:page]) for item in (first, *others)}) == 1


def test_prompts_with_few_shared_tokens_do_not_wait() -> None:
    bench = Bench(pages=32, caching=True, max_num_batched_tokens=1000, chunk=512)
    bench.add(*prompts(2, 3, shared=15, own=20))
    assert bench.plan() == ([("2", 0, 35), ("3", 0, 35)], [])
    bench.add(*prompts(4, shared=7, own=20))
    assert bench.plan() == ([("4", 0, 27)], [])
    bench.add(*prompts(5, shared=8, own=20))
    assert bench.plan() == ([("5", 8, 20)], [])


def test_prompts_of_other_owners_share_full_pages_alone() -> None:
    bench = Bench(pages=32, caching=True, max_num_batched_tokens=1000, chunk=512)
    for owner, start in (("x", 0), ("y", 64), ("x", 90)):
        name = f"{owner}{start}"
        bench.add(RequestState(Request(name, [1] * 90 + [start, 0], SamplingParams(0), owner=owner)))
        assert bench.plan() == ([(name, start, 91 - start)], [])


def test_prompts_do_not_wait_without_a_cache() -> None:
    bench = Bench(pages=32, max_num_batched_tokens=1000, chunk=512)
    bench.add(*prompts(2, 3, shared=20, own=20))
    assert bench.plan() == ([("2", 0, 40), ("3", 0, 40)], [])


def test_no_page_is_copied_that_must_be_evicted_for_the_copy() -> None:
    bench = Bench(pages=1, caching=True)
    first, second = prompts(2, 3, shared=20, own=20)
    bench.add(first)
    bench.step()
    bench.scheduler.finish(first)
    bench.add(second)
    schedule = bench.step()
    assert not schedule.copies
    assert [(work.start, work.end) for work in schedule.prefills] == [(0, 40)]


def test_output_of_a_finished_request_is_copied() -> None:
    bench = Bench(pages=8, caching=True)
    (first,) = prompts(2, shared=20, own=0, max_tokens=10)
    bench.add(first)
    for _ in range(11):
        bench.step()
    bench.scheduler.finish(first)
    bench.add(again := RequestState(Request("again", [*[1] * 20, 0, *[7] * 9, 5, 5], SamplingParams(0))))
    assert bench.plan() == ([("again", 30, 1)], [])
    assert again.num_cached == 30


def test_cached_prefix_of_other_salt() -> None:
    bench = Bench(pages=16, caching=True)
    a, b = request("a", 150), request("b", 150, salt="other")
    bench.add(a)
    for _ in range(3):
        bench.step()
    bench.add(b)
    assert bench.plan()[0] == [("b", 0, 64)]


def test_cached_output() -> None:
    bench = Bench(pages=16, caching=True)
    bench.add(a := request("a", 60))
    for _ in range(8):
        bench.step()
    bench.scheduler.finish(a)
    b = RequestState(Request("b", [*a.prompt_token_ids, *a.output_token_ids[:6]], SamplingParams(5)))
    bench.add(b)
    bench.step()
    assert b.num_cached == 64


def test_preempted_request_finds_its_cached_pages() -> None:
    bench = Bench(pages=4, caching=True)
    a, b = request("a", PAGE_SIZE - 2, priority=-1), request("b", PAGE_SIZE + 60, token=2)
    bench.add(b, a)
    while not b.output_token_ids or b.status is not RequestStatus.WAITING:
        bench.step()
    bench.scheduler.finish(a)
    assert bench.plan() == ([], ["b"])  # all 128 tokens before its last one
    assert b.num_cached == 0  # of its prompt, when it first ran


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_finish_in_every_state(steps: int) -> None:
    bench = Bench(pages=4)
    a = request("a", 100)
    bench.add(a)
    for _ in range(steps):
        bench.step()
    status = (RequestStatus.WAITING, RequestStatus.PREFILL, RequestStatus.DECODE, RequestStatus.DECODE)[steps]
    assert a.status is status
    assert bench.scheduler.find("a") is a
    bench.scheduler.finish(a)
    assert a.status is RequestStatus.FINISHED
    assert bench.scheduler.find("a") is None
    assert bench.pool.num_free == 4
    assert bench.scheduler.num_requests == 0
    bench.scheduler.check()


def test_finish_with_pin() -> None:
    bench = Bench(pages=4)
    a = request("a", 100)
    bench.add(a)
    bench.step()
    bench.scheduler.finish(a, pin=True)
    bench.scheduler.check()
    assert bench.scheduler.num_requests == 0
    assert bench.scheduler.find("a") is a
    assert bench.pool.num_free == 2
    bench.scheduler.finish(a)
    bench.scheduler.check()
    assert bench.scheduler.find("a") is None
    assert bench.pool.num_free == 4


def test_check_page_of_two_requests() -> None:
    bench = Bench(pages=4)
    a, b = request("a", 3), request("b", 3)
    bench.add(a, b)
    bench.step()
    b.pages = list(a.pages)
    with pytest.raises(AssertionError, match="pool"):
        bench.scheduler.check()
