"""PagePool: reference counts of the cache's pages, and the hashes by which full pages are found again.

A page is free; allocated to one request, which fills it; registered under the hash of its content when it is full;
shared by requests with the same prefix; unreferenced, but still registered; and evicted, least recently used first,
when a page is needed and none is free. A page's leading tokens are indexed, too, also those of a page that is not full:
a request that continues some of them otherwise starts with a copy of the page. docs/kv-cache.md explains this in
detail.
"""

import hashlib
from bisect import bisect_left, insort
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from model.kv_cache import NULL_PAGE
from model.token_logprobs import TokenLogprobs


class PagePool:
    """All pages of a cache except the null page."""

    def __init__(self, pages: int, *, caching: bool = True) -> None:
        """A pool of `pages` pages, including the null page. Without `caching`, pages are never registered."""
        self.caching = caching
        self._pages = [page for page in range(pages) if page != NULL_PAGE]
        self._free: deque[int] = deque()
        self._unreferenced: OrderedDict[int, None] = OrderedDict()  # registered pages, least recently used first
        self._ref_counts: Counter[int] = Counter()
        self._page_to_hash: dict[int, bytes] = {}
        self._hash_to_page: dict[bytes, int] = {}
        self._logprobs: dict[bytes, TokenLogprobs] = {}
        # What comes before pages -> their tokens, ascending, as big-endian bytes, and the pages. Of all entries, a
        # neighbour of the place where other tokens would be inserted has most of their first tokens.
        self._starts: dict[bytes, list[tuple[bytes, int]]] = defaultdict(list)
        self._page_to_start: dict[int, tuple[bytes, bytes]] = {}  # key and tokens in _starts
        self.capacity = len(self._pages)
        self.clear()

    @property
    def num_free(self) -> int:
        """Number of pages that can be allocated, including registered ones."""
        return len(self._free) + len(self._unreferenced)

    @property
    def usage(self) -> float:
        """Share of the pages that are referenced, 0 to 1."""
        return len(self._ref_counts) / max(1, self.capacity)

    def allocate(self, count: int) -> list[int] | None:
        """Allocate `count` pages to write to, evicting registered ones if necessary. None if there are fewer."""
        if count > self.num_free:
            return None
        if missing := max(0, count - len(self._free)):
            self.unregister(list(islice(self._unreferenced, missing)))  # evict the least recently used
        pages = [self._free.popleft() for _ in range(count)]
        self._ref_counts.update(pages)
        return pages

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The registered pages of the longest prefix of `hashes`. Does not reference them."""
        pages = []
        for content in hashes:
            page = self._hash_to_page.get(content)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_unreferenced(self, pages: Iterable[int]) -> int:
        return sum(page in self._unreferenced for page in pages)

    def share(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._unreferenced.pop(page, None)
        self._ref_counts.update(pages)

    def deallocate(self, pages: Sequence[int]) -> None:
        """Remove a reference from each page of a block table. Its last pages will be evicted first."""
        for page in reversed(pages):
            self._ref_counts[page] -= 1
            if self._ref_counts[page]:
                continue
            del self._ref_counts[page]
            if page in self._page_to_hash or page in self._page_to_start:
                self._unreferenced[page] = None
            else:
                self._free.append(page)

    def register(self, page: int, content: bytes) -> None:
        """Register a full page under the hash of its content, unless another page is registered under it."""
        if self.caching and content not in self._hash_to_page:
            self._hash_to_page[content] = page
            self._page_to_hash[page] = content

    def index(self, page: int, before: bytes, tokens: Sequence[int]) -> None:
        """Make the leading tokens of a page known to find_start(). `before` identifies what precedes them."""
        if not self.caching or (page not in self._ref_counts and page not in self._unreferenced):
            return
        content, starts = _sortable(tokens), self._starts[before]
        place = bisect_left(starts, (content, -1))
        if place == len(starts) or not starts[place][0].startswith(content):  # no other page has these tokens
            self._drop_start(page)
            insort(self._starts[before], (content, page))
            self._page_to_start[page] = before, content

    def find_start(self, before: bytes, tokens: Sequence[int]) -> tuple[int, int]:
        """The indexed page that has most of the first `tokens` after `before`, and their number. Adds no reference."""
        starts = self._starts.get(before)
        if not starts:
            return NULL_PAGE, 0
        content = _sortable(tokens)
        place = bisect_left(starts, (content, -1))
        count, page = max(
            (_shared_tokens(content, start), page) for start, page in starts[max(0, place - 1) : place + 1]
        )
        return page, count

    def store_logprobs(self, content: bytes, logprobs: TokenLogprobs) -> None:
        """Store the log-probs [S] of a registered page's tokens until the page is evicted or unregistered."""
        if content in self._hash_to_page:
            self._logprobs[content] = logprobs

    def logprobs(self, content: bytes) -> TokenLogprobs | None:
        return self._logprobs.get(content)

    def unregister(self, pages: Iterable[int]) -> None:
        """Remove pages from the prefix cache. References are unchanged."""
        for page in pages:
            if content := self._page_to_hash.pop(page, None):
                del self._hash_to_page[content]
                self._logprobs.pop(content, None)
            self._drop_start(page)
            if page in self._unreferenced:
                del self._unreferenced[page]
                self._free.append(page)

    def clear(self) -> None:
        """Free and unregister all pages, whose content is lost."""
        tables = (self._unreferenced, self._ref_counts, self._page_to_hash, self._hash_to_page, self._logprobs)
        for table in (*tables, self._starts, self._page_to_start):
            table.clear()
        self._free = deque(self._pages)

    def check(self, referenced: Iterable[int]) -> None:
        """Raise AssertionError if the pool is inconsistent, or does not match `referenced`, all block tables joined."""
        if Counter(referenced) != self._ref_counts:
            raise AssertionError("block tables and the pool's reference counts disagree")
        if sorted([*self._free, *self._unreferenced, *self._ref_counts]) != self._pages:
            raise AssertionError(
                f"{len(self._free)} free, {len(self._unreferenced)} unreferenced and {len(self._ref_counts)} "
                f"referenced pages do not add up to {self.capacity} pages"
            )
        if {page: content for content, page in self._hash_to_page.items()} != self._page_to_hash:
            raise AssertionError("pages and their hashes disagree")
        starts = {page: (before, content) for before, pages in self._starts.items() for content, page in pages}
        if starts != self._page_to_start:
            raise AssertionError("pages and their indexed tokens disagree")
        if not (
            self._unreferenced.keys() <= self._page_to_hash.keys() | self._page_to_start.keys()
            and self._logprobs.keys() <= self._hash_to_page.keys()
        ):
            raise AssertionError("an unregistered page is cached or has log-probs")

    def _drop_start(self, page: int) -> None:
        if (entry := self._page_to_start.pop(page, None)) is None:
            return
        before, content = entry
        starts = self._starts[before]
        starts.remove((content, page))
        if not starts:
            del self._starts[before]


def root_hash(salt: str) -> bytes:
    """Parent hash of a first page. Requests with different salts share no pages."""
    return hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()


def page_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a page with these token ids that follows pages with the chained hash `parent`."""
    return hashlib.sha256(parent + np.asarray(tokens, np.int32).tobytes()).digest()


def _sortable(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, ">u4").tobytes()


def _shared_tokens(a: bytes, b: bytes) -> int:
    """Number of tokens at the start of both."""
    size = min(len(a), len(b))
    differs = np.frombuffer(a, np.uint32, size // 4) != np.frombuffer(b, np.uint32, size // 4)
    return int(differs.argmax()) if differs.any() else size // 4
