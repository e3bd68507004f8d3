"""PrefixIndex: which replica has seen how much of a prompt, and so where the next one is best sent.

A prompt is known by its bytes, not by its tokens: whoever chooses a replica has no tokenizer. Blocks of bytes are
chained by their hashes, as pages are in the engine's cache: two prompts have block i in common when they begin alike.
"""

import hashlib
import itertools
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence

import orjson

BLOCK_BYTES = 256  # about a page of 64 tokens
_MAX_BLOCKS = 1024  # of one prompt: what comes after them tells no more
_DIGEST_BYTES = 8
_PROMPTS = ("prompt_token_ids", "messages", "prompt")  # the first that a request has is what the model reads


def prompt_blocks(body: bytes) -> tuple[bytes, ...]:
    """The chained hashes of the full blocks of a request's prompt; none where it has no prompt that can be read.

    The prompt is hashed as JSON: a longer list of messages or ids, or a longer text, begins like the shorter one.
    Requests with other values of `cache_salt`, which share no pages, have no block in common.
    """
    try:
        request = orjson.loads(body)
    except ValueError:
        return ()
    if not isinstance(request, dict):
        return ()
    name = next((name for name in _PROMPTS if request.get(name) is not None), None)
    if name is None:
        return ()
    try:
        key = orjson.dumps(request[name])[:-1]  # without the bracket or quote that closes it
        link, blocks = _digest(orjson.dumps([request.get("cache_salt"), name])), []
    except orjson.JSONEncodeError:  # too deep; the replica refuses it
        return ()
    for start in range(0, min(len(key) // BLOCK_BYTES, _MAX_BLOCKS) * BLOCK_BYTES, BLOCK_BYTES):
        link = _digest(link + key[start : start + BLOCK_BYTES])
        blocks.append(link)
    return tuple(blocks)


class PrefixIndex:
    """Remembers what was sent where, and how much of that is unfinished."""

    def __init__(self, *, max_blocks: int, margin: int) -> None:
        """An empty index.

        Args:
            max_blocks: that are remembered; the least recently used are forgotten.
            margin: requests that a replica may have more than the least loaded one and still be chosen for what it
                has seen.
        """
        self._max_blocks = max_blocks
        self._margin = margin
        self._seen: OrderedDict[bytes, set[str]] = OrderedDict()
        self._running: Counter[str] = Counter()  # requests of each replica
        self._last: dict[str, int] = {}  # replica -> when it was last given a request
        self._known: set[str] = set()  # all of which anything is remembered
        self._clock = itertools.count(1)

    def ranked(self, blocks: Sequence[bytes], replicas: Mapping[str, int]) -> list[str]:
        """The replicas, best first.

        Args:
            blocks: of the prompt.
            replicas: those that may be chosen, with the requests that each is known to have from elsewhere, too.
        """
        load = {each: max(told, self._running[each]) for each, told in replicas.items()}
        most = min(load.values(), default=0) + self._margin
        match = self._matches(blocks, load)

        def badness(replica: str) -> tuple[int, int, int]:
            useful = match[replica] if load[replica] <= most else 0
            return -useful, load[replica], self._last.get(replica, 0)  # in turn, if all else is equal

        return sorted(load, key=badness)

    def sent(self, replica: str) -> None:
        """A request is on its way."""
        self._known.add(replica)
        self._running[replica] += 1
        self._last[replica] = next(self._clock)

    def ended(self, replica: str) -> None:
        """A request has ended, in whatever way."""
        if self._running[replica]:  # else the replica is forgotten
            self._running[replica] -= 1

    def saw(self, replica: str, blocks: Sequence[bytes]) -> None:
        """A replica has taken a prompt, and will have it in its cache."""
        self._known.add(replica)
        for block in reversed(blocks):  # the first last: without it those after it are of no use
            self._seen.setdefault(block, set()).add(replica)
            self._seen.move_to_end(block)
        while len(self._seen) > self._max_blocks:
            self._seen.popitem(last=False)

    def keep(self, replicas: Collection[str]) -> None:
        """Forgets all other replicas."""
        gone = self._known.difference(replicas)
        if not gone:
            return
        self._known -= gone
        for replica in gone:
            self._last.pop(replica, None)
            self._running.pop(replica, None)
        for block, seen in list(self._seen.items()):
            seen -= gone
            if not seen:
                del self._seen[block]

    def _matches(self, blocks: Sequence[bytes], replicas: Collection[str]) -> dict[str, int]:
        """How many of the first blocks each replica has seen."""
        match, left = dict.fromkeys(replicas, 0), set(replicas)
        for block in blocks:
            left &= self._seen.get(block, set())
            if not left:
                break
            for replica in left:
                match[replica] += 1
        return match


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
