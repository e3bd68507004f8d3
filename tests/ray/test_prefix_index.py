"""Where a prompt is sent: cases that can be worked out by hand."""

import json
from typing import Any

import pytest

from serve.ray.prefix_index import BLOCK_BYTES, PrefixIndex, prompt_blocks

IDLE = {"a": 0, "b": 0}


def blocks_of(**request: Any) -> tuple[bytes, ...]:
    return prompt_blocks(json.dumps(request).encode())


def text(blocks: int, letter: str = "x") -> str:
    return letter * (blocks * BLOCK_BYTES)


def index(*, max_blocks: int = 100, margin: int = 2) -> PrefixIndex:
    return PrefixIndex(max_blocks=max_blocks, margin=margin)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"prompt": text(2)}, {"prompt": text(2) + text(2, "y")}),
        ({"prompt": list(range(400))}, {"prompt": list(range(500))}),
        ({"prompt_token_ids": list(range(400))}, {"prompt_token_ids": list(range(500))}),
        (
            {"messages": [{"role": "user", "content": text(2)}]},
            {"messages": [{"role": "user", "content": text(2)}, {"role": "assistant", "content": text(2)}]},
        ),
    ],
)
def test_a_prompt_that_goes_on_has_the_blocks_of_its_beginning(short: dict[str, Any], long: dict[str, Any]) -> None:
    first, second = blocks_of(**short), blocks_of(**long)
    assert len(first) >= 2
    assert len(second) > len(first)
    assert second[: len(first)] == first


def test_blocks_after_a_difference_differ_too() -> None:
    first = blocks_of(prompt=text(1) + text(3, "y"))
    second = blocks_of(prompt=text(1) + "z" + text(3, "y")[1:])
    assert first[0] == second[0]
    assert not set(first[1:]) & set(second)


def test_another_salt_has_no_block_in_common() -> None:
    salts: list[Any] = [None, "one", "two"]
    blocks = [blocks_of(prompt=text(3), cache_salt=salt) for salt in salts]
    assert all(len(each) == 3 for each in blocks)
    assert len({block for each in blocks for block in each}) == 9


def test_a_text_and_messages_of_the_same_bytes_differ() -> None:
    assert not set(blocks_of(prompt=[text(3)])) & set(blocks_of(messages=[text(3)]))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"null", b"{}", b'{"prompt": null}', b'{"prompt": "short"}', b"\xff"]
)
def test_what_has_no_prompt_has_no_blocks(body: bytes) -> None:
    assert prompt_blocks(body) == ()


def test_a_prompt_of_any_length_has_a_bounded_number_of_blocks() -> None:
    assert len(blocks_of(prompt=text(5000))) == 1024


def test_a_prompt_goes_where_its_beginning_was_seen() -> None:
    known, prompt = index(), blocks_of(prompt=text(3))
    known.saw("b", prompt)
    assert known.ranked(prompt, IDLE) == ["b", "a"]
    assert known.ranked(blocks_of(prompt=text(1) + text(1, "y")), IDLE) == ["b", "a"]


def test_the_longest_match_wins() -> None:
    known = index()
    known.saw("a", blocks_of(prompt=text(3)))
    known.saw("b", blocks_of(prompt=text(1)))
    assert known.ranked(blocks_of(prompt=text(4)), IDLE) == ["a", "b"]


def test_others_go_to_the_least_loaded() -> None:
    known = index()
    known.sent("a")
    assert known.ranked((), IDLE) == ["b", "a"]
    known.sent("b")
    known.sent("b")
    assert known.ranked((), IDLE) == ["a", "b"]
    for _ in range(3):  # one more than were sent: it counts as none
        known.ended("b")
    assert known.ranked((), IDLE) == ["b", "a"]
    known.sent("b")
    known.sent("b")
    assert known.ranked((), IDLE) == ["a", "b"]


def test_a_loaded_replica_loses_its_prompts() -> None:
    known, prompt = index(margin=2), blocks_of(prompt=text(3))
    known.saw("a", prompt)
    for _ in range(2):
        known.sent("a")
    assert known.ranked(prompt, IDLE) == ["a", "b"]  # two more than b: within the margin
    known.sent("a")
    assert known.ranked(prompt, IDLE) == ["b", "a"]


def test_load_that_others_made_counts() -> None:
    known, prompt = index(margin=2), blocks_of(prompt=text(3))
    known.saw("a", prompt)
    assert known.ranked(prompt, {"a": 2, "b": 0}) == ["a", "b"]
    assert known.ranked(prompt, {"a": 3, "b": 0}) == ["b", "a"]
    assert known.ranked(prompt, {"a": 3, "b": 1}) == ["a", "b"]


def test_idle_replicas_take_turns() -> None:
    known, order = index(), []
    for _ in range(4):
        chosen = known.ranked((), IDLE)[0]
        known.sent(chosen)
        known.ended(chosen)
        order.append(chosen)
    assert "".join(order) in ("abab", "baba")


def test_a_replica_that_has_vanished_is_forgotten() -> None:
    known, prompt = index(), blocks_of(prompt=text(3))
    known.saw("a", prompt)
    known.sent("a")
    known.sent("a")
    known.keep(["b"])
    known.sent("b")
    assert known.ranked(prompt, IDLE) == ["a", "b"]  # by load alone: what it ran went with it
    known.ended("b")
    known.saw("b", prompt)
    assert known.ranked(prompt, IDLE) == ["b", "a"]
    known.saw("a", prompt)
    known.keep(["b"])
    assert known._matches(prompt, IDLE) == {"a": 0, "b": 3}


def test_the_least_recently_used_blocks_are_forgotten_the_last_of_a_prompt_first() -> None:
    known = index(max_blocks=4)
    old, new = blocks_of(prompt=text(3)), blocks_of(prompt=text(2, "y"))
    known.saw("a", old)
    known.saw("b", new)  # 3 + 2 blocks: the third of the old one goes
    assert known._matches(old, IDLE) == {"a": 2, "b": 0}
    assert known._matches(new, IDLE) == {"a": 0, "b": 2}


def test_only_those_that_may_be_chosen_are() -> None:
    known, prompt = index(), blocks_of(prompt=text(3))
    known.saw("a", prompt)
    assert known.ranked(prompt, {"b": 7}) == ["b"]
    assert known.ranked(prompt, {}) == []
