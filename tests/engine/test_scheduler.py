"""Scheduler: chunks, order, admission, preemption, pages and slots, without arrays."""

import pytest

from compiled.shapes import Buckets
from model.kv_cache import PAGE_SIZE
from serve.engine.page_pool import PagePool
from serve.engine.request import PromptScoring, Request, SamplingParams
from serve.engine.request_state import RequestState, RequestStatus
from serve.engine.scheduler import Schedule, Scheduler

CHUNK = 64


def request(
    name: str, length: int, *, token: int = 1, max_tokens: int = 1000, priority: int = 0, salt: str = ""
) -> RequestState:
    return RequestState(Request(name, [token] * length, SamplingParams(max_tokens), priority, salt))


def scored(name: str, length: int, *, start: int = 1, max_tokens: int = 0) -> RequestState:
    return RequestState(Request(name, [1] * length, SamplingParams(max_tokens, prompt=PromptScoring(start))))


class Bench:
    """A scheduler, and what the core does with its schedules: a token (7) is read one step after it was chosen."""

    def __init__(
        self, *, pages: int, max_num_seqs: int = 4, max_num_batched_tokens: int = CHUNK + 4, caching: bool = False
    ) -> None:
        self.pool = PagePool(pages + 1, caching=caching)
        self.scheduler = Scheduler(
            self.pool,
            Buckets((1, max_num_seqs), prefill_chunks=(16, CHUNK), score_rows=8, pages_per_row=16),
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
            assert len(work.request.pages) * PAGE_SIZE >= work.start + work.length
        for item in schedule.decodes:
            assert item.num_computed == item.num_tokens - 1
            assert len(item.pages) * PAGE_SIZE >= item.num_computed
        self.read()
        self.unread = schedule.decodes
        return schedule

    def read(self) -> None:
        for item in self.unread:
            if item.status is not RequestStatus.FINISHED:
                item.output_token_ids.append(7)
                self.scheduler.register_pages(item)
        self.unread = []

    def told(self) -> tuple[list[tuple[str, int, int]], list[str]]:
        """step(), as names and lengths."""
        schedule = self.step()
        prefills = [(work.request.id, work.start, work.length) for work in schedule.prefills]
        return prefills, [item.id for item in schedule.decodes]

    def scores(self) -> list[tuple[str, int, int]]:
        """step(), as the rows that are scored."""
        return [(work.request.id, work.start, work.end) for work in self.step().scores]


def test_nothing_to_do() -> None:
    bench = Bench(pages=4)
    assert not bench.step()
    assert bench.scheduler.num_requests == 0


def test_a_long_prompt_is_cut_into_chunks_and_its_last_token_is_decoded() -> None:
    bench = Bench(pages=8)
    bench.add(request("a", 150))
    assert bench.told() == ([("a", 0, 64)], [])
    assert bench.told() == ([("a", 64, 64)], [])
    assert bench.told() == ([("a", 128, 21)], ["a"])
    assert bench.told() == ([], ["a"])


def test_a_prompt_of_one_token_needs_no_prefill() -> None:
    bench = Bench(pages=8)
    bench.add(request("a", 1))
    assert bench.told() == ([], ["a"])


def test_short_prompts_share_one_budget_that_counts_padding() -> None:
    bench = Bench(pages=8)
    bench.add(request("a", 10), request("b", 17), request("c", 50), request("d", 5))
    assert bench.told() == ([("a", 0, 9), ("b", 0, 16), ("c", 0, 16)], ["a", "b"])
    assert bench.told() == ([("c", 16, 33)], ["a", "b", "c"])
    assert bench.told() == ([("d", 0, 4)], ["a", "b", "c", "d"])


def test_rows_that_decode_take_their_part_of_the_budget() -> None:
    bench = Bench(pages=20, max_num_batched_tokens=CHUNK)
    bench.add(request("a", 1))
    bench.step()
    bench.add(request("b", 100))
    assert bench.told() == ([("b", 0, 16)], ["a"])


def test_a_long_prompt_delays_a_running_stream_by_one_chunk_a_token() -> None:
    bench = Bench(pages=20)
    bench.add(request("a", 3))
    bench.step()
    bench.add(request("b", 300, token=2))
    for start in (0, 64, 128, 192):
        assert bench.told() == ([("b", start, 64)], ["a"])
    assert bench.told() == ([("b", 256, 43)], ["a", "b"])


def test_no_more_run_at_once_than_allowed() -> None:
    bench = Bench(pages=8, max_num_seqs=2)
    a, b, c = request("a", 3), request("b", 3), request("c", 3)
    bench.add(a, b, c)
    assert bench.told() == ([("a", 0, 2), ("b", 0, 2)], ["a", "b"])
    assert bench.told() == ([], ["a", "b"])
    assert {a.slot, b.slot} == {0, 1}
    bench.scheduler.finish(a)
    assert bench.told() == ([("c", 0, 2)], ["b", "c"])
    assert {b.slot, c.slot} == {0, 1}


def test_a_request_that_has_chosen_all_its_tokens_is_not_decoded_while_they_are_unread() -> None:
    bench = Bench(pages=8)
    a = request("a", 3, max_tokens=2)
    bench.add(a)
    assert bench.told()[1] == ["a"]
    assert bench.told()[1] == ["a"]
    assert bench.told()[1] == []
    assert a.status is RequestStatus.DECODE
    assert a.num_chosen == 2


def test_pages_are_taken_when_they_are_needed() -> None:
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


def test_no_one_overtakes_a_prompt_that_waits_for_pages() -> None:
    bench = Bench(pages=4)
    a, b, c = request("a", 100), request("b", 100), request("c", 1)
    bench.add(a, b, c)
    bench.step()
    assert bench.told() == ([("a", 64, 35)], ["a"])  # b would leave no page for a's next
    assert [item.id for item in bench.scheduler.waiting] == ["b", "c"]
    bench.scheduler.finish(a)
    assert bench.told() == ([("b", 0, 64)], [])
    assert bench.told() == ([("b", 64, 35)], ["b"])
    assert bench.told() == ([], ["b", "c"])


def test_lower_priorities_run_first_and_equals_in_order() -> None:
    bench = Bench(pages=20, max_num_seqs=1)
    requests = [request(name, 1, priority=priority) for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 0))]
    bench.add(*requests)
    order = []
    for _ in requests:
        (name,) = bench.told()[1]
        order.append(name)
        bench.scheduler.finish(next(item for item in requests if item.id == name))
    assert order == ["c", "a", "d", "b"]


