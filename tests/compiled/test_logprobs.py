"""Top-k, rank and log-probability against numpy: ties, signed zeros, infinities, odd sizes, and rows in a batch."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compiled.logprobs import all_logprobs, blocked_top_k, token_logprobs
from compiled.state import (
    MAX_REQUESTED_IDS,
    no_requested_ids,
)
from model.kernels.dispatch import Kernels, load_kernels
from model.token_logprobs import TokenLogprobs

SIZES = (5, 128, 129, 300, 1000)  # each with 4 rows and few values of k: every shape is compiled

top_k = jax.jit(blocked_top_k, static_argnums=1)


@pytest.fixture(params=["kernels", "XLA"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with and without the CPU kernels."""
    kernels = load_kernels() if request.param == "kernels" else Kernels()
    if request.param == "kernels" and kernels.cpu is None:
        pytest.skip("no kernels here")
    monkeypatch.setitem(IN_USE, "kernels", kernels)


IN_USE: dict[str, Kernels] = {}  # set by the fixture `kernels`
_token_logprobs = jax.jit(token_logprobs, static_argnums=(2, 4))
_all_logprobs = jax.jit(all_logprobs, static_argnums=1)


def numbers(logits: NDArray[np.float32], ids: Any, k: int, scored: Sequence[Sequence[int]] = ()) -> TokenLogprobs:
    """Log-probs as numpy arrays; `scored` are the requested ids of the first rows."""
    requested_ids = no_requested_ids(len(logits))
    for row, named in enumerate(scored):
        requested_ids[row, : len(named)] = named
    own_ids = np.asarray(ids, np.int32)
    logprobs = _token_logprobs(logits, own_ids, k, requested_ids, IN_USE["kernels"])
    result: TokenLogprobs = jax.tree.map(np.asarray, logprobs)
    return result


def stable_order(x: NDArray[np.float32]) -> NDArray[np.int64]:
    """Ids of x [R, V] from the largest value down, equal values by ascending id."""
    return np.argsort(-x, axis=-1, kind="stable")


def check_top_k(x: NDArray[np.float32], k: int) -> None:
    values, ids = (np.asarray(part) for part in top_k(x, k))
    expected = stable_order(x)[:, :k]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, axis=1))


def ks_of(size: int) -> tuple[int, ...]:
    return tuple(k for k in (1, 5, 20) if k <= size)


@pytest.mark.parametrize("size", SIZES)
def test_top_k_of_random_values(size: int) -> None:
    x = np.random.default_rng(size).standard_normal((4, size)).astype(np.float32)
    for k in ks_of(size):
        check_top_k(x, k)


@pytest.mark.parametrize("size", SIZES)
def test_top_k_of_many_equal_values(size: int) -> None:
    x = np.random.default_rng(size).integers(-2, 3, (4, size)).astype(np.float32) + 0.5
    x[3] = 7.0
    for k in ks_of(size):
        check_top_k(x, k)


