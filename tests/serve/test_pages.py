"""PagePool: pages are handed out once each, and a page that is lost or shared is found out."""

import pytest

from model.kv_cache import NULL_PAGE
from serve.engine.pages import PagePool


def test_every_page_but_the_null_page_is_handed_out_once() -> None:
    pool = PagePool(5)
    assert pool.capacity == pool.num_free == 4
    taken = [*(pool.take(1) or []), *(pool.take(3) or [])]
    assert sorted(taken) == [1, 2, 3, 4]
    assert NULL_PAGE not in taken
    assert pool.num_free == 0


def test_too_many_pages_are_none_at_all() -> None:
    pool = PagePool(4)
    assert pool.take(4) is None
    assert pool.num_free == 3
    assert pool.take(0) == []
    assert pool.take(3) == [1, 2, 3]
    assert pool.take(0) == []
    assert pool.take(1) is None


def test_pages_come_back_in_order_of_release() -> None:
    pool = PagePool(5)
    pool.take(4)
    pool.give_back([3])
    pool.give_back([1, 4])
    assert pool.take(3) == [3, 1, 4]


def test_check_accepts_what_is_whole() -> None:
    pool = PagePool(5)
    pool.check([])
    held = pool.take(3)
    assert held is not None
    pool.check(held)
    pool.check(held[::-1])


@pytest.mark.parametrize(
    "held", [[], [1], [1, 2, 2], [1, 2, 3], [1, 3], [1, NULL_PAGE], [1, 9]], ids=lambda held: str(held)
)
def test_check_finds_lost_shared_and_foreign_pages(held: list[int]) -> None:
    pool = PagePool(5)
    assert pool.take(2) == [1, 2]
    with pytest.raises(AssertionError, match="2 free"):
        pool.check(held)
