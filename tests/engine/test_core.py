"""EngineCore with a fake runner: the outcome of a request does not depend on what else runs."""

from dataclasses import replace
from typing import Any

import pytest

from serve.engine.request import FinishReason, PromptScoring, SamplingParams
from serve.engine.request_state import RequestStatus
from tests.support.fake_runner import CoreBench, InjectedError, K, alone, greedy, hidden_after, next_token, prompt_of


def test_step_prefill_chunks_then_decode(bench: CoreBench) -> None:
    bench.add("a", prompt_of(150), greedy(3))
    bench.run()
    assert bench.runner.calls == [
        ("prefill", 64),
        *(("prefill", 64), ("read", 0)),
        *(("prefill", 21), ("decode", 1), ("read", 0)),
        *(("decode", 1), ("read", 0)),
        *(("decode", 1), ("read", 0)),
        ("read", 0),
    ]
    assert [event.token_ids for event in bench.events["a"]] == [[token] for token in bench.outcome("a").tokens]


def test_step_prefill_beside_decode(bench: CoreBench) -> None:
    a = bench.add("a", [5], greedy(4))
    bench.step()
    b = bench.add("b", prompt_of(100), greedy(2))
    bench.runner.calls.clear()
    bench.run()
    assert [call for call in bench.runner.calls if call[0] != "read"] == [
        *(("prefill", 64), ("decode", 1)),
        *(("prefill", 35), ("decode", 2)),
        ("decode", 2),
    ]
    assert bench.outcome("a") == alone(a)
    assert bench.outcome("b") == alone(b)


def test_step_row_of_finished_request_is_discarded() -> None:
    prompt = prompt_of(10)
    first = next_token(hidden_after(prompt))
    bench = CoreBench()
    a = bench.add("a", prompt, SamplingParams(9, temperature=0.0, stop_token_ids=frozenset({first})))
    bench.run()
    bench.step()
    assert [name for name, _ in bench.runner.calls].count("decode") == 2
    assert bench.outcome("a") == alone(a)
    assert len(bench.events["a"]) == 1


def test_prompt_scores_across_chunks(bench: CoreBench) -> None:
    a = bench.add("a", prompt_of(70), greedy(2, prompt_logprobs=True))
    bench.run()
    # 64 rows of the first chunk and 5 of the second: the last token has no successor.
    assert [live for name, live in bench.runner.calls if name == "score"] == [8] * 8 + [5]
    assert bench.outcome("a") == alone(a)
    assert bench.events["a"][0].prompt_logprobs is not None


def test_prompt_scores_of_several_prompts_share_block(bench: CoreBench) -> None:
    requests = [bench.add(f"{i}", prompt_of(4, i), greedy(1, prompt_logprobs=True)) for i in range(4)]
    bench.run()
    assert [live for name, live in bench.runner.calls if name == "score"] == [8, 4]
    for request in requests:
        assert bench.outcome(request.id) == alone(request)


@pytest.mark.parametrize("start", [1, 2, 63, 64, 65, 70])
def test_prompt_scores_from_start(bench: CoreBench, start: int) -> None:
    params = SamplingParams(2, temperature=0.0, prompt=PromptScoring(start))
    a = bench.add("a", prompt_of(71), params)
    bench.run()
    assert sum(live for name, live in bench.runner.calls if name == "score") == 71 - start
    assert bench.outcome("a", start) == alone(a)


@pytest.mark.parametrize("scored", [False, True])
def test_scores_of_requested_ids(bench: CoreBench, scored: bool) -> None:
    ids = tuple(range(10, 15))
    scoring = PromptScoring(requested_ids=ids[:2]) if scored else None
    a = bench.add("a", prompt_of(20), SamplingParams(3, temperature=0.0, requested_ids=ids, prompt=scoring))
    b = bench.add("b", prompt_of(20), greedy(3, prompt_logprobs=True))
    bench.run()
    assert bench.outcome("a") == alone(a)
    assert bench.outcome("b") == alone(b)
    assert bench.events["a"][0].logprobs.top_ids.tolist() == [list(ids)]
    assert bench.events["b"][0].logprobs.top_ids.shape == (1, K)


