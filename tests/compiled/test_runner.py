"""ModelRunner on a tiny model: slots between steps, results read late, full-vocabulary rows, unknown shapes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from compiled.programs import Shape, UnknownShapeError
from compiled.runner import ModelRunner
from compiled.shapes import Buckets
from compiled.state import (
    FROM_SLOT,
    PAGE_COPIES,
    DecodeInput,
    PageCopies,
    SamplingArrays,
    ScoreInput,
    SlotPenalties,
    StepInput,
    StepOutput,
    greedy_sampling,
    no_requested_ids,
)
from compiled.step import cache_index
from model.token_logprobs import TokenLogprobs
from model.weights.loader import load_model
from model.weights.source import ModelSource
from model.weights.weight_table import open_checkpoint
from tests.support.slots import packed
from tests.support.tiny import random_weights, tiny_configs, write_checkpoint

CONFIG = tiny_configs()["llama"]
V = CONFIG["vocab_size"]
BUCKETS = Buckets(decode_rows=(1, 4), prefill_chunks=(16,), score_rows=16, pages_per_row=2, full_vocab_rows=8)
PROMPT = [5, 17, 99, 3]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def compiled_runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    """A float32 model with keys and values of each dtype."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, CONFIG, random_weights(CONFIG, seed=3))
    checkpoint = open_checkpoint(ModelSource("tiny", folder))
    try:
        model = replace(load_model(checkpoint, "float32"), kv_dtype=jnp.dtype(request.param))
    finally:
        checkpoint.close()
    return ModelRunner(model, BUCKETS, pages=9, max_logprobs=5)


@pytest.fixture
def runner(compiled_runner: ModelRunner) -> ModelRunner:
    """With an empty state."""
    compiled_runner.reset()
    return compiled_runner


def prefill(runner: ModelRunner, tokens: list[int], page: int) -> None:
    """All but the last token of a prompt, in one page."""
    count = len(tokens) - 1
    step = StepInput(np.zeros((1, 16), np.int32), np.full((1, 16), -1, np.int32), np.zeros((1, 2), np.int32))
    step.tokens[0, :count] = tokens[:count]
    step.positions[0, :count] = np.arange(count)
    step.tables[0, 0] = page
    assert runner.read(runner.prefill(step)) == count


def decode_input(rows: list[tuple[int, int, int, int]], size: int = 4) -> DecodeInput:
    """Rows of token, position, page and slot, padded."""
    step = DecodeInput(
        tokens=np.zeros(size, np.int32),
        positions=np.full(size, -1, np.int32),
        tables=np.zeros((size, 2), np.int32),
        slots=np.full(size, BUCKETS.slots - 1, np.int32),
        requested_ids=no_requested_ids(size),
    )
    for row, (token, position, page, slot) in enumerate(rows):
        step.tokens[row], step.positions[row], step.tables[row, 0], step.slots[row] = token, position, page, slot
    return step


def sampling_of(size: int = 4, **values: float) -> SamplingArrays:
    """Greedy rows, adjusted by the given values."""
    sampling = greedy_sampling(size, V)
    sampling.penalized[:] = bool(values)
    for name, value in values.items():
        getattr(sampling, name)[:] = value
    return sampling


def adjustment_of(
    bias: dict[int, float] | None = None, counts: tuple[int, ...] = (), seen: tuple[int, ...] = ()
) -> SlotPenalties:
    new = SlotPenalties(np.zeros(V, np.float32), np.zeros(V, np.int32), np.zeros(V, np.bool_))
    for token, value in (bias or {}).items():
        new.bias[token] = value
    for token in counts:
        new.counts[token] += 1
    new.seen[list(seen)] = True
    return new


def generate(
    runner: ModelRunner, steps: int, *, from_slot: bool = True, slot: int = 2, **values: float
) -> list[StepOutput]:
    """Continue PROMPT in one row of four; with tokens from the slot, all steps are dispatched before any is read."""
    prefill(runner, PROMPT, page=3)
    outputs: list[StepOutput] = []
    token = PROMPT[-1]
    for i in range(steps):
        row = (token, len(PROMPT) - 1 + i, 3, slot)
        outputs.append(runner.decode(decode_input([row]), sampling_of(4, **values)))
        token = FROM_SLOT if from_slot else int(runner.read(outputs[-1]).tokens[0])
    return [runner.read(output) for output in outputs]


def tokens_of(outputs: list[StepOutput]) -> list[int]:
    return [int(output.tokens[0]) for output in outputs]


def bits(logprobs: TokenLogprobs, row: int) -> list[bytes]:
    """Log-prob, rank and alternatives of a row, as bytes."""
    return [np.asarray(leaf)[row].tobytes() for leaf in jax.tree.leaves(logprobs)[:4]]


