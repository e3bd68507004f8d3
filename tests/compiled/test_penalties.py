"""Bias, penalties and masks against numpy, and the record of chosen tokens."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from compiled.penalties import adjust_logits, changes_logits, record_choice, set_slot_penalties
from compiled.sampling import choose_tokens
from compiled.state import SamplingArrays, SlotPenalties, SlotState, greedy_sampling
from tests.support.slots import empty_slots, packed

Z, R = 7, 5
SIZES = (31, 300, 320)  # V: less than one mask word, a partial last word, full words only

_adjust = jax.jit(adjust_logits)
_choose = jax.jit(choose_tokens)
_record = jax.jit(record_choice)
_fill = jax.jit(set_slot_penalties)

PENALTIES: dict[str, dict[str, Any]] = {
    "none": {},
    "presence": {"presence_penalty": 0.7},
    "negative_presence": {"presence_penalty": -1.9},
    "frequency": {"frequency_penalty": 0.3},
    "negative_frequency": {"frequency_penalty": -0.4},
    "repetition": {"repetition_penalty": 1.3},
    "repetition_below_1": {"repetition_penalty": 0.6},
    "all": {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.7},
}


def logits_of(V: int) -> NDArray[np.float32]:
    return (np.random.default_rng(V).standard_normal((R, V)) * 4).astype(np.float32)


def busy_slots(V: int) -> SlotState:
    """Slots without common values."""
    rng = np.random.default_rng(V + 1)
    return SlotState(
        tokens=np.zeros(Z, np.int32),
        bias=(rng.standard_normal((Z, V)) * 3).astype(np.float32) * (rng.random((Z, V)) < 0.3),
        counts=rng.integers(0, 4, (Z, V)).astype(np.int32) * (rng.random((Z, V)) < 0.4),
        seen=rng.random((Z, V)) < 0.3,
    )


def sampling_of(V: int, **values: Any) -> SamplingArrays:
    """Greedy rows, all penalized, with these values."""
    sampling = greedy_sampling(R, V)
    sampling.penalized[:] = True
    for name, value in values.items():
        getattr(sampling, name)[:] = value
    return sampling


def adjust(logits: Any, sampling: SamplingArrays, slots: SlotState, rows: Any) -> NDArray[np.float32]:
    return np.asarray(_adjust(logits, sampling, slots, np.asarray(rows, np.int32)))


def reference(
    logits: NDArray[np.float32],
    slots: SlotState,
    slot: int,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
) -> NDArray[np.float64]:
    """One row [V], in float64: bias, repetition, frequency, presence."""
    bias, counts, seen = slots.bias[slot], slots.counts[slot], slots.seen[slot]
    x: NDArray[np.float64] = logits.astype(np.float64) + bias
    for token in range(len(x)):
        if seen[token] or counts[token]:
            x[token] = x[token] / repetition_penalty if x[token] > 0 else x[token] * repetition_penalty
        x[token] -= frequency_penalty * counts[token]
        if counts[token]:
            x[token] -= presence_penalty
    return x


@pytest.mark.parametrize("name", PENALTIES)
def test_adjust_logits_uses_the_slot_of_each_row(name: str) -> None:
    V, rows = 300, [4, 0, 3, 2, 5]
    logits, slots = logits_of(V), busy_slots(V)
    result = adjust(logits, sampling_of(V, **PENALTIES[name]), slots, rows)
    for row, slot in enumerate(rows):
        expected = reference(logits[row], slots, slot, **PENALTIES[name])
        np.testing.assert_allclose(result[row], expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_adjust_logits_keeps_bits_of_other_rows(masked: bool) -> None:
    V, rows = 300, [0, 1, 2, 3, 4]
    logits, slots = logits_of(V), busy_slots(V)
    sampling = sampling_of(V, **PENALTIES["all"])
    sampling.penalized[[0, 3]] = False
    if masked:
        sampling.mask[1, 0] = 5
    result = adjust(logits, sampling, slots, rows)
    np.testing.assert_array_equal(result[[0, 3]], logits[[0, 3]])
    assert (result[[1, 2, 4]] != logits[[1, 2, 4]]).any(axis=1).all()


@pytest.mark.parametrize("name", PENALTIES)
def test_adjust_logits_has_the_same_bits_alone_and_in_a_batch(name: str) -> None:
    V = 300
    logits, slots = logits_of(V), busy_slots(V)
    sampling = sampling_of(V, **PENALTIES[name])
    crowd = adjust(logits, sampling, slots, [6, 5, 4, 3, 2])
    for row in range(R):
        one: SamplingArrays = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], sampling)
        alone = adjust(logits[row : row + 1], one, slots, [6 - row])
        assert alone[0].tobytes() == crowd[row].tobytes()


@pytest.mark.parametrize("penalized", [False, True])
@pytest.mark.parametrize("V", SIZES)
def test_mask_forbids_tokens_of_cleared_bits(V: int, penalized: bool) -> None:
    logits, slots = logits_of(V), busy_slots(V)
    sampling = sampling_of(V, penalized=penalized)
    free = adjust(logits, sampling, slots, range(R))
    allowed = np.random.default_rng(V).random((R, V)) < 0.5
    allowed[:, [0, V - 1]] = [[True, False], [False, True], [True, True], [False, False], [True, False]]
    sampling.mask[:] = packed(allowed)
    np.testing.assert_array_equal(adjust(logits, sampling, slots, range(R)), np.where(allowed, free, -np.inf))


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("V", SIZES)
def test_mask_bits_past_the_vocabulary_are_ignored(V: int, spare: bool) -> None:
    logits, slots = logits_of(V), empty_slots(Z, V)
    sampling = sampling_of(V, penalized=False)
    sampling.mask[:] = packed(np.ones((R, V), np.bool_), spare=spare)
    np.testing.assert_array_equal(adjust(logits, sampling, slots, range(R)), logits)


def test_mask_overrides_bias() -> None:
    V = 300
    logits, slots = logits_of(V), empty_slots(Z, V)
    slots.bias[:, 17] = 100.0
    sampling = sampling_of(V)
    assert np.asarray(_choose(logits, sampling, slots, np.arange(R))).tolist() == [17] * R
    sampling.mask[:] = packed(np.arange(V) != 17)
    expected = np.delete(logits, 17, axis=1).argmax(axis=1)
    tokens = np.asarray(_choose(logits, sampling, slots, np.arange(R)))
    np.testing.assert_array_equal(tokens, expected + (expected >= 17))


def test_adjust_logits_gives_positive_zeros() -> None:
    V = 300
    logits, slots = np.full((R, V), -2.0, np.float32), empty_slots(Z, V)
    logits[:, [40, 200]] = -np.finfo(np.float32).tiny, 0.0  # a hundred-millionth of it is -0
    slots.seen[:, 40] = True
    sampling = sampling_of(V, repetition_penalty=1e-8)
    result = adjust(logits, sampling, slots, range(R))
    assert not np.signbit(result[:, 40]).any()
    tokens = np.asarray(_choose(logits, sampling, slots, np.arange(R)))
    assert tokens.tolist() == [40] * R  # equal to 200, and lower


def test_changes_logits() -> None:
    sampling = greedy_sampling(R, 300)
    assert not changes_logits(sampling)
    masked = replace(sampling, mask=sampling.mask.copy())
    masked.mask[3, 2] ^= 1 << 31
    assert changes_logits(masked)
    assert changes_logits(replace(sampling, penalized=np.arange(R) == R - 1))


def test_sampled_rows_draw_from_penalized_logits() -> None:
    """A bias of 100 leaves one token to draw."""
    V = 300
    slots, sampling = empty_slots(Z, V), sampling_of(V, temperature=1.5)
    slots.bias[np.arange(Z), 10 * np.arange(Z)] = 100.0
    tokens = np.asarray(_choose(logits_of(V), sampling, slots, np.arange(R)))
    assert tokens.tolist() == [0, 10, 20, 30, 40]


def test_record_choice_counts_in_the_slots_of_rows() -> None:
    V = 50
    slots: Any = empty_slots(Z, V)
    expected = np.zeros((Z, V), np.int32)
    rng = np.random.default_rng(1)
    for _ in range(20):
        rows, tokens = rng.permutation(Z)[:R].astype(np.int32), rng.integers(0, 4, R).astype(np.int32)
        slots = _record(slots, rows, tokens)
        expected[rows, tokens] += 1
        assert np.asarray(slots.tokens)[rows].tolist() == tokens.tolist()
    np.testing.assert_array_equal(slots.counts, expected)
    assert not np.asarray(slots.bias).any()
    assert not np.asarray(slots.seen).any()


def test_set_slot_penalties_changes_one_slot() -> None:
    V = 50
    slots, new = (
        busy_slots(V),
        SlotPenalties(np.full(V, 2.0, np.float32), np.full(V, 9, np.int32), np.ones(V, np.bool_)),
    )
    filled = _fill(slots, np.int32(4), new)
    np.testing.assert_array_equal(filled.tokens, slots.tokens)
    for name in ("bias", "counts", "seen"):
        expected = getattr(slots, name).copy()
        expected[4] = getattr(new, name)
        np.testing.assert_array_equal(getattr(filled, name), expected)
