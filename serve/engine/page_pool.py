"""PagePool: who holds which page of the cache, and what a page is known to contain.

The life of a page: free; held by one request, which fills it; registered under the hash of its content once it is full;
held by more requests that begin with the same tokens; nobody's, but kept for the next; evicted, the least recently used
first, when a page is needed and none is free. docs/pages.md tells it at length.
"""

import hashlib
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence

import numpy as np

from model.kv_cache import NULL_PAGE
from serve.engine.request import TokenScores


class PagePool:
    """The pages of a cache but for the null page, which is nobody's."""

    def __init__(self, pages: int, *, caching: bool = True) -> None:
        """`pages` pages, the null page among them. Without `caching`, a page is forgotten when its holder ends."""
        self._caching = caching
        self._pages = [page for page in range(pages) if page != NULL_PAGE]
        self._free: deque[int] = deque()
        self._idle: OrderedDict[int, None] = OrderedDict()  # registered, held by nobody; least recently used first
        self._holders: Counter[int] = Counter()
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._scores: dict[bytes, TokenScores] = {}
        self.capacity = len(self._pages)
        self.clear()

    @property
    def num_free(self) -> int:
        """Pages that nobody holds: take() gives them, cached or not."""
        return len(self._free) + len(self._idle)

    @property
    def usage(self) -> float:
        """Share of the pages that somebody holds."""
        return len(self._holders) / max(1, self.capacity)

    def take(self, count: int) -> list[int] | None:
        """`count` pages to write to, or None (and nothing taken) if there are fewer. Evicts what is least in use."""
        if count > self.num_free:
            return None
        pages = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        self._holders.update(pages)
        return pages

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The registered pages of the longest leading run of `hashes`; nobody's hold is changed."""
        pages = []
        for each in hashes:
            page = self._page_of.get(each)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_idle(self, pages: Iterable[int]) -> int:
        """How many of `pages` nobody holds: holding them makes num_free so much less."""
        return sum(page in self._idle for page in pages)

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder for registered pages."""
        for page in pages:
            self._idle.pop(page, None)
        self._holders.update(pages)

    def give_back(self, pages: Sequence[int]) -> None:
        """Ends one hold of each page. The last pages of a run are evicted first: its beginning is worth more."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._hash_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def register(self, page: int, content: bytes) -> None:
        """Makes a full page known by the hash of its content; of two pages of the same content the first stays."""
        if self._caching and content not in self._page_of:
            self._page_of[content] = page
            self._hash_of[page] = content

    def keep_scores(self, content: bytes, scores: TokenScores) -> None:
        """Keeps the numbers of a registered page's tokens, [S], for as long as the page is known."""
        if content in self._page_of:
            self._scores[content] = scores

    def scores(self, content: bytes) -> TokenScores | None:
        """The numbers of a registered page's tokens, [S], if they were kept."""
        return self._scores.get(content)

    def forget(self, pages: Iterable[int]) -> None:
        """Makes pages unknown again. Who holds them keeps them."""
        for page in pages:
            content = self._hash_of.pop(page, None)
            if content is None:
                continue
            del self._page_of[content]
            self._scores.pop(content, None)
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def clear(self) -> None:
        """All pages free and unknown: the device has lost what they held, and nobody asks for them any more."""
        for books in (self._idle, self._holders, self._hash_of, self._page_of, self._scores):
            books.clear()
        self._free = deque(self._pages)

    def check(self, held: Iterable[int]) -> None:
        """Raises AssertionError unless `held`, all block tables in one line, free and idle pages are all pages."""
        if Counter(held) != self._holders:
            raise AssertionError("the block tables and the pool disagree on who holds what")
        if sorted([*self._free, *self._idle, *self._holders]) != self._pages:
            raise AssertionError(
                f"{len(self._free)} free, {len(self._idle)} idle and {len(self._holders)} held pages "
                f"are not {self.capacity} pages"
            )
        if {page: content for content, page in self._page_of.items()} != self._hash_of:
            raise AssertionError("pages and the hashes they are known by disagree")
        if not (self._idle.keys() <= self._hash_of.keys() and self._scores.keys() <= self._page_of.keys()):
            raise AssertionError("something is kept of a page that is not known")

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        content = self._hash_of.pop(page)
        del self._page_of[content]
        self._scores.pop(content, None)
        return page


def root_hash(salt: str) -> bytes:
    """What the first page's hash starts from: requests of different salts share nothing."""
    return hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()


def page_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a page with these token ids, after pages whose chained hash is `before`."""
    return hashlib.sha256(before + np.asarray(tokens, np.int32).tobytes()).digest()
