"""Sampling against numpy in float64: which tokens can be drawn, how often, and reproducibility with a seed."""

from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from compiled.filters import kth_largest, processed_logits
from compiled.sampling import choose_tokens
from compiled.state import SamplingArrays, greedy_sampling
from tests.support.slots import empty_slots, packed

V = 300
DRAWS = 4096

_choose = jax.jit(choose_tokens)
_processed = jax.jit(processed_logits)
_kth_largest = jax.jit(kth_largest)


@dataclass(frozen=True)
class Filters:
    """Sampling parameters of one row."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    forbidden: tuple[int, ...] = ()


GREEDY = Filters(temperature=0.0)
FILTERS = {
    "plain": Filters(),
    "cold": Filters(temperature=0.6),
    "hot": Filters(temperature=1.7),
    "top_k": Filters(top_k=10),
    "top_p": Filters(top_p=0.8),
    "min_p": Filters(min_p=0.1),
    "top_k_then_top_p": Filters(top_k=25, top_p=0.7),
    "min_p_then_top_p": Filters(min_p=0.15, top_p=0.75),
    "min_p_when_hot": Filters(temperature=1.6, min_p=0.2),
    "min_p_below_top_k": Filters(min_p=0.2, top_k=250, top_p=0.6),
    "all": Filters(temperature=1.3, min_p=0.04, top_k=20, top_p=0.85),
    "top_k_above_the_vocabulary": Filters(temperature=1.5, top_k=1000, top_p=0.6),
    "masked": Filters(temperature=0.8, top_k=12, top_p=0.9, forbidden=(0, 1, 2, 150, 299)),
}


def arrays(rows: list[Filters], seeds: Any = None, step: int = 0) -> SamplingArrays:
    """Sampling arrays of the rows; row i has seed i by default."""
    sampling = greedy_sampling(len(rows), V)
    sampling.seed[:, 1] = np.arange(len(rows)) if seeds is None else seeds
    sampling.step[:] = step
    for i, row in enumerate(rows):
        sampling.temperature[i] = row.temperature
        sampling.top_k[i] = row.top_k
        sampling.top_p[i] = row.top_p
        sampling.min_p[i] = row.min_p
        if row.forbidden:
            sampling.mask[i] = packed(~np.isin(np.arange(V), row.forbidden))
    return sampling


def choose(logits: NDArray[np.float32], sampling: SamplingArrays) -> NDArray[np.int32]:
    return np.asarray(_choose(logits, sampling, empty_slots(1, V), np.zeros(len(logits), np.int32)))


def reference(logits: NDArray[np.float32], row: Filters) -> NDArray[np.float64]:
    """Probability of every token [V]: temperature, min_p, top_k, top_p, in that order, ties by lower id."""
    x = logits.astype(np.float64)
    x[list(row.forbidden)] = -np.inf
    p = np.exp((x - x.max()) / row.temperature)
    p[p < row.min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if row.top_k:
        p[order[row.top_k :]] = 0
    p /= p.sum()
    ahead = np.cumsum(p[order]) - p[order]
    p[order[ahead >= row.top_p]] = 0
    shares: NDArray[np.float64] = p / p.sum()
    return shares


def smooth_logits() -> NDArray[np.float32]:
    """The best tokens have random ids, and no filter's edge is within rounding of a token."""
    return (np.random.default_rng(5).standard_normal(V) * 1.5).astype(np.float32)


def tied_logits() -> NDArray[np.float32]:
    return np.random.default_rng(6).integers(-2, 3, V).astype(np.float32)


def check_frequencies(tokens: NDArray[np.int32], expected: NDArray[np.float64]) -> None:
    """No token outside the allowed set; chi-square test inside it, with rare tokens as one class."""
    counts = np.bincount(tokens, minlength=V)
    assert not counts[expected == 0].any(), np.flatnonzero((expected == 0) & (counts > 0))
    mean = expected * len(tokens)
    common = mean >= 8
    if (rest := mean[~common].sum()) >= 8:
        mean, counts = np.append(mean[common], rest), np.append(counts[common], counts[~common].sum())
    else:
        mean, counts = mean[common], counts[common]
    freedom = len(mean) - 1
    chi_square = ((counts - mean) ** 2 / mean).sum()
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 6, (chi_square, freedom)  # p < 0.001


@pytest.mark.parametrize("make_logits", [smooth_logits, tied_logits])
@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_renormalized_allowed_distribution(name: str, make_logits: Any) -> None:
    logits, row = make_logits(), FILTERS[name]
    tokens = choose(np.tile(logits, (DRAWS, 1)), arrays([row] * DRAWS))
    check_frequencies(tokens, reference(logits, row))