@pytest.mark.parametrize("length", [1, 2, 64, 65, 200])
@pytest.mark.parametrize("scored", [False, True])
def test_max_tokens_zero(bench: CoreBench, length: int, scored: bool) -> None:
    a = bench.add("a", prompt_of(length), greedy(0, prompt_logprobs=scored))
    bench.run()
    assert bench.outcome("a") == alone(a)
    (event,) = bench.events["a"]
    assert (event.token_ids, event.finish_reason) == ([], FinishReason.LENGTH)
    assert "decode" not in {name for name, _ in bench.runner.calls}
    if scored:
        assert event.prompt_logprobs is not None
        assert len(event.prompt_logprobs.rank) == length - 1


def test_stop_token_ids_and_min_tokens() -> None:
    prompt = prompt_of(10)
    first = next_token(hidden_after(prompt))
    second = next_token(hidden_after([*prompt, first + 1]))
    for min_tokens, expected in ((0, [first]), (1, [first + 1, second])):
        bench = CoreBench()
        stops = frozenset({first, second})
        params = SamplingParams(max_tokens=9, temperature=0.0, min_tokens=min_tokens, stop_token_ids=stops)
        a = bench.add("a", prompt, params)
        bench.run()
        last = bench.events["a"][-1]
        assert bench.outcome("a").tokens == expected
        assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, expected[-1])
        assert bench.outcome("a") == alone(a)


def test_bad_words_beside_other_requests() -> None:
    prompt = prompt_of(10)
    free = alone(CoreBench().add("a", prompt, greedy(6))).tokens
    bench = CoreBench()
    params = SamplingParams(6, temperature=0.0, bad_words=(tuple(free[1:4]), (free[0],)))
    a, b = bench.add("a", prompt, params), bench.add("b", prompt_of(9), greedy(12))
    bench.run()
    assert bench.outcome("a") == alone(a)
    assert bench.outcome("a").tokens != free
    assert bench.outcome("b") == alone(b)


def test_slots_are_reloaded_for_penalties() -> None:
    bench = CoreBench(max_num_seqs=2)
    requests = []
    for i in range(5):
        bias = ((3, 1.0 + i), (9, -4.0)) if i % 2 else ()
        params = SamplingParams(
            7, temperature=0.0, logit_bias=bias, presence_penalty=0.5 * i, repetition_penalty=1.0 + i / 16
        )
        requests.append(bench.add(f"{i}", prompt_of(20, i), params))
    bench.run()
    assert [name for name, _ in bench.runner.calls].count("adjust") == 4  # the first adjusts nothing
    for request in requests:
        assert bench.outcome(request.id) == alone(request)


def test_preempted_request_restores_penalty_counts() -> None:
    bench = CoreBench(pages=4, max_model_len=192)
    params = SamplingParams(70, temperature=0.0, frequency_penalty=1.0)
    requests = [bench.add(f"{i}", prompt_of(30 + i, i), params) for i in range(3)]
    bench.run()
    assert [name for name, _ in bench.runner.calls].count("adjust") > 3
    for request in requests:
        assert bench.outcome(request.id) == alone(request, 192)


