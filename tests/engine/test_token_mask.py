"""TokenMask against Python sets."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from compiled.state import mask_words
from serve.engine.request import SamplingParams
from serve.engine.token_mask import TokenMask

V = 70  # three words, the last one not full
ids = st.integers(0, V - 1)
words = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=4).map(tuple)


def allowed_tokens(mask: TokenMask, output: list[int]) -> set[int]:
    """The tokens that the mask allows."""
    row = mask.row(output, len(output))
    if row is None:
        return set(range(V))
    assert row.shape == (mask_words(V),)
    assert row.dtype == np.uint32
    return {token for token in range(V) if int(row[token // 32]) >> token % 32 & 1}


@given(
    allowed=st.none() | st.frozensets(ids, min_size=1),
    stops=st.frozensets(ids, max_size=5),
    bad_words=words,
    min_tokens=st.integers(0, 4),
    output=st.lists(st.integers(0, 3), max_size=6),
)
@example(allowed=None, stops=frozenset({31, 32, 69}), bad_words=((0,), (63,)), min_tokens=1, output=[])
@example(allowed=None, stops=frozenset(), bad_words=((1, 2, 3), (2, 3)), min_tokens=0, output=[1, 2])
def test_row_equals_sets(
    allowed: frozenset[int] | None,
    stops: frozenset[int],
    bad_words: tuple[tuple[int, ...], ...],
    min_tokens: int,
    output: list[int],
) -> None:
    params = SamplingParams(
        9, min_tokens=min_tokens, stop_token_ids=stops, allowed_token_ids=allowed, bad_words=bad_words
    )
    mask = TokenMask(params, V)
    expected = set(range(V)) if allowed is None else set(allowed)
    for n in range(len(output) + 1):
        prefix = output[:n]
        remaining = expected - (stops if n < min_tokens else set())
        remaining -= {
            word[-1] for word in bad_words if [*word[:-1]] == prefix[n - len(word) + 1 :] and n >= len(word) - 1
        }
        assert allowed_tokens(mask, prefix) == remaining
    assert mask.waits == any(len(word) > 1 for word in bad_words)


def test_row_without_constraints() -> None:
    assert TokenMask(SamplingParams(9, stop_token_ids=frozenset({1})), V).row([], 0) is None
    assert TokenMask(SamplingParams(9, min_tokens=3), V).row([], 0) is None
    assert TokenMask(SamplingParams(9, bad_words=((1, 2),)), V).row([3], 1) is None


def test_row_is_packed_once() -> None:
    mask = TokenMask(SamplingParams(9, allowed_token_ids=frozenset({1, 40})), V)
    assert mask.row([], 0) is mask.row([1, 40], 2)