def score(runner: ModelRunner, places: list[int], targets: list[int], ids: list[int] | None = None) -> TokenLogprobs:
    step = ScoreInput(np.zeros(16, np.int32), np.zeros(16, np.int32), no_requested_ids(16))
    step.cache_indices[: len(places)], step.targets[: len(targets)] = places, targets
    step.requested_ids[:, : len(ids or [])] = ids or []
    return runner.read(runner.score(step))


def test_reset_frees_the_old_state_first(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill(runner, PROMPT, page=1)
    old, compiled = jax.tree.leaves(runner._state), runner._compiled
    gone: list[bool] = []

    def note(shape: Shape) -> Any:
        gone.extend(leaf.is_deleted() for leaf in old)
        return compiled(shape)

    monkeypatch.setattr(runner, "_compiled", note)
    old[0].delete()  # as by a step that failed after donation
    runner.reset()
    assert gone == [True] * len(old)


def test_decode_from_slot_uses_the_chosen_token(runner: ModelRunner) -> None:
    from_host = generate(runner, 12, from_slot=False)
    runner.reset()
    from_slots = generate(runner, 12, from_slot=True)
    assert tokens_of(from_slots) == tokens_of(from_host)
    assert len(set(tokens_of(from_host))) > 1
    for a, b in zip(from_slots, from_host, strict=True):
        assert bits(a.logprobs, 0) == bits(b.logprobs, 0)


def test_decode_rows_keep_their_slots_in_any_order(runner: ModelRunner) -> None:
    prompts = {0: PROMPT, 1: [1, 2, 3], 3: [100, 90, 80, 70, 60]}  # by slot
    for slot, prompt in prompts.items():
        prefill(runner, prompt, page=1 + slot)
    alone = {}
    for slot, prompt in prompts.items():
        rows = [(prompt[-1], len(prompt) - 1, 1 + slot, slot), (FROM_SLOT, len(prompt), 1 + slot, slot)]
        alone[slot] = [int(runner.read(runner.decode(decode_input([row]), sampling_of())).tokens[0]) for row in rows]
    chosen: dict[int, list[int]] = {slot: [] for slot in prompts}
    for i, order in enumerate(([0, 1, 3], [3, 0, 1])):
        rows = [(FROM_SLOT if i else prompts[slot][-1], len(prompts[slot]) - 1 + i, 1 + slot, slot) for slot in order]
        output = runner.read(runner.decode(decode_input(rows), sampling_of()))
        for row, slot in enumerate(order):
            chosen[slot].append(int(output.tokens[row]))
    assert chosen == alone


def test_decode_accumulates_counts(runner: ModelRunner) -> None:
    """A bias of 100 makes one token win until a frequency penalty of 30 per occurrence outweighs it."""
    runner.set_penalties(2, adjustment_of({40: 100.0, 41: 95.0}))
    tokens = tokens_of(generate(runner, 6, frequency_penalty=30.0))
    assert tokens == [40, 41, 40, 41, 40, 41]


def test_set_penalties_replaces_one_slot(runner: ModelRunner) -> None:
    runner.set_penalties(1, adjustment_of({7: 100.0}))
    runner.set_penalties(2, adjustment_of({40: 100.0}))
    assert tokens_of(generate(runner, 3, frequency_penalty=1.0)) == [40] * 3
    runner.set_penalties(2, adjustment_of({50: 100.0, 60: 99.0}, counts=(50,)))
    assert tokens_of(generate(runner, 1, presence_penalty=3.0)) == [60]
    assert tokens_of(generate(runner, 1, slot=1, presence_penalty=3.0)) == [7]


def test_repetition_applies_to_prompt_and_chosen_tokens(runner: ModelRunner) -> None:
    runner.set_penalties(2, adjustment_of({40: 100.0, 41: 90.0, 42: 80.0}, seen=(40,)))
    assert tokens_of(generate(runner, 3, repetition_penalty=2.0)) == [41, 42, 40]


def test_sampling_parameters_do_not_change_raw_logprobs(runner: ModelRunner) -> None:
    plain = generate(runner, 1)[0]
    best = int(plain.tokens[0])
    runner.set_penalties(2, adjustment_of({77: 50.0}, counts=(best,), seen=(3,)))
    changed = generate(runner, 1, presence_penalty=1.0, repetition_penalty=1.5, frequency_penalty=0.5)[0]
    assert int(changed.tokens[0]) == 77
    assert bits(changed.logprobs, 0)[2:] == bits(plain.logprobs, 0)[2:]
    place = cache_index(3, len(PROMPT) - 1)
    assert bits(score(runner, [place], [77]), 0) == bits(changed.logprobs, 0)


def test_processed_logprobs_apply_to_their_row_only(runner: ModelRunner) -> None:
    prefill(runner, PROMPT, page=1)
    prefill(runner, PROMPT, page=2)
    step = decode_input([(PROMPT[-1], len(PROMPT) - 1, 1, 0), (PROMPT[-1], len(PROMPT) - 1, 2, 1)])
    raw = runner.full_vocab_logprobs(
        np.full(8, cache_index(1, 0), np.int32)
    )  # any row: checks only that the cache has values
    assert np.isfinite(raw).all()
    plain = runner.read(runner.decode(step, sampling_of()))
    sampling = sampling_of()
    sampling.temperature[:2], sampling.top_k[:2] = 0.5, 3
    sampling.processed[0] = True
    logprobs = runner.read(runner.decode(step, sampling)).logprobs
    assert bits(logprobs, 1)[2:] == bits(plain.logprobs, 1)[2:]
    assert logprobs.top_ids[0].tolist()[:3] == plain.logprobs.top_ids[0].tolist()[:3]
    doubled = np.exp(plain.logprobs.top_logprobs[0, :3].astype(np.float64) / 0.5)
    np.testing.assert_allclose(np.exp(logprobs.top_logprobs[0, :3]), doubled / doubled.sum(), rtol=1e-5)
    assert (logprobs.top_logprobs[0, 3:] == -np.inf).all()
    assert np.isfinite(logprobs.logprob[:2]).all()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_masked_row_has_raw_and_processed_logprobs(runner: ModelRunner, temperature: float) -> None:
    place = cache_index(1, len(PROMPT) - 1)
    prefill(runner, PROMPT, page=1)
    prefill(runner, PROMPT, page=2)
    step = decode_input([(PROMPT[-1], len(PROMPT) - 1, page, page - 1) for page in (1, 2)])
    step.requested_ids[:2, :3] = [7, 60, V - 1]
    allowed = np.arange(V) % 4 == 3
    plain, sampling = sampling_of(), sampling_of()
    plain.temperature[:2] = sampling.temperature[:2] = temperature
    sampling.return_processed[0], sampling.mask[0] = True, packed(allowed)
    output = runner.read(runner.decode(step, sampling))
    token = int(output.tokens[0])
    raw = runner.full_vocab_logprobs(np.full(8, place, np.int32))[0].astype(np.float64)
    assert allowed[token]
    assert bits(output.logprobs, 0) == bits(score(runner, [place], [token], [7, 60, V - 1]), 0)
    assert bits(output.logprobs, 1) == bits(runner.read(runner.decode(step, plain)).logprobs, 1)
    np.testing.assert_allclose(np.exp(output.allowed_logmass[0]), np.exp(raw[allowed]).sum(), rtol=1e-5)
    assert output.allowed_logmass[1:].tolist() == [0, 0, 0]
    expected = np.where(allowed, raw / (temperature or 1), -np.inf)
    expected -= np.log(np.exp(expected).sum())
    processed = output.processed[:1]
    np.testing.assert_allclose(processed.logprob[0], expected[token], atol=1e-5)
    np.testing.assert_allclose(processed.requested_logprobs[0, :3], expected[[7, 60, V - 1]], atol=1e-5)
    np.testing.assert_allclose(processed.top_logprobs[0], expected[processed.top_ids[0]], atol=1e-5)
    assert processed.top_ids[0].tolist() == np.argsort(-expected, kind="stable")[:5].tolist()
    assert processed.rank[0] == 1 + (expected > expected[token]).sum()


def test_only_allowed_token_has_its_own_mass(runner: ModelRunner) -> None:
    prefill(runner, PROMPT, page=1)
    step, sampling = decode_input([(PROMPT[-1], len(PROMPT) - 1, 1, 0)]), sampling_of()
    sampling.mask[0], sampling.return_processed[0] = packed(np.arange(V) == 77), True
    output = runner.read(runner.decode(step, sampling))
    assert int(output.tokens[0]) == 77
    assert output.allowed_logmass[0] == output.logprobs.logprob[0] < 0
    assert output.processed.logprob[0] == 0
    assert output.processed.top_logprobs[0].tolist() == [0, *[-np.inf] * 4]


def test_rows_of_one_request_see_the_tokens_before(runner: ModelRunner) -> None:
    """Known tokens can be rows of one step: each has the log-probs of a step of its own."""
    one_by_one = generate(runner, 3)
    tokens = [PROMPT[-1], *tokens_of(one_by_one)]
    prefill(runner, PROMPT, page=1)
    step = decode_input([(token, len(PROMPT) - 1 + i, 1, BUCKETS.slots - 1) for i, token in enumerate(tokens[:3])])
    output = runner.read(runner.decode(step, sampling_of()))
    assert output.tokens[:3].tolist() == tokens[1:]
    assert [bits(output.logprobs, row) for row in range(3)] == [bits(each.logprobs, 0) for each in one_by_one]


def test_requested_ids_are_equal_in_decode_and_score(runner: ModelRunner) -> None:
    prefill(runner, PROMPT, page=3)
    step = decode_input([(PROMPT[-1], len(PROMPT) - 1, 3, 0)])
    ids = [V - 1, 0, 64]
    step.requested_ids[0, :3] = ids
    output = runner.read(runner.decode(step, sampling_of()))
    place = cache_index(3, len(PROMPT) - 1)
    again = score(runner, [place] * 3, ids, ids)
    for column in range(3):
        assert (
            output.logprobs.requested_logprobs[0, column]
            == again.logprob[column]
            == again.requested_logprobs[0, column]
        )
        assert output.logprobs.requested_ranks[0, column] == again.rank[column] == again.requested_ranks[0, column]


def test_full_vocab_logprobs_have_the_bits_of_score(runner: ModelRunner) -> None:
    prefill(runner, [*PROMPT, 1, 2, 3, 4, 5], page=3)
    places: NDArray[np.int32] = np.array([cache_index(3, i) for i in range(8)], np.int32)
    rows = runner.full_vocab_logprobs(places)
    assert rows.shape == (8, V)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.exp(rows.astype(np.float64)).sum(axis=1), 1.0, atol=1e-5)
    for token in range(V):
        scored = score(runner, places.tolist(), [token] * 8)
        assert scored.logprob[:8].tobytes() == rows[:, token].tobytes()
        order = np.argsort(-rows, axis=1, kind="stable")
        assert scored.rank[:8].tolist() == (1 + (order == token).argmax(axis=1)).tolist()