def test_draws_rank_equal_logits_by_id() -> None:
    logits, row = np.zeros(V, np.float32), Filters(top_k=2)  # a rejected token must take its equals with it
    tokens = choose(np.tile(logits, (DRAWS, 1)), arrays([row] * DRAWS))
    check_frequencies(tokens, reference(logits, row))


def test_draws_of_successive_steps_are_independent() -> None:
    logits, row = smooth_logits(), FILTERS["top_p"]
    sampling = arrays([row] * DRAWS, seeds=1234)
    sampling.step[:] = np.arange(DRAWS)
    check_frequencies(choose(np.tile(logits, (DRAWS, 1)), sampling), reference(logits, row))


@pytest.mark.parametrize("word", [0, 1])
def test_draws_depend_on_both_words_of_the_seed(word: int) -> None:
    logits, row = smooth_logits(), FILTERS["plain"]
    sampling = arrays([row] * DRAWS, seeds=7)
    sampling.seed[:, word] = np.arange(DRAWS) + 1000
    check_frequencies(choose(np.tile(logits, (DRAWS, 1)), sampling), reference(logits, row))


@pytest.mark.parametrize("make_logits", [smooth_logits, tied_logits])
def test_draw_is_the_same_alone_and_in_a_batch(make_logits: Any) -> None:
    logits = make_logits()
    others = [GREEDY, *FILTERS.values()]
    rng = np.random.default_rng(7)
    for row in FILTERS.values():
        alone = int(choose(logits[None], arrays([row], seeds=99, step=3))[0])
        assert reference(logits, row)[alone] > 0
        for R in (2, 4, 8, 16, 64):
            place = int(rng.integers(R))
            crowd = rng.standard_normal((R, V)).astype(np.float32) * 3
            crowd[place] = logits
            rows = [others[i % len(others)] for i in range(R)]
            rows[place] = row
            sampling = arrays(rows, step=11)
            sampling.seed[place], sampling.step[place] = (0, 99), 3
            assert choose(crowd, sampling)[place] == alone


@pytest.mark.parametrize("crowd", [GREEDY, FILTERS["all"]])
def test_greedy_is_the_stable_argmax(crowd: Filters) -> None:
    logits = np.random.default_rng(8).integers(-2, 3, (64, V)).astype(np.float32)
    logits[5] = 1.0
    logits[6, [20, 280]] = -0.0, 0.0
    logits[6, np.setdiff1d(np.arange(V), [20, 280])] = -1.0
    rows = [GREEDY] * 63 + [crowd]  # one row that samples takes the other branch
    tokens = choose(logits, arrays(rows))
    np.testing.assert_array_equal(tokens[:63], logits[:63].argmax(axis=1))
    assert tokens[5] == 0
    assert tokens[6] == 20


def test_greedy_respects_the_mask() -> None:
    logits = np.random.default_rng(9).standard_normal((64, V)).astype(np.float32)
    order = np.argsort(-logits, axis=1, kind="stable")
    for count in (1, 16, V - 1):
        rows = [Filters(temperature=0.0, forbidden=tuple(map(int, order[i, :count]))) for i in range(64)]
        np.testing.assert_array_equal(choose(logits, arrays(rows)), order[:, count])


def test_mask_applies_to_its_row_only() -> None:
    logits = np.tile(smooth_logits(), (64, 1))
    best = int(logits[0].argmax())
    rows = [GREEDY] * 63 + [Filters(temperature=0.0, forbidden=(best,))]
    tokens = choose(logits, arrays(rows))
    assert (tokens[:63] == best).all()
    assert tokens[63] != best


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mask_of_no_token_gives_token_0_and_changes_no_other_row(temperature: float) -> None:
    logits = np.tile(smooth_logits(), (64, 1))
    rows = [replace(FILTERS["all"], temperature=temperature)] * 64
    clean = choose(logits, arrays(rows))
    rows[9] = replace(rows[9], forbidden=tuple(range(V)))
    tokens = choose(logits, arrays(rows))
    assert tokens[9] == 0
    np.testing.assert_array_equal(np.delete(tokens, 9), np.delete(clean, 9))


@pytest.mark.parametrize("row", [Filters(top_k=1), Filters(top_p=1e-6), Filters(top_p=1e-45), Filters(min_p=1.0)])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 2.0])
def test_draw_with_filters_that_leave_one_token(row: Filters, temperature: float) -> None:
    logits = np.random.default_rng(10).standard_normal((64, V)).astype(np.float32) * 3
    rows = [replace(row, temperature=temperature)] * 64
    np.testing.assert_array_equal(choose(logits, arrays(rows)), logits.argmax(axis=1))


