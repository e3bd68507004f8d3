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
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from model.kv_cache import NULL_PAGE
from model.token_logprobs import TokenLogprobs


class PageStarts:
    """Leading tokens of pages. A key stands for what precedes a page."""

    def __init__(self) -> None:
        # Key -> tokens, as big-endian bytes, and page, ascending. Of the tokens under a key, a neighbour of the place
        # where others would be inserted has the longest start in common with them.
        self._by_key: dict[bytes, list[tuple[bytes, int]]] = defaultdict(list)
        self._by_page: dict[int, tuple[bytes, bytes]] = {}  # key and tokens

    def add(self, page: int, key: bytes, tokens: bytes) -> None:
        """Set the tokens of a page, unless another page has them."""
        starts = self._by_key[key]
        place = bisect_left(starts, (tokens, -1))
        if place == len(starts) or not starts[place][0].startswith(tokens):
            self.remove(page)
            insort(self._by_key[key], (tokens, page))
            self._by_page[page] = key, tokens

    def find(self, key: bytes, tokens: bytes) -> tuple[int, int]:
        """The page that has most of the first `tokens`, and their number; the null page and 0 without one."""
        starts = self._by_key.get(key)
        if not starts:
            return NULL_PAGE, 0
        place = bisect_left(starts, (tokens, -1))
        near = starts[max(0, place - 1) : place + 1]
        count, page = max((_shared_tokens(tokens, start), page) for start, page in near)
        return page, count

    def remove(self, page: int) -> None:
        if (entry := self._by_page.pop(page, None)) is None:
            return
        key, tokens = entry
        starts = self._by_key[key]
        del starts[bisect_left(starts, (tokens, page))]
        if not starts:
            del self._by_key[key]

    def clear(self) -> None:
        self._by_key.clear()
        self._by_page.clear()

    def items(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Each page, its key and its tokens."""
        yield from ((page, key, tokens) for page, (key, tokens) in self._by_page.items())

    def __contains__(self, page: int) -> bool:
        return page in self._by_page

    def check(self) -> None:
        """Raise AssertionError if keys and pages disagree."""
        pages = {page: (key, tokens) for key, starts in self._by_key.items() for tokens, page in starts}
        if pages != self._by_page:
            raise AssertionError("pages and their leading tokens disagree")


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
        self._starts = PageStarts()
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
            if page in self._page_to_hash or page in self._starts:
                self._unreferenced[page] = None
            else:
                self._free.append(page)

    def register(self, page: int, content: bytes) -> None:
        """Register a full page under the hash of its content, unless another page is registered under it."""
        if self.caching and content not in self._hash_to_page:
            self._hash_to_page[content] = page
            self._page_to_hash[page] = content

    def index(self, page: int, key: bytes, tokens: bytes) -> None:
        """Make the leading tokens of a page known to find_start(); see PageStarts."""
        if self.caching and (page in self._ref_counts or page in self._unreferenced):
            self._starts.add(page, key, tokens)

    def find_start(self, key: bytes, tokens: bytes) -> tuple[int, int]:
        """The indexed page that has most of the first `tokens`, and their number. Adds no reference."""
        return self._starts.find(key, tokens)

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
            self._starts.remove(page)
            if page in self._unreferenced:
                del self._unreferenced[page]
                self._free.append(page)

    def clear(self) -> None:
        """Free and unregister all pages, whose content is lost."""
        for table in (self._unreferenced, self._ref_counts, self._page_to_hash, self._hash_to_page, self._logprobs):
            table.clear()
        self._starts.clear()
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
        self._starts.check()
        if not (
            all(page in self._page_to_hash or page in self._starts for page in self._unreferenced)
            and self._logprobs.keys() <= self._hash_to_page.keys()
        ):
            raise AssertionError("an unregistered page is cached or has log-probs")


def root_hash(salt: str) -> bytes:
    """Parent hash of a first page. Requests with different salts share no pages."""
    return hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()


def page_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a page with these token ids that follows pages with the chained hash `parent`."""
    return hashlib.sha256(parent + np.asarray(tokens, np.int32).tobytes()).digest()


def sortable(tokens: Sequence[int]) -> bytes:
    """Token ids as bytes in the same order."""
    return np.asarray(tokens, ">u4").tobytes()


def _shared_tokens(a: bytes, b: bytes) -> int:
    """Number of tokens at the start of both."""
    size = min(len(a), len(b))
    differs = np.frombuffer(a, np.uint32, size // 4) != np.frombuffer(b, np.uint32, size // 4)
    return int(differs.argmax()) if differs.any() else size // 4