def test_step_output_is_unchanged_by_later_steps(runner: ModelRunner) -> None:
    prefill(runner, PROMPT, page=3)
    row = (PROMPT[-1], len(PROMPT) - 1, 3, 2)
    first = runner.decode(decode_input([row]), sampling_of())
    read_at_once = jax.tree.map(np.array, runner.read(first))
    for i in range(4):
        runner.decode(decode_input([(FROM_SLOT, len(PROMPT) + i, 3, 2)]), sampling_of())
    read_late = runner.read(first)
    assert [leaf.tobytes() for leaf in jax.tree.leaves(read_late)] == [
        leaf.tobytes() for leaf in jax.tree.leaves(read_at_once)
    ]


def test_copied_page_has_the_same_bits(runner: ModelRunner) -> None:
    def numbers(page: int) -> list[bytes]:
        output = runner.read(runner.decode(decode_input([(PROMPT[-1], len(PROMPT) - 1, page, 0)]), sampling_of(4)))
        return [*bits(output.logprobs, 0), *bits(score(runner, [cache_index(page, 1)], PROMPT[2:3]), 0)]

    prefill(runner, PROMPT, page=3)
    before = numbers(3)
    copies = PageCopies(np.zeros(PAGE_COPIES, np.int32), np.zeros(PAGE_COPIES, np.int32))
    copies.sources[:2], copies.targets[:2] = [3, 3], [5, 6]
    runner.copy_pages(copies)
    prefill(runner, PROMPT[::-1], page=3)
    assert numbers(5) == numbers(6) == before
    assert numbers(3) != before


def test_steps_reject_shapes_that_were_not_compiled(runner: ModelRunner) -> None:
    with pytest.raises(UnknownShapeError):
        runner.decode(decode_input([], size=3), sampling_of(3))
    with pytest.raises(UnknownShapeError):
        runner.full_vocab_logprobs(np.zeros(7, np.int32))
    with pytest.raises(UnknownShapeError):
        runner.prefill(StepInput(*(np.zeros((1, n), np.int32) for n in (15, 15, 2))))
    with pytest.raises(TypeError, match="compiled"):
        runner.decode(decode_input([]), greedy_sampling(4, V + 32))


def test_runner_attributes(runner: ModelRunner) -> None:
    assert (runner.buckets, runner.pages, runner.max_logprobs, runner.vocab_size) == (BUCKETS, 9, 5, V)
    names = [program.name for program in runner.programs.values()]
    assert names == [
        "zero_state",
        "decode_1",
        "decode_4",
        "prefill_16",
        "score_16",
        "full_vocab_8",
        "penalties",
        "copy_pages",
    ]
