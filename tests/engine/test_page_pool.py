"""PagePool: allocation, reference counts, registration by content, eviction."""

import random
from itertools import takewhile

import pytest

from model.kv_cache import NULL_PAGE, PAGE_SIZE
from model.token_logprobs import empty_logprobs
from serve.engine.page_pool import PagePool, page_hash, root_hash, sortable


def test_allocate_excludes_null_page() -> None:
    pool = PagePool(5)
    assert pool.capacity == pool.num_free == 4
    pages = [*(pool.allocate(1) or []), *(pool.allocate(3) or [])]
    assert sorted(pages) == [1, 2, 3, 4]
    assert NULL_PAGE not in pages
    assert pool.num_free == 0


def test_allocate_too_many() -> None:
    pool = PagePool(4)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert pool.allocate(0) == []
    assert pool.allocate(3) == [1, 2, 3]
    assert pool.allocate(0) == []
    assert pool.allocate(1) is None


def test_allocate_order_after_deallocate() -> None:
    pool = PagePool(5)
    pool.allocate(4)
    pool.deallocate([3])
    pool.deallocate([1, 4])
    assert pool.allocate(3) == [3, 4, 1]  # the last page of a block table first


def test_check_consistent_pool() -> None:
    pool = PagePool(5)
    pool.check([])
    pages = pool.allocate(3)
    assert pages is not None
    pool.check(pages)
    pool.check(pages[::-1])


@pytest.mark.parametrize("references", [[], [1], [1, 2, 2], [1, 2, 3], [1, 3], [1, NULL_PAGE], [1, 9]], ids=str)
def test_check_wrong_references(references: list[int]) -> None:
    pool = PagePool(5)
    assert pool.allocate(2) == [1, 2]
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check(references)


def content(number: int) -> bytes:
    return page_hash(root_hash(""), [number] * PAGE_SIZE)


def filled(pool: PagePool, *numbers: int) -> list[int]:
    """Unreferenced pages that are registered under contents with these numbers."""
    pages = pool.allocate(len(numbers))
    assert pages is not None
    for page, number in zip(pages, numbers, strict=True):
        pool.register(page, content(number))
    pool.deallocate(pages)
    pool.check([])
    return pages


def test_find_registered_page_after_deallocate() -> None:
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


def test_allocate_prefers_free_to_cached() -> None:
    pool = PagePool(5)
    filled(pool, 1, 2)
    pages = pool.allocate(2)
    assert pages is not None
    assert len(pool.find([content(1), content(2)])) == 2
    pool.check(pages)


def test_evict_least_recently_used_and_last_of_prefix() -> None:
    pool = PagePool(4)
    one, two = filled(pool, 1, 2)
    (three,) = filled(pool, 3)
    pool.share([one])  # used again: the order is now 2, 3, 1
    pool.deallocate([one])
    assert pool.allocate(1) == [two]
    assert pool.find([content(2)]) == []
    assert pool.allocate(1) == [three]
    assert pool.find([content(1)]) == [one]
    pool.check([two, three])


def test_evict_never_referenced_page() -> None:
    pool = PagePool(3)
    one, two = filled(pool, 1, 2)
    pool.share([one])
    assert pool.num_unreferenced([one, two]) == 1
    assert pool.allocate(2) is None
    assert pool.allocate(1) == [two]
    assert pool.find([content(1)]) == [one]


def test_register_same_content_keeps_first() -> None:
    pool = PagePool(4)
    (one,) = filled(pool, 1)
    pages = pool.allocate(3)
    assert pages is not None
    assert one in pages  # evicted: content 1 is no longer registered
    pool.register(pages[0], content(1))
    pool.register(pages[1], content(1))
    assert pool.find([content(1)]) == [pages[0]]
    pool.deallocate(pages)
    pool.check([])
    assert pool.num_free == 3


def test_scores_until_eviction() -> None:
    pool = PagePool(2)
    filled(pool, 1)
    logprobs = empty_logprobs(PAGE_SIZE, 2)
    pool.store_logprobs(content(1), logprobs)
    pool.store_logprobs(content(2), logprobs)  # not registered
    assert pool.logprobs(content(1)) is logprobs
    assert pool.logprobs(content(2)) is None
    pool.check([])
    pool.allocate(1)
    assert pool.logprobs(content(1)) is None