def test_the_last_in_line_is_preempted_and_computed_again() -> None:
    bench = Bench(pages=3)
    a, b = request("a", PAGE_SIZE - 2), request("b", PAGE_SIZE - 3)
    bench.add(a, b)
    assert bench.told() == ([("a", 0, 61)], ["a"])
    assert bench.told() == ([("b", 0, 60)], ["a", "b"])
    assert bench.told() == ([], ["a", "b"])  # a has 65 tokens: the third page
    b.num_scored = 1
    assert bench.told() == ([], ["a", "b"])
    assert bench.told() == ([], ["a", "b"])
    assert bench.told() == ([], ["a"])  # b's turn to want a page, and there is none
    assert b.status is RequestStatus.WAITING
    assert (b.pages, b.num_computed, b.num_scored, b.output_token_ids) == ([], 0, 1, [7, 7, 7, 7])
    assert b.num_chosen == 4
    bench.scheduler.finish(a)
    assert bench.told() == ([("b", 0, 64)], ["b"])  # all but its last token, which the decode step runs
    assert b.num_computed == 65


def test_a_preempted_request_is_not_admitted_until_the_pool_holds_all_it_has() -> None:
    bench = Bench(pages=3)
    a, b = request("a", PAGE_SIZE - 2), request("b", PAGE_SIZE - 3)
    bench.add(a, b)
    for _ in range(6):
        bench.step()
    assert b.status is RequestStatus.WAITING
    for _ in range(PAGE_SIZE):
        assert bench.told() == ([], ["a"])


@pytest.mark.parametrize("priorities", [(0, 1), (1, 0)])
def test_who_is_preempted_goes_by_priority_before_age(priorities: tuple[int, int]) -> None:
    bench = Bench(pages=3)
    a, b = (request(name, PAGE_SIZE - 3, priority=p) for name, p in zip("ab", priorities, strict=True))
    bench.add(a, b)
    for _ in range(8):
        bench.step()
    assert (a.status is RequestStatus.WAITING) == (priorities == (1, 0))
    assert (b.status is RequestStatus.WAITING) == (priorities == (0, 1))


def test_tokens_on_their_way_are_read_before_anyone_is_preempted() -> None:
    bench = Bench(pages=3)
    a, b = request("a", PAGE_SIZE - 2), request("b", PAGE_SIZE - 3)
    bench.add(a, b)
    for _ in range(5):
        assert not bench.scheduler.must_preempt()
        bench.step()
    assert bench.unread == [a, b]
    assert bench.scheduler.must_preempt()


def test_a_prompt_is_scored_as_it_is_computed_and_chooses_after_its_last_row() -> None:
    bench = Bench(pages=8)
    a = scored("a", 150, max_tokens=5)
    bench.add(a)
    assert bench.scores() == [("a", 0, 64)]
    assert bench.scores() == [("a", 64, 128)]
    schedule = bench.step()
    assert [(work.start, work.end) for work in schedule.scores] == [(128, 149)]
    assert schedule.started == schedule.decodes == [a]
    assert bench.scores() == []


