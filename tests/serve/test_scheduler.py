"""Scheduler: chunks, order, preemption and pages, without arrays."""

import pytest

from model.kv_cache import PAGE_SIZE
from serve.engine.pages import PagePool
from serve.engine.request import Request, RequestStatus, SamplingParams
from serve.engine.scheduler import Schedule, Scheduler

CHUNK = 64


def request(name: str, length: int) -> Request:
    return Request(name, [1] * length, SamplingParams(max_tokens=1000))


class Bench:
    """A scheduler, and what the core does with its schedules."""

    def __init__(self, *, pages: int, max_num_seqs: int = 4) -> None:
        self.pool = PagePool(pages + 1)
        self.scheduler = Scheduler(self.pool, max_num_seqs=max_num_seqs, chunk=CHUNK)

    def add(self, *requests: Request) -> None:
        for item in requests:
            self.scheduler.add(item)

    def step(self) -> Schedule:
        """Schedules, computes and chooses a token (7) where the core would."""
        schedule = self.scheduler.schedule()
        self.scheduler.check()
        for work in schedule.prefills:
            assert work.start == work.request.num_computed
            work.request.num_computed += work.length
            assert len(work.request.pages) * PAGE_SIZE >= work.request.num_computed
            if work.ends_prefill:
                work.request.status = RequestStatus.DECODE
                if not work.request.output_token_ids:
                    work.request.output_token_ids.append(7)
        for item in schedule.decodes:
            item.num_computed += 1
            assert item.num_computed == item.num_tokens
            assert len(item.pages) * PAGE_SIZE >= item.num_tokens
            item.output_token_ids.append(7)
        return schedule

    def told(self) -> tuple[list[tuple[str, int, int]], list[str]]:
        """step(), as names and lengths."""
        schedule = self.step()
        prefills = [(work.request.id, work.start, work.length) for work in schedule.prefills]
        return prefills, [item.id for item in schedule.decodes]


def test_nothing_to_do() -> None:
    bench = Bench(pages=4)
    assert not bench.step()
    assert bench.scheduler.num_requests == 0


def test_a_long_prompt_is_cut_into_chunks() -> None:
    bench = Bench(pages=8)
    bench.add(request("a", 150))
    assert bench.told() == ([("a", 0, 64)], [])
    assert bench.told() == ([("a", 64, 64)], [])
    assert bench.told() == ([("a", 128, 22)], [])
    assert bench.told() == ([], ["a"])


def test_short_prompts_share_one_budget_and_only_the_last_is_cut() -> None:
    bench = Bench(pages=8)
    bench.add(request("a", 10), request("b", 30), request("c", 50), request("d", 5))
    assert bench.told() == ([("a", 0, 10), ("b", 0, 30), ("c", 0, 24)], [])
    assert bench.told() == ([("c", 24, 26), ("d", 0, 5)], ["a", "b"])
    assert bench.told() == ([], ["a", "b", "c", "d"])


def test_prefill_goes_on_beside_decode() -> None:
    bench = Bench(pages=8)
    bench.add(request("a", 3))
    bench.step()
    bench.add(request("b", 100))
    assert bench.told() == ([("b", 0, 64)], ["a"])
    assert bench.told() == ([("b", 64, 36)], ["a"])
    assert bench.told() == ([], ["a", "b"])


def test_no_more_run_at_once_than_allowed() -> None:
    bench = Bench(pages=8, max_num_seqs=2)
    a, b, c = request("a", 3), request("b", 3), request("c", 3)
    bench.add(a, b, c)
    assert bench.told() == ([("a", 0, 3), ("b", 0, 3)], [])
    assert bench.told() == ([], ["a", "b"])
    bench.scheduler.finish(a)
    assert bench.told() == ([("c", 0, 3)], ["b"])