def test_draw_of_large_logits_at_a_low_temperature() -> None:
    logits = np.random.default_rng(11).standard_normal((64, V)).astype(np.float32) * 1e4
    rows = [Filters(temperature=0.01, top_k=5, top_p=0.9, min_p=0.1)] * 64
    np.testing.assert_array_equal(choose(logits, arrays(rows)), logits.argmax(axis=1))


def test_rows_of_nan_end_and_change_no_other_row() -> None:
    logits = np.tile(smooth_logits(), (64, 1))
    sampling = arrays([FILTERS["all"]] * 64)
    clean = choose(logits, sampling)
    logits[3, 40] = np.nan
    logits[4] = np.nan
    logits[5, 7] = np.inf
    tokens = choose(logits, sampling)
    assert ((tokens >= 0) & (tokens < V)).all()
    np.testing.assert_array_equal(np.delete(tokens, [3, 4, 5]), np.delete(clean, [3, 4, 5]))


def test_kth_largest_equals_a_sort() -> None:
    special = np.array([-np.inf, np.inf, -1e38, 1e38, 0.0, -1.5, -1.5, 1.5, 1e-38, -1e-38], np.float32)
    x = np.random.default_rng(12).standard_normal((64, V)).astype(np.float32) * 50
    x[:, 100 : 100 + len(special)] = special
    x[1] = -np.abs(x[1])
    x[2] = np.round(x[2] / 40)
    x[3] = -np.inf
    x[4] = 3.0
    falling = -np.sort(-x, axis=1)
    for k in (1, 2, 3, 50, 150, V - 1, V):
        result = np.asarray(_kth_largest(x, np.full(64, k, np.int32)))
        np.testing.assert_array_equal(result, falling[:, k - 1])
    each_its_own = np.arange(1, 65, dtype=np.int32)
    np.testing.assert_array_equal(np.asarray(_kth_largest(x, each_its_own)), falling[np.arange(64), each_its_own - 1])
    np.testing.assert_array_equal(np.asarray(_kth_largest(x, np.zeros(64, np.int32))), falling[:, 0])
    np.testing.assert_array_equal(np.asarray(_kth_largest(x, np.full(64, 10**6, np.int32))), falling[:, -1])


def processed(logits: NDArray[np.float32], chosen: Any, sampling: SamplingArrays) -> NDArray[np.float64]:
    """Processed logits as probabilities [R, V]."""
    slots, rows = empty_slots(1, V), np.zeros(len(logits), np.int32)
    result = np.asarray(_processed(logits, np.asarray(chosen, np.int32), sampling, slots, rows)).astype(np.float64)
    weights = np.exp(result - result.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return shares


@pytest.mark.parametrize("make_logits", [smooth_logits, tied_logits])
def test_processed_logits_are_those_of_the_allowed_distribution(make_logits: Any) -> None:
    logits = np.tile(make_logits(), (len(FILTERS), 1))
    sampling = arrays(list(FILTERS.values()))
    best = [int(np.argmax(reference(row, filters))) for row, filters in zip(logits, FILTERS.values(), strict=True)]
    shares = processed(logits, best, sampling)
    for share, filters in zip(shares, FILTERS.values(), strict=True):
        expected = reference(logits[0], filters)
        np.testing.assert_array_equal(share > 0, expected > 0)
        np.testing.assert_allclose(share, expected, rtol=2e-5, atol=1e-9)


def test_processed_logits_include_every_drawn_token() -> None:
    logits = np.tile(tied_logits(), (512, 1))
    sampling = arrays([FILTERS["top_k_then_top_p"]] * 512)
    tokens = choose(logits, sampling)
    shares = processed(logits, tokens, sampling)
    assert (shares[np.arange(512), tokens] > 0).all()
    outside = int(np.argmin(logits[0]))  # as if rounding had let it in
    assert (processed(logits[:1], [outside], arrays_like(sampling, 1)) > 0)[0, outside]


def arrays_like(sampling: SamplingArrays, rows: int) -> SamplingArrays:
    """The first rows."""
    return SamplingArrays(*(getattr(sampling, field.name)[:rows] for field in fields(sampling)))


def test_processed_logits_of_greedy_rows() -> None:
    logits = smooth_logits()[None]
    forbidden = Filters(temperature=0.0, top_k=3, top_p=0.1, forbidden=(4, 5))
    slots, rows = empty_slots(1, V), np.zeros(1, np.int32)
    result = np.asarray(_processed(logits, np.zeros(1, np.int32), arrays([forbidden]), slots, rows))
    expected = logits.copy()
    expected[0, [4, 5]] = -np.inf
    np.testing.assert_array_equal(result, expected)
