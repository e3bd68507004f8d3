"""PagePool: pages are handed out once each, found again by their content, and nothing is lost or held unseen."""

import pytest

from model.kv_cache import NULL_PAGE, PAGE_SIZE
from serve.engine.page_pool import PagePool, page_hash, root_hash
from serve.engine.request import empty_scores


def test_every_page_but_the_null_page_is_handed_out_once() -> None:
    pool = PagePool(5)
    assert pool.capacity == pool.num_free == 4
    taken = [*(pool.allocate(1) or []), *(pool.allocate(3) or [])]
    assert sorted(taken) == [1, 2, 3, 4]
    assert NULL_PAGE not in taken
    assert pool.num_free == 0


def test_too_many_pages_are_none_at_all() -> None:
    pool = PagePool(4)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert pool.allocate(0) == []
    assert pool.allocate(3) == [1, 2, 3]
    assert pool.allocate(0) == []
    assert pool.allocate(1) is None


def test_pages_come_back_in_order_of_release() -> None:
    pool = PagePool(5)
    pool.allocate(4)
    pool.deallocate([3])
    pool.deallocate([1, 4])
    assert pool.allocate(3) == [3, 4, 1]  # of one block table the last page first


def test_check_accepts_what_is_whole() -> None:
    pool = PagePool(5)
    pool.check([])
    held = pool.allocate(3)
    assert held is not None
    pool.check(held)
    pool.check(held[::-1])


@pytest.mark.parametrize(
    "held", [[], [1], [1, 2, 2], [1, 2, 3], [1, 3], [1, NULL_PAGE], [1, 9]], ids=lambda held: str(held)
)
def test_check_finds_lost_shared_and_foreign_pages(held: list[int]) -> None:
    pool = PagePool(5)
    assert pool.allocate(2) == [1, 2]
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check(held)


def content(number: int) -> bytes:
    return page_hash(root_hash(""), [number] * PAGE_SIZE)


def filled(pool: PagePool, *numbers: int) -> list[int]:
    """Pages that were held, registered under contents of these numbers, and given back."""
    pages = pool.allocate(len(numbers))
    assert pages is not None
    for page, number in zip(pages, numbers, strict=True):
        pool.register(page, content(number))
    pool.deallocate(pages)
    pool.check([])
    return pages


def test_a_registered_page_is_found_by_its_content_after_its_holder_has_gone() -> None:
    pool = PagePool(5)
    first, second = filled(pool, 1, 2)
    assert pool.num_free == 4
    assert pool.find([content(1), content(2), content(3)]) == [first, second]
    assert pool.find([content(3), content(1)]) == []  # only a leading run
    pool.share([first])
    pool.share([first])
    assert pool.num_free == 3
    pool.check([first, first])
    pool.deallocate([first])
    assert pool.num_free == 3
    pool.deallocate([first])
    assert pool.num_free == 4


def test_pages_without_content_are_taken_before_cached_ones_are_evicted() -> None:
    pool = PagePool(5)
    filled(pool, 1, 2)
    taken = pool.allocate(2)
    assert taken is not None
    assert len(pool.find([content(1), content(2)])) == 2
    pool.check(taken)


def test_the_least_recently_used_page_is_evicted_and_of_a_run_the_last() -> None:
    pool = PagePool(4)
    one, two = filled(pool, 1, 2)
    (three,) = filled(pool, 3)
    pool.share([one])  # used again: now 2 is the oldest, then 3, then 1
    pool.deallocate([one])
    assert pool.allocate(1) == [two]
    assert pool.find([content(2)]) == []
    assert pool.allocate(1) == [three]
    assert pool.find([content(1)]) == [one]
    pool.check([two, three])


def test_a_held_page_is_never_evicted() -> None:
    pool = PagePool(3)
    one, two = filled(pool, 1, 2)
    pool.share([one])
    assert pool.num_unreferenced([one, two]) == 1
    assert pool.allocate(2) is None
    assert pool.allocate(1) == [two]
    assert pool.find([content(1)]) == [one]


def test_of_two_pages_with_one_content_the_first_stays_known() -> None:
    pool = PagePool(4)
    (one,) = filled(pool, 1)
    taken = pool.allocate(3)
    assert taken is not None
    assert one in taken  # evicted: 1 is not known any more
    pool.register(taken[0], content(1))
    pool.register(taken[1], content(1))
    assert pool.find([content(1)]) == [taken[0]]
    pool.deallocate(taken)
    pool.check([])
    assert pool.num_free == 3


def test_scores_live_as_long_as_their_page_is_known() -> None:
    pool = PagePool(2)
    filled(pool, 1)
    scores = empty_scores(PAGE_SIZE, 2)
    pool.store_scores(content(1), scores)
    pool.store_scores(content(2), scores)  # of no page
    assert pool.scores(content(1)) is scores
    assert pool.scores(content(2)) is None
    pool.check([])
    pool.allocate(1)
    assert pool.scores(content(1)) is None


def test_clearing_leaves_free_pages_and_nothing_known() -> None:
    pool = PagePool(4)
    filled(pool, 1, 2)
    pool.store_scores(content(1), empty_scores(PAGE_SIZE, 2))
    pool.allocate(1)
    pool.clear()
    pool.check([])
    assert pool.num_free == 3
    assert pool.find([content(1)]) == []
    assert pool.scores(content(1)) is None


def test_pages_that_are_forgotten_stay_with_their_holders() -> None:
    pool = PagePool(5)
    filled(pool, 1, 2, 3)
    pool.store_scores(content(1), empty_scores(PAGE_SIZE, 2))
    held, idle, other = pool.find([content(1), content(2), content(3)])
    pool.share([held])
    pool.unregister([held, idle, NULL_PAGE])
    pool.check([held])
    assert pool.find([content(1)]) == pool.find([content(2)]) == []
    assert pool.scores(content(1)) is None
    assert pool.find([content(3)]) == [other]
    pool.deallocate([held])
    pool.check([])
    assert pool.num_free == 4


def test_without_caching_nothing_is_known() -> None:
    pool = PagePool(4, caching=False)
    filled(pool, 1, 2)
    assert pool.find([content(1)]) == []
    assert pool.num_free == 3


def test_the_hash_is_of_the_tokens_of_all_before_them_and_of_the_salt() -> None:
    tokens = list(range(PAGE_SIZE))
    others = [
        page_hash(root_hash(""), tokens),
        page_hash(root_hash("a"), tokens),
        page_hash(root_hash(""), tokens[::-1]),
        page_hash(page_hash(root_hash(""), tokens), tokens),
    ]
    assert len(set(others)) == 4
    assert page_hash(root_hash("a"), tokens) == others[1]