def test_pages_are_taken_when_they_are_needed() -> None:
    bench = Bench(pages=4)
    a = request("a", PAGE_SIZE)
    bench.add(a)
    bench.step()
    assert len(a.pages) == 1
    bench.step()
    assert len(a.pages) == 2
    for _ in range(PAGE_SIZE - 1):
        bench.step()
    assert a.num_computed == 2 * PAGE_SIZE
    assert len(a.pages) == 2
    bench.step()
    assert len(a.pages) == 3


def test_no_one_overtakes_a_prompt_that_waits_for_pages() -> None:
    bench = Bench(pages=3)
    a, b, c = request("a", 100), request("b", 100), request("c", 1)
    bench.add(a, b, c)
    bench.step()
    assert bench.told() == ([("a", 64, 36), ("b", 0, 28)], [])  # a: 2 pages, b: 1
    assert bench.told() == ([], ["a"])  # b needs one more; c, which would need none of a's, waits too
    assert [item.id for item in bench.scheduler.waiting] == ["c"]
    bench.scheduler.finish(a)
    assert bench.told() == ([("b", 28, 64)], [])
    assert bench.told() == ([("b", 92, 8), ("c", 0, 1)], [])


def test_the_youngest_is_preempted_and_computed_again() -> None:
    bench = Bench(pages=2)
    a, b, c = request("a", PAGE_SIZE - 2), request("b", 2), request("c", 1)
    bench.add(a, b, c)
    assert bench.told() == ([("a", 0, 62), ("b", 0, 2)], [])
    assert bench.told() == ([], ["a", "b"])
    assert bench.told() == ([], ["a", "b"])
    b.num_scored = 1
    assert bench.told() == ([], ["a"])  # a has 65 tokens: it takes the page of b
    assert b.status is RequestStatus.WAITING
    assert (b.pages, b.num_computed, b.num_scored, len(b.output_token_ids)) == ([], 0, 1, 3)
    assert [item.id for item in bench.scheduler.waiting] == ["b", "c"]
    bench.scheduler.finish(a)
    assert bench.told() == ([("b", 0, 4), ("c", 0, 1)], [])  # all but its last token, which the next step runs
    assert bench.told() == ([], ["b", "c"])
    assert b.num_computed == 5


def test_a_request_may_have_to_preempt_itself() -> None:
    bench = Bench(pages=3)
    a, b = request("a", 2), request("b", 2 * PAGE_SIZE - 1)
    bench.add(a, b)
    for _ in range(3):
        bench.step()
    assert bench.told() == ([], ["a", "b"])  # b has 128 tokens after it: two full pages, and a has the third
    assert bench.told() == ([("b", 0, 64)], ["a"])
    assert [item.id for item in bench.scheduler.running] == ["a", "b"]
    bench.scheduler.finish(a)
    assert bench.told() == ([("b", 64, 64)], [])
    assert bench.told() == ([], ["b"])
    assert b.num_computed == 2 * PAGE_SIZE + 1


def test_a_prefill_may_be_preempted_in_the_middle() -> None:
    bench = Bench(pages=3)
    a, b = request("a", PAGE_SIZE - 1), request("b", 200)
    bench.add(a, b)
    assert bench.told() == ([("a", 0, 63), ("b", 0, 1)], [])
    assert bench.told() == ([("b", 1, 64)], ["a"])
    assert bench.told() == ([("b", 0, 64)], ["a"])  # a's 65th token takes a page of b, which starts anew
    assert len(a.pages) == 2
    assert bench.told() == ([], ["a"])
    bench.scheduler.finish(a)
    assert bench.told() == ([("b", 64, 64)], [])


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_finish_frees_the_pages_in_every_state(steps: int) -> None:
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


def test_check_finds_a_page_that_two_requests_hold() -> None:
    bench = Bench(pages=4)
    a, b = request("a", 3), request("b", 3)
    bench.add(a, b)
    bench.step()
    b.pages = list(a.pages)
    with pytest.raises(AssertionError, match="pages"):
        bench.scheduler.check()