@pytest.mark.parametrize("length", [250, 255, 256])
def test_max_model_len_finishes_request(length: int) -> None:
    bench = CoreBench(max_model_len=256)
    a = bench.add("a", prompt_of(length), greedy(1000))
    bench.run()
    assert len(bench.outcome("a").tokens) == 256 - length
    assert bench.outcome("a") == alone(a, 256)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_small_pool_keeps_outcomes(prefix_caching: bool) -> None:
    outcomes = []
    for pages in (40, 4):
        bench = CoreBench(pages=pages, max_model_len=192, prefix_caching=prefix_caching)
        for i in range(4):
            bench.add(f"{i}", prompt_of(30 + 20 * i, i), greedy(60, prompt_logprobs=True))
        bench.run()
        outcomes.append([bench.outcome(f"{i}") for i in range(4)])
        scored = sum(live for name, live in bench.runner.calls if name == "score")
        assert scored == sum(29 + 20 * i for i in range(4))  # computed again, but not scored again
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("steps", range(5))
def test_abort_in_every_state(steps: int) -> None:
    bench = CoreBench(max_num_seqs=1)
    a = bench.add("a", prompt_of(100), greedy(50, prompt_logprobs=True))
    b = bench.add("b", prompt_of(20), greedy(2))
    for _ in range(steps):
        bench.step()
    states = [RequestStatus.WAITING, RequestStatus.PREFILL, *[RequestStatus.DECODE] * 3]
    assert a.status is states[steps]
    emitted = bench.core.abort("a")
    assert emitted is not None
    assert emitted[1].finish_reason is FinishReason.ABORT
    assert emitted[1].prompt_logprobs is None
    assert a.pages == []
    bench.core.scheduler.check()
    assert bench.core.abort("a") is None
    num_events = len(bench.events["a"])
    bench.run()
    assert bench.outcome("b") == alone(b)
    assert len(bench.events["a"]) == num_events == max(0, steps - 2)


def test_nan_of_output_fails_only_its_request(bench: CoreBench) -> None:
    a, b = bench.add("a", prompt_of(9, 1), greedy(6)), bench.add("b", prompt_of(9, 2), greedy(6))
    bench.runner.nan_token = alone(a).tokens[2]
    assert bench.runner.nan_token not in alone(b).tokens + alone(a).tokens[:2]
    bench.run()
    last = bench.events["a"][-1]
    assert (last.finish_reason, last.error) == (
        FinishReason.ERROR,
        "the model computed a log-probability that is not a number",
    )
    assert len(bench.events["a"]) == 3
    assert bench.outcome("b") == alone(b)


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_nan_of_prompt_fails_first_event(bench: CoreBench, max_tokens: int) -> None:
    a = bench.add("a", prompt_of(9), greedy(max_tokens, prompt_logprobs=True))
    bench.runner.nan_token = a.prompt_token_ids[4]
    assert bench.runner.nan_token not in alone(a).tokens
    bench.run()
    (event,) = bench.events["a"]
    assert event.finish_reason is FinishReason.ERROR
    assert event.error is not None
    assert a.status is RequestStatus.FINISHED


@pytest.mark.parametrize("name", ["prefill", "score", "decode", "read"])
def test_fail_all_keeps_waiting_requests(name: str) -> None:
    bench = CoreBench(max_num_seqs=2)
    bench.add("a", prompt_of(9, 1), greedy(6, prompt_logprobs=True))
    bench.step()
    bench.add("b", prompt_of(9, 2), greedy(6, prompt_logprobs=True))
    c = bench.add("c", prompt_of(9, 3), greedy(6, prompt_logprobs=True))
    bench.runner.fail_once(name)
    bench.fail()
    assert bench.runner.resets == 1
    for failed in ("a", "b"):
        last = bench.events[failed][-1]
        assert (last.finish_reason, last.error, last.token_ids) == (FinishReason.ERROR, "it failed", [])
    assert c.status is RequestStatus.WAITING
    d = bench.add("d", prompt_of(9, 4), greedy(6))
    bench.run()
    assert bench.outcome("c") == alone(c)
    assert bench.outcome("d") == alone(d)


def test_fail_all_with_inconsistent_pool(bench: CoreBench) -> None:
    bench.add("a", prompt_of(150, 1), greedy(6))
    bench.step()

    def corrupt(_: str) -> None:
        bench.core._pool._ref_counts.clear()
        bench.core.scheduler._slots.append(0)
        bench.runner.before_call = lambda _: None
        raise InjectedError

    bench.runner.before_call = corrupt
    bench.fail()
    b = bench.add("b", prompt_of(150, 2), greedy(6))
    bench.run()
    assert bench.outcome("b") == alone(b)