def test_rows_of_a_cached_prompt_are_scored_a_chunk_a_step() -> None:
    bench = Bench(pages=16, caching=True)
    bench.add(first := request("a", 200))
    for _ in range(4):
        bench.step()
    bench.scheduler.finish(first)
    bench.add(b := scored("b", 200, max_tokens=1))
    schedule = bench.step()
    assert [(work.start, work.length) for work in schedule.prefills] == [(192, 7)]
    assert [(work.start, work.end) for work in schedule.scores] == [(0, 64)]
    assert schedule.decodes == []  # its first token waits for its prompt's numbers
    assert bench.scores() == [("b", 64, 128)]
    schedule = bench.step()
    assert [(work.start, work.end) for work in schedule.scores] == [(128, 192)]
    assert schedule.decodes == []
    schedule = bench.step()
    assert [(work.start, work.end) for work in schedule.scores] == [(192, 199)]
    assert schedule.decodes == [b]


def test_only_the_rows_asked_for_are_scored() -> None:
    bench = Bench(pages=8)
    bench.add(scored("a", 50, start=40))
    assert bench.scores() == [("a", 39, 49)]


@pytest.mark.parametrize(("length", "pages"), [(1, 0), (2, 1), (65, 1), (66, 2)])
def test_pure_scoring_computes_all_but_the_last_token_and_ends(length: int, pages: int) -> None:
    bench = Bench(pages=8)
    bench.add(a := scored("a", length))
    schedules = [bench.step() for _ in range(1 + (length > 65))]
    assert schedules[-1].scored == [a]
    assert a.status is RequestStatus.SCORED
    assert len(a.pages) == pages
    assert not bench.step()
    bench.scheduler.finish(a)
    bench.scheduler.check()


def test_a_cached_beginning_is_shared_and_only_the_rest_computed() -> None:
    bench = Bench(pages=16, caching=True)
    a, b, c = request("a", 150), request("b", 150), request("c", 150, token=2)
    bench.add(a)
    bench.step()
    bench.add(b)
    assert bench.told() == ([("a", 64, 64)], [])
    assert bench.told() == ([("a", 128, 21)], ["a"])
    assert bench.told() == ([("b", 128, 21)], ["a", "b"])
    assert b.pages[:2] == a.pages[:2]
    assert b.pages[2] != a.pages[2]
    assert (a.num_cached, b.num_cached) == (0, 128)
    bench.add(c)
    bench.step()
    assert c.num_cached == 0
    assert bench.told()[0] == [("c", 64, 64)]


def test_the_last_token_is_computed_however_much_is_cached() -> None:
    bench = Bench(pages=16, caching=True)
    bench.add(a := request("a", 128))
    for _ in range(3):
        bench.step()
    bench.scheduler.finish(a)
    bench.add(b := request("b", 128))
    assert bench.told() == ([("b", 64, 63)], ["b"])
    assert b.num_cached == 64


def test_other_salts_share_nothing() -> None:
    bench = Bench(pages=16, caching=True)
    a, b = request("a", 150), request("b", 150, salt="other")
    bench.add(a)
    for _ in range(3):
        bench.step()
    bench.add(b)
    assert bench.told()[0] == [("b", 0, 64)]


def test_generated_tokens_are_cached_too() -> None:
    bench = Bench(pages=16, caching=True)
    bench.add(a := request("a", 60))
    for _ in range(8):
        bench.step()
    bench.scheduler.finish(a)
    b = RequestState(Request("b", [*a.prompt_token_ids, *a.output_token_ids[:6]], SamplingParams(5)))
    bench.add(b)
    bench.step()
    assert b.num_cached == 64


def test_a_preempted_request_finds_again_what_nobody_else_took() -> None:
    bench = Bench(pages=4, caching=True)
    a, b = request("a", PAGE_SIZE - 2, priority=-1), request("b", PAGE_SIZE + 60, token=2)
    bench.add(b, a)
    while not b.output_token_ids or b.status is not RequestStatus.WAITING:
        bench.step()
    bench.scheduler.finish(a)
    assert bench.told() == ([], ["b"])  # all 128 tokens before its last one
    assert b.num_cached == 0  # of its prompt, when it first ran


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_finish_frees_pages_and_slot_in_every_state(steps: int) -> None:
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


def test_a_held_request_keeps_its_pages_until_it_is_finished_again() -> None:
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


def test_check_finds_a_page_that_two_requests_hold() -> None:
    bench = Bench(pages=4)
    a, b = request("a", 3), request("b", 3)
    bench.add(a, b)
    bench.step()
    b.pages = list(a.pages)
    with pytest.raises(AssertionError, match="pool"):
        bench.scheduler.check()
