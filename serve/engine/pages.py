"""PagePool: which pages of the cache are free."""

from collections import deque

from model.kv_cache import NULL_PAGE


class PagePool:
    """Free pages of a cache of `pages` pages; the null page is nobody's. Pages are handed out in order of release."""

    def __init__(self, pages: int) -> None:
        self._pages = [page for page in range(pages) if page != NULL_PAGE]
        self._free = deque(self._pages)
        self.capacity = len(self._pages)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` pages, or None (and nothing taken) if there are fewer."""
        if count > len(self._free):
            return None
        return [self._free.popleft() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Returns pages to the pool."""
        self._free.extend(pages)

    def check(self, held: list[int]) -> None:
        """Raises AssertionError unless free and held pages are all pages, each once."""
        if sorted([*self._free, *held]) != self._pages:
            raise AssertionError(f"{len(self._free)} free and {len(held)} held pages are not {self.capacity} pages")
