"""Prefix caching with a fake runner: cached pages and log-probs are reused, and outcomes do not change."""

import pytest

from serve.engine.request import PromptScoring, SamplingParams
from tests.support.fake_runner import VOCAB_SIZE, CoreBench, alone, greedy, hidden_after, prompt_of


def calls(bench: CoreBench, name: str) -> int:
    """Live rows or tokens of all calls with this name since the last call of this function."""
    live = sum(live for called, live in bench.runner.calls if called == name)
    bench.runner.calls = [call for call in bench.runner.calls if call[0] != name]
    return live


def test_cached_prompt_is_scored_without_prefill(bench: CoreBench) -> None:
    bench.add("a", prompt_of(200), greedy(3))
    bench.run()
    assert (calls(bench, "prefill"), calls(bench, "score")) == (199, 0)
    b = bench.add("b", prompt_of(200), greedy(3, prompt_logprobs=True))
    bench.run()
    assert (calls(bench, "prefill"), calls(bench, "score")) == (7, 199)
    assert bench.events["b"][0].cached_tokens == 192
    assert bench.outcome("b") == alone(b)


def test_cached_scores_are_reused(bench: CoreBench) -> None:
    bench.add("a", prompt_of(200), greedy(0, prompt_logprobs=True))
    bench.run()
    assert (calls(bench, "prefill"), calls(bench, "score")) == (199, 199)
    b = bench.add("b", [*prompt_of(192), *prompt_of(192), *prompt_of(8)][:150], greedy(3, prompt_logprobs=True))
    c = bench.add("c", [*prompt_of(200), *prompt_of(20)], greedy(3, prompt_logprobs=True))
    bench.run()
    assert bench.outcome("b") == alone(b)
    assert bench.outcome("c") == alone(c)
    calls(bench, "score")
    d = bench.add("d", prompt_of(200), greedy(2, prompt_logprobs=True))
    bench.run()
    assert calls(bench, "score") == 8  # the tokens after the last full page
    assert bench.outcome("d") == alone(d)


@pytest.mark.parametrize("first", [1, 2, 64, 65, 128, 150])
@pytest.mark.parametrize("second", [1, 3, 64, 100, 129, 199])
def test_cached_scores_of_partial_prompt(bench: CoreBench, first: int, second: int) -> None:
    for name, start in (("a", first), ("b", second), ("c", 1)):
        params = SamplingParams(1, temperature=0.0, prompt=PromptScoring(start))
        request = bench.add(name, prompt_of(200), params)
        bench.run()
        assert bench.outcome(name, start) == alone(request)


def test_scores_of_requested_ids_are_not_cached(bench: CoreBench) -> None:
    for name, ids in (("a", ()), ("b", (5, 6)), ("c", ())):
        params = SamplingParams(1, temperature=0.0, prompt=PromptScoring(requested_ids=ids))
        request = bench.add(name, prompt_of(200), params)
        bench.run()
        assert bench.outcome(name) == alone(request)
        assert calls(bench, "score") == {"a": 199, "b": 199, "c": 8}[name]


def test_prefix_caching_off() -> None:
    bench = CoreBench(prefix_caching=False)
    for name in "ab":
        request = bench.add(name, prompt_of(200), greedy(1, prompt_logprobs=True))
        bench.run()
        assert (calls(bench, "prefill"), calls(bench, "score")) == (199, 199)
        assert bench.outcome(name) == alone(request)
        assert bench.events[name][0].cached_tokens == 0


def test_cache_salt_separates_requests(bench: CoreBench) -> None:
    for name, salt in (("a", ""), ("b", "x"), ("c", "x")):
        request = bench.add(name, prompt_of(200), greedy(1, prompt_logprobs=True), cache_salt=salt)
        bench.run()
        assert bench.outcome(name) == alone(request)
        assert bench.events[name][0].cached_tokens == (192 if name == "c" else 0)


def test_requests_with_equal_prompt_share_pages() -> None:
    bench = CoreBench(max_num_batched_tokens=68)
    requests = [bench.add(f"{i}", prompt_of(200), SamplingParams(30, seed=i)) for i in range(4)]
    while not all(request.output_token_ids for request in requests):
        bench.step()
    assert len({tuple(request.pages[:3]) for request in requests}) == 1
    assert calls(bench, "prefill") == 199 + 3 * 7
    bench.run()
    for request in requests:
        assert bench.outcome(request.id) == alone(request)


def test_output_is_cached(bench: CoreBench) -> None:
    a = bench.add("a", prompt_of(100), greedy(100))
    bench.run()
    calls(bench, "prefill")
    b = bench.add("b", [*prompt_of(100), *a.output_token_ids], greedy(5, prompt_logprobs=True))
    bench.run()
    assert calls(bench, "prefill") == 7
    assert bench.outcome("b") == alone(b)


def test_cached_pages_are_evicted() -> None:
    bench = CoreBench(pages=9)
    for i in range(6):
        request = bench.add(f"{i}", prompt_of(300, i % 3), greedy(20, prompt_logprobs=True))
        bench.run()
        assert bench.outcome(f"{i}") == alone(request)


def test_full_vocab_logprobs_in_blocks(bench: CoreBench) -> None:
    params = SamplingParams(2, temperature=0.0, prompt=PromptScoring(full_vocab=True))
    a = bench.add("a", prompt_of(70), params)
    bench.run()
    assert bench.outcome("a").prompt_logprobs is None
    assert calls(bench, "score") == 0
    rows = bench.core.full_vocab_logprobs("a", 60, 9)
    assert rows.shape == (9, VOCAB_SIZE)
    for i, row in enumerate(rows):
        hidden = hidden_after(a.prompt_token_ids[: 61 + i])
        assert row.tolist() == [-((token + hidden) % 7) / 8 for token in range(VOCAB_SIZE)]
    assert a.pages
    bench.core.scheduler.check()
    assert bench.core.abort("a") is None
    assert not a.pages
    bench.core.scheduler.check()
    with pytest.raises(LookupError):
        bench.core.full_vocab_logprobs("a", 0, 1)


def test_full_vocab_logprobs_after_failure(bench: CoreBench) -> None:
    bench.add("a", prompt_of(70), SamplingParams(0, prompt=PromptScoring(full_vocab=True)))
    bench.run()
    bench.add("b", prompt_of(7), greedy(3))
    bench.runner.fail_once("decode")
    bench.fail()
    with pytest.raises(LookupError):
        bench.core.full_vocab_logprobs("a", 0, 1)