@pytest.mark.parametrize("size", SIZES)
def test_top_k_of_values_that_are_mostly_banned(size: int) -> None:
    x = np.full((4, size), -np.inf, np.float32)
    x[0, -1] = 1.0
    x[1, [0, size // 2]] = 2.0, 3.0
    for k in ks_of(size):
        check_top_k(x, k)


def test_top_k_above_the_number_of_blocks_and_equal_to_the_vocabulary() -> None:
    x = np.random.default_rng(0).integers(0, 9, (4, 300)).astype(np.float32) + 0.25
    for k in (3, 200, 300):
        check_top_k(x, k)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_top_k_of_any_mix(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from(SIZES))
    k = data.draw(st.sampled_from(ks_of(size)))
    palette = data.draw(st.lists(st.sampled_from((-np.inf, -3.5, -1e-30, 1e-30, 2.0, 2.0000002, 1e30)), min_size=1))
    picks = np.random.default_rng(data.draw(st.integers(0, 2**32))).integers(0, len(palette), (4, size))
    check_top_k(np.asarray(palette, np.float32)[picks], k)


@pytest.mark.parametrize("size", [100, 300])
def test_rank_is_the_position_in_the_stable_order_for_every_k(size: int) -> None:
    logits = np.random.default_rng(1).integers(-3, 4, (1, size)).astype(np.float32)
    every = np.repeat(logits, size, axis=0)
    order = stable_order(logits)[0]
    expected = np.empty(size, np.int64)
    expected[order] = np.arange(1, size + 1)
    for k in (0, 1, 20):
        result = numbers(every, np.arange(size), k)
        np.testing.assert_array_equal(result.rank, expected)
        np.testing.assert_array_equal(result.top_ids, np.broadcast_to(order[:k], (size, k)))


def test_logprob_and_rank_equal_the_alternative_of_the_same_token() -> None:
    logits = np.random.default_rng(2).integers(-3, 4, (1, 300)).astype(np.float32)
    order = stable_order(logits)[0, :20]
    result = numbers(np.repeat(logits, 20, axis=0), order, 20)
    for place, token in enumerate(order):
        assert result.rank[place] == place + 1
        assert result.top_ids[place, place] == token
        assert result.top_logprobs[place, place] == result.logprob[place]


def test_rank_treats_both_zeros_as_equal() -> None:
    logits = np.full((2, 200), -1.0, np.float32)
    logits[0, [3, 70, 150, 199]] = -0.0, 0.0, -0.0, 0.0
    logits[1, [3, 70, 150, 199]] = 0.0, -0.0, 0.0, -0.0
    for place, token in enumerate((3, 70, 150, 199)):
        result = numbers(logits, [token, token], 4)
        np.testing.assert_array_equal(result.rank, [place + 1, place + 1])
        np.testing.assert_array_equal(result.top_ids, [[3, 70, 150, 199]] * 2)
        assert result.logprob[0] == result.logprob[1]


@pytest.mark.parametrize(
    ("scale", "shift"), [(1.0, 0.0), (20.0, 0.0), (1e-3, 0.0), (1.0, 3e3), (1.0, -3e3), (1e30, 0.0)]
)
def test_logprob_against_float64(scale: float, shift: float) -> None:
    R, V = 6, 1000
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((R, V)) * scale + shift).astype(np.float32)
    ids = rng.integers(0, V, R)
    exact = logits.astype(np.float64)
    best = exact.max(axis=1, keepdims=True)
    exact = exact - best - np.log(np.exp(exact - best).sum(axis=1, keepdims=True))
    result = numbers(logits, ids, 20)
    # The inputs are float32, so the tolerance is relative to the logit, not only to the difference.
    tolerance = 1e-6 * (1 + np.abs(logits).max())
    np.testing.assert_allclose(result.logprob, exact[np.arange(R), ids], rtol=1e-6, atol=tolerance)
    expected = np.take_along_axis(exact, stable_order(logits)[:, :20], axis=1)
    np.testing.assert_allclose(result.top_logprobs, expected, rtol=1e-6, atol=tolerance)


def test_logprob_of_certain_and_impossible_tokens() -> None:
    logits = np.full((2, 130), -np.inf, np.float32)
    logits[:, 129] = 5.0
    result = numbers(logits, [129, 0], 2)
    assert result.logprob.tolist() == [0.0, -np.inf]
    assert result.rank.tolist() == [1, 2]
    np.testing.assert_array_equal(result.top_ids, [[129, 0]] * 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logprob_of_nan_logits_is_nan(bad: float) -> None:
    logits = np.zeros((1, 130), np.float32)
    logits[0, 7] = bad
    for token in (0, 7):
        assert np.isnan(numbers(logits, [token], 5).logprob).all()


@pytest.mark.parametrize("size", [300, 5000])
def test_logprobs_are_the_same_alone_and_in_a_batch(size: int) -> None:
    rng = np.random.default_rng(4)
    row = (rng.standard_normal(size) * 4).astype(np.float32)
    alone = numbers(row[None], [17], 20)
    for R in (2, 4, 8, 16, 64):
        crowd = (rng.standard_normal((R, size)) * 4).astype(np.float32)
        place = R // 2
        crowd[place] = row
        result = numbers(crowd, np.full(R, 17), 20)
        for name in ("logprob", "rank", "top_ids", "top_logprobs"):
            np.testing.assert_array_equal(getattr(result, name)[place], getattr(alone, name)[0], err_msg=f"{name} {R}")


def test_requested_ids_have_logprob_and_stable_rank() -> None:
    R, V = 6, 300
    logits = np.random.default_rng(5).integers(-3, 4, (R, V)).astype(np.float32)  # many ties
    order = stable_order(logits)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(1, V + 1)[None], axis=1)
    rng = np.random.default_rng(6)
    # Duplicates, all B ids, no id, and the first and last ids.
    scored = [[7, 7, 299, 7], rng.integers(0, V, MAX_REQUESTED_IDS).tolist(), [], [0], [299, 0], [150]]
    result = numbers(logits, np.zeros(R), 20, scored)
    for row, named in enumerate(scored):
        assert result.requested_ranks[row, : len(named)].tolist() == rank[row, named].tolist()
        own = numbers(np.repeat(logits[row : row + 1], max(len(named), 1), axis=0), named or [0], 0)
        assert result.requested_logprobs[row, : len(named)].tobytes() == own.logprob[: len(named)].tobytes()


def test_requested_id_equal_to_the_token_has_the_same_bits() -> None:
    R, V = 64, 5000
    rng = np.random.default_rng(7)
    logits = (rng.standard_normal((R, V)) * 4).astype(np.float32)
    tokens = rng.integers(0, V, R)
    result = numbers(logits, tokens, 1, [[3, int(token)] for token in tokens])
    assert result.requested_logprobs[:, 1].tobytes() == result.logprob.tobytes()
    assert result.requested_ranks[:, 1].tolist() == result.rank.tolist()


def test_requested_ids_change_no_other_result() -> None:
    logits = (np.random.default_rng(8).standard_normal((4, 300)) * 4).astype(np.float32)
    plain, asked = numbers(logits, [1, 2, 3, 4], 20), numbers(logits, [1, 2, 3, 4], 20, [[5, 6], [7]])
    for name in ("logprob", "rank", "top_ids", "top_logprobs"):
        assert getattr(plain, name).tobytes() == getattr(asked, name).tobytes()


@pytest.mark.parametrize("size", [300, 5000])
def test_all_logprobs_have_the_bits_of_token_logprobs(size: int) -> None:
    rng = np.random.default_rng(9)
    logits = (rng.standard_normal((8, size)) * 4).astype(np.float32)
    logits[:, 5] = -0.0
    rows = np.asarray(_all_logprobs(logits, IN_USE["kernels"]))
    for token in (0, 5, 17, size - 1):
        crowd = np.concatenate([logits, (rng.standard_normal((56, size)) * 4).astype(np.float32)])
        result = numbers(crowd, np.full(64, token), 20)
        assert rows[:, token].tobytes() == result.logprob[:8].tobytes()
        assert np.take_along_axis(rows, result.top_ids[:8], axis=1).tobytes() == result.top_logprobs[:8].tobytes()
