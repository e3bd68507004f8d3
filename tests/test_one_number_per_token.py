"""Promise 2: the same token after the same prefix has one log-prob, to the last bit, however it was computed."""

import numpy as np
import pytest

from compiled.runner import ModelRunner
from serve.engine.request import SamplingParams
from tests.in_process import Answer, run

_VOCABULARY = 49152


def _greedy(tokens: int, *, score: bool = False) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, prompt_logprobs=score)


def _prompt(seed: int, length: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(20, _VOCABULARY, length).tolist()
    return ids


def _same(a: Answer, b: Answer) -> bool:
    return (a.token_ids, a.logprobs, a.ranks, a.top_logprobs) == (b.token_ids, b.logprobs, b.ranks, b.top_logprobs)


@pytest.mark.parametrize("length", [1, 15, 64, 65, 150])
def test_alone_or_in_a_full_batch(runner: ModelRunner, length: int) -> None:
    mine = (_prompt(length, length), _greedy(24, score=True))
    alone = run(runner, {"mine": mine})["mine"]
    for companions in (1, 3, 7):
        others = {f"other {i}": (_prompt(100 + i, 7 + 31 * i), _greedy(9 + 5 * i)) for i in range(companions)}
        crowded = run(runner, {**others, "mine": mine})["mine"]
        assert _same(crowded, alone)
        assert alone.prompt is not None
        assert crowded.prompt is not None
        assert crowded.prompt.logprob.tobytes() == alone.prompt.logprob.tobytes()


@pytest.mark.parametrize("length", [1, 30, 64, 100])
def test_generated_or_scored_again_as_a_prompt(runner: ModelRunner, length: int) -> None:
    prompt = _prompt(1000 + length, length)
    generated = run(runner, {"generate": (prompt, _greedy(40))})["generate"]
    whole = prompt + generated.token_ids
    again = run(runner, {"score": (whole, _greedy(0, score=True))})["score"].prompt
    assert again is not None
    first = len(prompt) - 1
    assert again.logprob[first:].tobytes() == np.array(generated.logprobs, np.float32).tobytes()
    assert again.rank[first:].tolist() == generated.ranks
    assert [row.tobytes() for row in again.top_logprobs[first:]] == generated.top_logprobs


def test_whatever_the_chunks(runner: ModelRunner) -> None:
    """A long prompt behind shorter ones is cut into other chunks than alone."""
    mine = (_prompt(7, 200), _greedy(4, score=True))
    alone = run(runner, {"mine": mine})["mine"]
    for before in (3, 17, 50):
        cut = run(runner, {"first": (_prompt(before, before), _greedy(3)), "mine": mine})["mine"]
        assert _same(cut, alone)
        assert alone.prompt is not None
        assert cut.prompt is not None
        assert cut.prompt.logprob.tobytes() == alone.prompt.logprob.tobytes()


def test_a_seed_draws_the_same_alone_and_in_a_crowd(runner: ModelRunner) -> None:
    mine = (_prompt(5, 20), SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, top_k=50, seed=42))
    alone = run(runner, {"mine": mine})["mine"]
    others = {f"other {i}": (_prompt(i, 10), SamplingParams(max_tokens=20, temperature=1.0, seed=i)) for i in range(5)}
    assert _same(run(runner, {**others, "mine": mine})["mine"], alone)
    reseeded = (mine[0], SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, top_k=50, seed=43))
    assert run(runner, {"mine": reseeded})["mine"].token_ids != alone.token_ids