def test_clear_frees_and_unregisters() -> None:
    pool = PagePool(4)
    filled(pool, 1, 2)
    pool.store_logprobs(content(1), empty_logprobs(PAGE_SIZE, 2))
    pool.allocate(1)
    pool.clear()
    pool.check([])
    assert pool.num_free == 3
    assert pool.find([content(1)]) == []
    assert pool.logprobs(content(1)) is None


def test_unregister_keeps_references() -> None:
    pool = PagePool(5)
    filled(pool, 1, 2, 3)
    pool.store_logprobs(content(1), empty_logprobs(PAGE_SIZE, 2))
    shared, unreferenced, other = pool.find([content(1), content(2), content(3)])
    pool.share([shared])
    pool.unregister([shared, unreferenced, NULL_PAGE])
    pool.check([shared])
    assert pool.find([content(1)]) == pool.find([content(2)]) == []
    assert pool.logprobs(content(1)) is None
    assert pool.find([content(3)]) == [other]
    pool.deallocate([shared])
    pool.check([])
    assert pool.num_free == 4


def test_register_without_caching() -> None:
    pool = PagePool(4, caching=False)
    filled(pool, 1, 2)
    assert pool.find([content(1)]) == []
    assert pool.num_free == 3


def test_page_hash_of_tokens_parent_and_salt() -> None:
    tokens = list(range(PAGE_SIZE))
    others = [
        page_hash(root_hash(""), tokens),
        page_hash(root_hash("a"), tokens),
        page_hash(root_hash(""), tokens[::-1]),
        page_hash(page_hash(root_hash(""), tokens), tokens),
    ]
    assert len(set(others)) == 4
    assert page_hash(root_hash("a"), tokens) == others[1]


ROOT = root_hash("")


def test_find_start_has_most_of_the_first_tokens() -> None:
    draw = random.Random(1)
    alphabet = (0, 1, 2, 255, 256, 70_000)

    def tokens() -> list[int]:
        return draw.choices(alphabet, k=draw.randint(1, 8))

    def shared(a: list[int], b: list[int]) -> int:
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))

    pool = PagePool(200)
    contents = {page: tokens() for page in pool.allocate(150) or []}
    for page, content in contents.items():
        pool.index(page, ROOT, sortable(content))
    pool.check(list(contents))
    for wanted in (tokens() for _ in range(300)):
        page, count = pool.find_start(ROOT, sortable(wanted))
        assert count == max(shared(wanted, content) for content in contents.values())
        assert contents[page][:count] == wanted[:count]
    assert pool.find_start(root_hash("other"), sortable([1])) == (NULL_PAGE, 0)


def test_indexed_page_is_cached_until_it_is_evicted() -> None:
    pool = PagePool(3)
    first, second = pool.allocate(2) or []
    pool.index(first, ROOT, sortable([1, 2, 3]))
    pool.index(second, ROOT, sortable([1, 2]))  # another page has these
    pool.deallocate([first, second])
    pool.check([])
    assert pool.find_start(ROOT, sortable([1, 2, 3])) == (first, 3)
    assert pool.allocate(1) == [second]
    assert pool.allocate(1) == [first]
    assert pool.find_start(ROOT, sortable([1, 2, 3])) == (NULL_PAGE, 0)
    pool.check([first, second])


def test_index_follows_a_page_that_fills() -> None:
    pool = PagePool(3)
    (page,) = pool.allocate(1) or []
    pool.index(page, ROOT, sortable([1, 2]))
    pool.index(page, ROOT, sortable([1, 2, 3]))
    assert pool.find_start(ROOT, sortable([1, 2, 3, 4])) == (page, 3)
    pool.check([page])
    pool.unregister([page])
    assert pool.find_start(ROOT, sortable([1, 2, 3, 4])) == (NULL_PAGE, 0)
    pool.check([page])


def test_index_ignores_a_free_page() -> None:
    pool = PagePool(3)
    pages = pool.allocate(1) or []
    pool.deallocate(pages)
    pool.index(pages[0], ROOT, sortable([1, 2]))
    assert pool.find_start(ROOT, sortable([1, 2])) == (NULL_PAGE, 0)
    pool.check([])
