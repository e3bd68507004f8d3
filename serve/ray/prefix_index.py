"""PrefixIndex: which replica has which prompt prefixes in its cache, to rank the replicas for the next request.

The router has no tokenizer, so prompts are compared as bytes. Blocks of bytes are identified by chained hashes, like
the pages of the engine's prefix cache: two prompts share block i if they are equal up to its end.
"""

import hashlib
import itertools
from collections import Counter, OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence

import orjson

from serve.api.request_body import json_object

BLOCK_BYTES = 256  # about a page of 64 tokens
_MAX_BLOCKS = 1024  # per prompt; the rest is ignored
_DIGEST_BYTES = 8
# The first one present is the prompt.
_PROMPT_FIELDS = ("prompt_token_ids", "messages", "prompt", "input", "state", "query")


def prompt_blocks(body: bytes) -> tuple[bytes, ...]:
    """Chained hashes of the full blocks of a request's prompt; empty if there is no readable prompt.

    The prompt is hashed as JSON, so that a longer list of messages or token ids, or a longer text, extends the blocks
    of a shorter one. Requests that differ in `cache_salt`, or decisions in `prompt_cache_key`, share no pages, and no
    blocks.

    Raises:
        APIError: 400, as the server's for the same body.
    """
    fields = json_object(body)
    try:
        name = next((name for name in _PROMPT_FIELDS if fields.get(name) is not None), None)
        if name is None:
            return ()
        key = orjson.dumps(fields[name])[:-1]  # without the closing bracket or quote
        salt = fields.get("prompt_cache_key") if name == "input" else None
        link, blocks = _digest(orjson.dumps([fields.get("cache_salt"), salt, name])), []
    except orjson.JSONEncodeError:  # nested too deep; the replica rejects it
        return ()
    for start in range(0, min(len(key) // BLOCK_BYTES, _MAX_BLOCKS) * BLOCK_BYTES, BLOCK_BYTES):
        link = _digest(link + key[start : start + BLOCK_BYTES])
        blocks.append(link)
    return tuple(blocks)


class PrefixIndex[R: Hashable]:
    def __init__(self, *, max_blocks: int, margin: int) -> None:
        """Create an empty index of at most `max_blocks`. The least recently used blocks are evicted.

        A replica with over `margin` more requests than the least loaded one is not preferred for its cache.
        """
        self._max_blocks = max_blocks
        self._margin = margin
        self._blocks: OrderedDict[bytes, set[R]] = OrderedDict()  # block -> replicas, least recently used first
        self._running: Counter[R] = Counter()  # replica -> running requests
        self._last_used: dict[R, int] = {}  # each replica in the index -> time of its last request; 0: none
        self._clock = itertools.count(1)

    def ranked(self, blocks: Sequence[bytes], replicas: Mapping[R, int]) -> list[R]:
        """Rank replicas for the blocks of a prompt, best first.

        `replicas` maps the candidates to their reported numbers of requests, which include those of other routers.
        """
        load = {replica: max(length, self._running[replica]) for replica, length in replicas.items()}
        max_load = min(load.values(), default=0) + self._margin
        matches = self._matches(blocks, load)

        def cost(replica: R) -> tuple[int, int, int]:
            cached = matches[replica] if load[replica] <= max_load else 0
            return -cached, load[replica], self._last_used.get(replica, 0)  # round-robin if all else is equal

        return sorted(load, key=cost)

    def start(self, replica: R) -> None:
        self._running[replica] += 1
        self._last_used[replica] = next(self._clock)

    def finish(self, replica: R) -> None:
        if self._running[replica]:  # else the replica was removed
            self._running[replica] -= 1

    def add(self, replica: R, blocks: Sequence[bytes]) -> None:
        """Add the blocks of a prompt that a replica has accepted."""
        self._last_used.setdefault(replica, 0)
        for block in reversed(blocks):  # the first block is evicted last, since the others are useless without it
            self._blocks.setdefault(block, set()).add(replica)
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)

    def retain(self, replicas: Collection[R]) -> None:
        """Remove all other replicas."""
        removed = self._last_used.keys() - set(replicas)
        if not removed:
            return
        for replica in removed:
            del self._last_used[replica]
            self._running.pop(replica, None)
        for block, holders in list(self._blocks.items()):
            holders -= removed
            if not holders:
                del self._blocks[block]

    def _matches(self, blocks: Sequence[bytes], replicas: Collection[R]) -> dict[R, int]:
        """Length of each replica's longest cached prefix, blocks."""
        matches, matching = dict.fromkeys(replicas, 0), set(replicas)
        for block in blocks:
            matching &= self._blocks.get(block, set())
            if not matching:
                break
            for replica in matching:
                matches[replica] += 1
        return matches


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
