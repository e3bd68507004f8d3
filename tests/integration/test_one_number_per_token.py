"""Promise 2: the same token after the same prefix has one log-prob, bit by bit, however it is computed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled.runner import ModelRunner
from compiled.shapes import Buckets
from model.weights.source import default_model_path
from serve.engine.request import PromptScoring, SamplingParams
from serve.engine.token_mask import TokenMask
from tests.support.grammars import hashed
from tests.support.in_process import Answer, run
from tests.support.runners import make_runner
from tests.support.tiny import random_weights, tiny_configs, write_checkpoint

_VOCABULARY = 49152
_LAYERS = 2  # of 30, which are compiled alike: the other tests of a server's bits run all of them


@pytest.fixture(
    scope="module",
    params=[
        "q4_1 file",
        "bfloat16",
        pytest.param("float32", marks=pytest.mark.slow),
        pytest.param("Q8_0 float32", marks=pytest.mark.slow),
        pytest.param("Q8_0 bfloat16", marks=pytest.mark.slow),
        pytest.param("Q4_K float32", marks=pytest.mark.slow),
        pytest.param("q4_1 file, bfloat16 cache", marks=pytest.mark.slow),
    ],
)
def runner(request: pytest.FixtureRequest) -> ModelRunner:
    """The first layers of the default model with weights of each kind, on the CPU kernels if this machine has them."""
    weights, *cache = request.param.removesuffix(" cache").split(", ")
    weights = {"q4_1 file": "auto float32", "float32": "none float32"}.get(weights, weights)
    return make_runner(default_model_path(), weights, layers=_LAYERS, kv_dtype=cache[0] if cache else None)


def _greedy(tokens: int, *, score: bool = False) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, prompt=PromptScoring() if score else None)


def _constrained(seed: int, vocab_size: int) -> SamplingParams:
    """Sampled with filters from a grammar; with penalties if the seed is odd."""
    params = SamplingParams(24, temperature=0.9, top_p=0.95, top_k=50, seed=seed, return_processed=True)
    params = replace(params, grammar=hashed(vocab_size, seed=seed))
    return replace(params, presence_penalty=0.5, repetition_penalty=1.2) if seed % 2 else params


def _prompt(seed: int, length: int, vocab_size: int = _VOCABULARY) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(20, vocab_size, length).tolist()
    return ids


def _same(a: Answer, b: Answer) -> bool:
    return (a.token_ids, a.logprobs, a.ranks, a.top_logprobs) == (b.token_ids, b.logprobs, b.ranks, b.top_logprobs)


@pytest.mark.parametrize("length", [1, 65, 150])
def test_logprobs_in_a_full_batch_equal_alone(runner: ModelRunner, length: int) -> None:
    mine = (_prompt(length, length), _greedy(12, score=True))
    alone = run(runner, {"mine": mine})["mine"]
    for companions in (1, 3, 15):
        others = {
            f"other {i}": (_prompt(100 + i, 5 + 23 * (i % 4)), _greedy(4 + 3 * (i % 4))) for i in range(companions)
        }
        crowded = run(runner, {**others, "mine": mine})["mine"]
        assert _same(crowded, alone)
        assert alone.prompt is not None
        assert crowded.prompt is not None
        assert crowded.prompt.logprob.tobytes() == alone.prompt.logprob.tobytes()


@pytest.mark.parametrize("length", [1, 64, 100])
def test_logprobs_generated_equal_scored(runner: ModelRunner, length: int) -> None:
    prompt = _prompt(1000 + length, length)
    generated = run(runner, {"generate": (prompt, _greedy(40))})["generate"]
    whole = prompt + generated.token_ids
    again = run(runner, {"score": (whole, _greedy(0, score=True))})["score"].prompt
    assert again is not None
    first = len(prompt) - 1
    assert again.logprob[first:].tobytes() == np.array(generated.logprobs, np.float32).tobytes()
    assert again.rank[first:].tolist() == generated.ranks
    assert [row.tobytes() for row in again.top_logprobs[first:]] == generated.top_logprobs


@pytest.mark.parametrize("budget", [32, 80, 272])
def test_logprobs_in_any_chunks_are_equal(runner: ModelRunner, budget: int) -> None:
    """The token budget of a step splits a long prompt; other prompts before it move the splits."""
    mine = (_prompt(7, 300), _greedy(4, score=True))
    alone = run(runner, {"mine": mine})["mine"]
    for before in (3, 50):
        requests = {"first": (_prompt(before, before), _greedy(3)), "mine": mine}
        cut = run(runner, requests, max_num_batched_tokens=budget)["mine"]
        assert _same(cut, alone)
        assert alone.prompt is not None
        assert cut.prompt is not None
        assert cut.prompt.logprob.tobytes() == alone.prompt.logprob.tobytes()


@settings(max_examples=5, deadline=None, database=None)
@given(data=st.data())
def test_logprobs_are_equal_however_computed(runner: ModelRunner, data: st.DataObject) -> None:
    """Property: any request, in any batch, any chunks and with any cached prefix, and scored again afterwards."""
    seed, length, tokens = (data.draw(st.integers(1, most)) for most in (10_000, 200, 20))
    mine = (_prompt(seed, length), _greedy(tokens, score=True))
    alone = run(runner, {"mine": mine})["mine"]
    others = data.draw(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 8)), max_size=7))
    crowd = {f"other {i}": (_prompt(seed + 1 + i, size), _greedy(count)) for i, (size, count) in enumerate(others)}
    cached = data.draw(st.integers(0, length))  # tokens of the prompt that are in the prefix cache
    before = {"before": (mine[0][:cached], _greedy(1))} if cached else {}
    budget = data.draw(st.sampled_from((32, 80, 272)))
    found = run(runner, {**crowd, "mine": mine}, before=before, max_num_batched_tokens=budget)["mine"]
    assert _same(found, alone)
    assert alone.prompt is not None
    assert found.prompt is not None
    assert found.prompt.logprob.tobytes() == alone.prompt.logprob.tobytes()
    whole = mine[0] + alone.token_ids
    again = run(runner, {**crowd, "again": (whole, _greedy(0, score=True))}, max_num_batched_tokens=budget)[
        "again"
    ].prompt
    assert again is not None
    every = np.concatenate([alone.prompt.logprob[: length - 1], np.array(alone.logprobs, np.float32)])
    assert again.logprob.tobytes() == every.tobytes()


def test_seed_draws_the_same_tokens_in_a_batch(runner: ModelRunner) -> None:
    mine = (_prompt(5, 20), SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, top_k=50, seed=42))
    alone = run(runner, {"mine": mine})["mine"]
    others = {f"other {i}": (_prompt(i, 10), SamplingParams(max_tokens=20, temperature=1.0, seed=i)) for i in range(5)}
    assert _same(run(runner, {**others, "mine": mine})["mine"], alone)
    reseeded = (mine[0], SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, top_k=50, seed=43))
    assert run(runner, {"mine": reseeded})["mine"].token_ids != alone.token_ids


def test_penalties_choose_the_same_tokens_in_a_batch(runner: ModelRunner) -> None:
    params = SamplingParams(
        max_tokens=24,
        temperature=0.8,
        seed=7,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        logit_bias=((300, 3.0), (20, -50.0)),
    )
    mine = (_prompt(6, 20), params)
    alone = run(runner, {"mine": mine})["mine"]
    others = {f"other {i}": (_prompt(i, 10), _greedy(20)) for i in range(5)}
    assert _same(run(runner, {**others, "mine": mine})["mine"], alone)
    again = run(runner, {"score": (mine[0] + alone.token_ids, _greedy(0, score=True))})["score"].prompt
    assert again is not None
    assert again.logprob[len(mine[0]) - 1 :].tobytes() == np.array(alone.logprobs, np.float32).tobytes()


@pytest.mark.parametrize("seed", range(4))
def test_grammar_with_forced_tokens_equals_one_token_after_another(runner: ModelRunner, seed: int) -> None:
    _check_forced_tokens(runner, seed)


def test_forced_tokens_with_a_sliding_window(tmp_path: Path) -> None:
    config = tiny_configs()["mistral"]
    write_checkpoint(tmp_path, config, random_weights(config, seed=3))
    buckets = Buckets(decode_rows=(1, 4), prefill_chunks=(16,), score_rows=64, pages_per_row=4)
    runner = make_runner(tmp_path, "float32", buckets, pages=40)
    for seed in range(3):
        _check_forced_tokens(runner, seed)


def _check_forced_tokens(runner: ModelRunner, seed: int) -> None:
    """Check a request that is constrained and sampled: alone, in a batch, without forced tokens, and scored again."""
    mine = (_prompt(60 + seed, 60 + seed, runner.vocab_size), _constrained(seed, runner.vocab_size))
    alone = run(runner, {"mine": mine})["mine"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenMask, "num_choices", 1)
        plain = run(runner, {"mine": mine})["mine"]
    assert alone.num_events < plain.num_events == 24
    others = {
        f"other {i}": (_prompt(i, 10, runner.vocab_size), _constrained(i, runner.vocab_size) if i % 2 else _greedy(20))
        for i in range(9)
    }
    for answer in (alone, run(runner, {**others, "mine": mine})["mine"]):
        assert replace(answer, num_events=24) == plain
    masses, forced = np.array(plain.allowed_mass), np.array(plain.forced)
    assert (np.array(plain.processed)[forced] == 0).all()
    assert masses[forced].tobytes() == np.exp(np.array(plain.logprobs)[forced]).tobytes()
    assert (masses < 1).any()
    assert (masses == 1).any()
    again = run(runner, {"score": (mine[0] + plain.token_ids, _greedy(0, score=True))})["score"].prompt
    assert again is not None
    assert again.logprob[len(mine[0]) - 1 :].tobytes() == np.array(plain.logprobs, np.float32).tobytes()
    assert again.rank[len(mine[0]) - 1 :].tolist() == plain.ranks
