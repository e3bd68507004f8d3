"""The ranking of replicas for a prompt, in cases that can be worked out by hand."""

import json
from typing import Any

import orjson
import pytest

from serve.api.errors import APIError
from serve.ray.prefix_index import BLOCK_BYTES, PrefixIndex, prompt_blocks

IDLE = {"a": 0, "b": 0}


def blocks_of(**request: Any) -> tuple[bytes, ...]:
    return prompt_blocks(json.dumps(request).encode())


def text(blocks: int, letter: str = "x") -> str:
    return letter * (blocks * BLOCK_BYTES)


def index(*, max_blocks: int = 100, margin: int = 2) -> PrefixIndex[str]:
    return PrefixIndex(max_blocks=max_blocks, margin=margin)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"prompt": text(2)}, {"prompt": text(2) + text(2, "y")}),
        ({"prompt": list(range(400))}, {"prompt": list(range(500))}),
        ({"input": text(2), "questions": [1]}, {"input": text(4), "questions": [2]}),
        ({"state": {"a": text(2)}}, {"state": {"a": text(4)}}),
        ({"query": text(2), "items": ["a"]}, {"query": text(4), "items": ["b", "c"]}),
        ({"prompt_token_ids": list(range(400))}, {"prompt_token_ids": list(range(500))}),
        (
            {"messages": [{"role": "user", "content": text(2)}]},
            {"messages": [{"role": "user", "content": text(2)}, {"role": "assistant", "content": text(2)}]},
        ),
    ],
)
def test_prompt_blocks_of_an_extended_prompt(short: dict[str, Any], long: dict[str, Any]) -> None:
    first, second = blocks_of(**short), blocks_of(**long)
    assert len(first) >= 2
    assert len(second) > len(first)
    assert second[: len(first)] == first


def test_prompt_blocks_differ_after_a_difference() -> None:
    first = blocks_of(prompt=text(1) + text(3, "y"))
    second = blocks_of(prompt=text(1) + "z" + text(3, "y")[1:])
    assert first[0] == second[0]
    assert not set(first[1:]) & set(second)


def test_prompt_blocks_of_other_salts_differ() -> None:
    salts: list[Any] = [None, "one", "two"]
    blocks = [blocks_of(prompt=text(3), cache_salt=salt) for salt in salts]
    assert all(len(chain) == 3 for chain in blocks)
    assert len({block for chain in blocks for block in chain}) == 9


def test_prompt_blocks_of_other_cache_keys_of_decisions_differ() -> None:
    keys: list[Any] = [None, "one", "two"]
    blocks = [blocks_of(input=text(3), prompt_cache_key=key) for key in keys]
    assert len({block for chain in blocks for block in chain}) == 9


def test_prompt_blocks_of_text_and_messages_differ() -> None:
    assert not set(blocks_of(prompt=[text(3)])) & set(blocks_of(messages=[text(3)]))


@pytest.mark.parametrize("body", [b"{}", b'{"prompt": null}', b'{"prompt": "short"}'])
def test_prompt_blocks_without_a_prompt(body: bytes) -> None:
    assert prompt_blocks(body) == ()


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b"\xff"])
def test_prompt_blocks_refuse_what_the_server_refuses(body: bytes) -> None:
    with pytest.raises(APIError, match="JSON"):
        prompt_blocks(body)


def test_prompt_blocks_count_brackets_before_they_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orjson, "loads", None)
    with pytest.raises(APIError, match="arrays, objects, keys and strings"):
        prompt_blocks(b'{"prompt":[' + b"[]," * (1 << 20) + b"1]}")


def test_prompt_blocks_are_bounded() -> None:
    assert len(blocks_of(prompt=text(5000))) == 1024


def test_ranked_prefers_a_cached_prefix() -> None:
    known, prompt = index(), blocks_of(prompt=text(3))
    known.add("b", prompt)
    assert known.ranked(prompt, IDLE) == ["b", "a"]
    assert known.ranked(blocks_of(prompt=text(1) + text(1, "y")), IDLE) == ["b", "a"]


def test_ranked_prefers_the_longest_prefix() -> None:
    known = index()
    known.add("a", blocks_of(prompt=text(3)))
    known.add("b", blocks_of(prompt=text(1)))
    assert known.ranked(blocks_of(prompt=text(4)), IDLE) == ["a", "b"]


def test_ranked_by_load_without_a_match() -> None:
    known = index()
    known.start("a")
    assert known.ranked((), IDLE) == ["b", "a"]
    known.start("b")
    known.start("b")
    assert known.ranked((), IDLE) == ["a", "b"]
    for _ in range(3):  # one more than were started: the count stays at 0
        known.finish("b")
    assert known.ranked((), IDLE) == ["b", "a"]
    known.start("b")
    known.start("b")
    assert known.ranked((), IDLE) == ["a", "b"]


def test_ranked_ignores_the_cache_of_a_loaded_replica() -> None:
    known, prompt = index(margin=2), blocks_of(prompt=text(3))
    known.add("a", prompt)
    for _ in range(2):
        known.start("a")
    assert known.ranked(prompt, IDLE) == ["a", "b"]  # two more than b: within the margin
    known.start("a")
    assert known.ranked(prompt, IDLE) == ["b", "a"]


def test_ranked_counts_the_load_of_other_routers() -> None:
    known, prompt = index(margin=2), blocks_of(prompt=text(3))
    known.add("a", prompt)
    assert known.ranked(prompt, {"a": 2, "b": 0}) == ["a", "b"]
    assert known.ranked(prompt, {"a": 3, "b": 0}) == ["b", "a"]
    assert known.ranked(prompt, {"a": 3, "b": 1}) == ["a", "b"]


def test_ranked_alternates_between_idle_replicas() -> None:
    known, order = index(), []
    for _ in range(4):
        chosen = known.ranked((), IDLE)[0]
        known.start(chosen)
        known.finish(chosen)
        order.append(chosen)
    assert "".join(order) in ("abab", "baba")


def test_retain_removes_other_replicas() -> None:
    known, prompt = index(), blocks_of(prompt=text(3))
    known.add("a", prompt)
    known.start("a")
    known.start("a")
    known.retain(["b"])
    known.start("b")
    assert known.ranked(prompt, IDLE) == ["a", "b"]  # by load alone, since its running requests were removed
    known.finish("b")
    known.add("b", prompt)
    assert known.ranked(prompt, IDLE) == ["b", "a"]
    known.add("a", prompt)
    known.retain(["b"])
    assert known._matches(prompt, IDLE) == {"a": 0, "b": 3}


def test_add_evicts_the_end_of_the_least_recently_used_prompt() -> None:
    known = index(max_blocks=4)
    old, new = blocks_of(prompt=text(3)), blocks_of(prompt=text(2, "y"))
    known.add("a", old)
    known.add("b", new)  # 3 + 2 blocks: the third of the old prompt is evicted
    assert known._matches(old, IDLE) == {"a": 2, "b": 0}
    assert known._matches(new, IDLE) == {"a": 0, "b": 2}


def test_ranked_returns_only_candidates() -> None:
    known, prompt = index(), blocks_of(prompt=text(3))
    known.add("a", prompt)
    assert known.ranked(prompt, {"b": 7}) == ["b"]
    assert known.ranked(prompt, {}) == []