def test_step_waits_for_previous_chunk(bench: CoreBench) -> None:
    bench.add("a", prompt_of(400), greedy(1))
    for _ in range(6):
        bench.step()
    names = [name for name, _ in bench.runner.calls]
    assert names == ["prefill", *["prefill", "read"] * 5]


def test_nan_unregisters_pages(bench: CoreBench) -> None:
    a = bench.add("a", prompt_of(150), greedy(1, prompt_logprobs=True))
    bench.runner.nan_token = a.prompt_token_ids[140]
    bench.run()
    assert bench.events["a"][-1].finish_reason is FinishReason.ERROR
    bench.runner.nan_token = None
    b = bench.add("b", prompt_of(150), greedy(1, prompt_logprobs=True))
    bench.run()
    assert bench.events["b"][0].cached_tokens == 0
    assert bench.outcome("b") == alone(b)


@pytest.mark.parametrize("bad_words", [(), ((1, 2),)])
@pytest.mark.parametrize("length", [60, 64, 70])
def test_nan_of_output_leaves_no_page_in_the_cache(bench: CoreBench, length: int, bad_words: Any) -> None:
    """Pages are indexed a step after they were filled: also those of a step that is read first, as for bad words."""
    a = bench.add("a", prompt_of(length), replace(greedy(8), bad_words=bad_words))
    outputs = alone(a)
    bench.runner.nan_token = outputs.tokens[4]
    bench.run()
    assert bench.events["a"][-1].finish_reason is FinishReason.ERROR
    bench.runner.nan_token = None
    b = bench.add("b", [*prompt_of(length), *outputs.tokens[:4], 3], greedy(2))
    bench.run()
    assert bench.events["b"][0].cached_tokens == 0
    assert bench.outcome("b") == alone(b)


def test_fail_all_clears_cache(bench: CoreBench) -> None:
    bench.add("a", prompt_of(150), greedy(1, prompt_logprobs=True))
    bench.run()
    bench.add("b", prompt_of(9), greedy(4))
    bench.runner.fail_once("decode")
    bench.fail()
    c = bench.add("c", prompt_of(150), greedy(1, prompt_logprobs=True))
    bench.run()
    assert bench.events["c"][0].cached_tokens == 0
    assert bench.outcome("c") == alone(c)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_fail_all_delivers_requests_finished_in_failed_step(bench: CoreBench, max_tokens: int) -> None:
    bench.add("a", prompt_of(9, 1), greedy(6))
    bench.step()
    b = bench.add("b", prompt_of(9, 2), greedy(max_tokens, prompt_logprobs=True))
    bench.step()
    bench.runner.fail_once("read", after=2)  # the step's decode of a and b is read after b's log-probs
    bench.step()
    bench.fail()
    assert bench.outcome("b") == alone(b)
    assert bench.outcome("a").reason is FinishReason.ERROR
    bench.run()
    assert len(bench.events["b"]) == 1


def test_fail_all_keeps_preempted_request() -> None:
    bench = CoreBench(pages=4, max_model_len=192)
    a = bench.add("a", prompt_of(60, 1), greedy(100))
    b = bench.add("b", prompt_of(50, 2), greedy(60, prompt_logprobs=True))
    while not b.output_token_ids or b.status is not RequestStatus.WAITING:
        bench.step()
    bench.runner.fail_once("decode")
    bench.fail()
    assert a.status is RequestStatus.FINISHED
    bench.run()
    assert bench.outcome("b") == alone(b, 192)


def test_in_flight_is_false_when_idle(bench: CoreBench) -> None:
    bench.add("a", [5], greedy(1))
    in_flight = []
    for _ in range(3):  # dispatches a step, reads it, has nothing to do
        bench.step()
        in_flight.append(bench.core.in_flight)
    assert in_flight == [True, True, False]
