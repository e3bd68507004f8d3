"""EngineCore through a fake runner: whatever happens around a request, it is told what it is told alone."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.request import FinishReason, Request, RequestStatus, SamplingParams
from tests.serve.fake_runner import VOCAB_SIZE, CoreBench, alone, greedy, hidden_after, next_token, prompt_of


def test_a_prompt_in_chunks_then_one_token_a_step() -> None:
    bench = CoreBench()
    bench.add("a", prompt_of(150), greedy(3))
    bench.run()
    assert bench.runner.calls == [
        ("prefill", 64),
        ("prefill", 64),
        ("prefill", 22),
        ("sample", 1),
        ("decode", 1),
        ("decode", 1),
    ]
    assert [event.token_ids for event in bench.events["a"]] == [[token] for token in bench.outcome("a").tokens]


def test_prefill_and_decode_take_turns() -> None:
    bench = CoreBench()
    a = bench.add("a", [5], greedy(4))
    bench.step()
    b = bench.add("b", prompt_of(100), greedy(2))
    bench.runner.calls.clear()
    bench.run()
    assert bench.runner.calls == [
        *(("prefill", 64), ("decode", 1)),
        *(("prefill", 36), ("sample", 1), ("decode", 1)),
        ("decode", 2),
    ]
    assert bench.outcome("a") == alone(a)
    assert bench.outcome("b") == alone(b)


def test_the_prompt_is_scored_in_blocks_across_chunks() -> None:
    bench = CoreBench()
    a = bench.add("a", prompt_of(70), greedy(2, prompt_logprobs=True))
    bench.run()
    # 64 rows of the first chunk and 5 of the second: the last token has no successor.
    assert [live for name, live in bench.runner.calls if name == "score"] == [8] * 8 + [5]
    assert bench.outcome("a") == alone(a)
    assert bench.events["a"][0].prompt_scores is not None


def test_rows_of_several_prompts_share_a_block() -> None:
    bench = CoreBench()
    requests = [bench.add(f"{i}", prompt_of(4, i), greedy(1, prompt_logprobs=True)) for i in range(4)]
    bench.run()
    assert [live for name, live in bench.runner.calls if name == "score"] == [8, 4]
    for request in requests:
        assert bench.outcome(request.id) == alone(request)


@pytest.mark.parametrize("length", [1, 2, 64, 65, 200])
@pytest.mark.parametrize("scored", [False, True])
def test_no_tokens_wanted(length: int, scored: bool) -> None:
    bench = CoreBench()
    a = bench.add("a", prompt_of(length), greedy(0, prompt_logprobs=scored))
    bench.run()
    assert bench.outcome("a") == alone(a)
    (event,) = bench.events["a"]
    assert (event.token_ids, event.finish_reason) == ([], FinishReason.LENGTH)
    assert not {"sample", "decode"} & {name for name, _ in bench.runner.calls}
    if scored:
        assert event.prompt_scores is not None
        assert len(event.prompt_scores.rank) == length - 1


def test_a_stop_id_ends_the_request_and_min_tokens_puts_it_off() -> None:
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


@pytest.mark.parametrize("length", [250, 255, 256])
def test_the_models_length_ends_a_request(length: int) -> None:
    bench = CoreBench(max_model_len=256)
    a = bench.add("a", prompt_of(length), greedy(1000))
    bench.run()
    assert len(bench.outcome("a").tokens) == max(1, 256 - length)
    assert bench.outcome("a") == alone(a, 256)


def test_a_tiny_pool_changes_no_number() -> None:
    outcomes = []
    for pages in (40, 4):
        bench = CoreBench(pages=pages, max_model_len=192)
        for i in range(4):
            bench.add(f"{i}", prompt_of(30 + 20 * i, i), greedy(60, prompt_logprobs=True))
        bench.run()
        outcomes.append([bench.outcome(f"{i}") for i in range(4)])
        scored = sum(live for name, live in bench.runner.calls if name == "score")
        assert scored == sum(29 + 20 * i for i in range(4))  # computed again, but not scored again
        computed = sum(live for name, live in bench.runner.calls if name == "prefill")
        assert (computed > sum(30 + 20 * i for i in range(4))) == (pages == 4)
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
    assert emitted[1].prompt_scores is None
    assert bench.core.abort("a") is None
    bench.run()
    assert bench.outcome("b") == alone(b)
    assert len(bench.events["a"]) == max(0, steps - 1)


def test_a_generated_nan_is_an_error_of_that_request_alone() -> None:
    bench = CoreBench()
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
def test_a_nan_in_the_prompts_scores_is_an_error_in_the_first_event(max_tokens: int) -> None:
    bench = CoreBench()
    a = bench.add("a", prompt_of(9), greedy(max_tokens, prompt_logprobs=True))
    bench.runner.nan_token = a.prompt_token_ids[4]
    assert bench.runner.nan_token not in alone(a).tokens
    bench.run()
    (event,) = bench.events["a"]
    assert event.finish_reason is FinishReason.ERROR
    assert event.error is not None
    assert a.status is RequestStatus.FINISHED


@pytest.mark.parametrize("name", ["prefill", "score", "sample", "decode"])
def test_a_failed_step_ends_the_running_and_spares_the_waiting(name: str) -> None:
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


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_request_that_ended_in_the_step_that_failed_is_told_so(max_tokens: int) -> None:
    bench = CoreBench()
    bench.add("a", prompt_of(9, 1), greedy(6))
    bench.step()
    b = bench.add("b", prompt_of(9, 2), greedy(max_tokens, prompt_logprobs=True))
    bench.runner.fail_once("decode")
    bench.fail()
    assert bench.outcome("b") == alone(b)
    assert bench.outcome("a").reason is FinishReason.ERROR
    bench.run()
    assert len(bench.events["b"]) == 1


def test_a_failure_is_survived_by_one_that_waits_after_preemption() -> None:
    bench = CoreBench(pages=3, max_model_len=128)
    a = bench.add("a", prompt_of(60, 1), greedy(50))
    b = bench.add("b", prompt_of(10, 2), greedy(60, prompt_logprobs=True))
    for _ in range(6):  # a's 65th token takes the only page of b
        bench.step()
    assert b.status is RequestStatus.WAITING
    assert len(b.output_token_ids) == 4
    bench.runner.fail_once("decode")
    bench.fail()
    assert a.status is RequestStatus.FINISHED
    bench.run()
    assert bench.outcome("b") == alone(b, 128)


@dataclass(frozen=True)
class Case:
    """A random request: when it comes, and when its client goes, in steps."""

    prompt: list[int]
    params: SamplingParams
    arrival: int
    leaves_after: int | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    length = draw(st.one_of(st.integers(1, 10), st.integers(60, 70), st.integers(1, 180)))
    stops = draw(st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=6))
    params = SamplingParams(
        max_tokens=draw(st.one_of(st.integers(0, 3), st.integers(0, 80))),
        temperature=draw(st.sampled_from((0.0, 1.0))),
        seed=draw(st.integers(0, 2**64 - 1)),
        min_tokens=draw(st.sampled_from((0, 0, 2, 10))),
        stop_token_ids=stops,
        prompt_logprobs=draw(st.booleans()),
    )
    leaves = draw(st.one_of(st.none(), st.none(), st.integers(0, 60)))
    return Case(prompt_of(length, draw(st.integers(0, 9))), params, draw(st.integers(0, 40)), leaves)


@settings(max_examples=100, deadline=None)
@given(everyone=st.lists(cases(), min_size=1, max_size=9), pages=st.integers(5, 14), rows=st.sampled_from((1, 2, 4)))
def test_any_crowd_in_any_pool(everyone: list[Case], pages: int, rows: int) -> None:
    bench = CoreBench(pages=pages, max_num_seqs=rows, max_model_len=256)
    requests: dict[int, Request] = {}
    now = 0
    while len(requests) < len(everyone) or bench.core.scheduler.num_requests:
        for i, case in enumerate(everyone):
            if case.arrival == now:
                requests[i] = bench.add(f"{i}", case.prompt, case.params)
            if case.leaves_after is not None and case.arrival + case.leaves_after == now:
                emitted = bench.core.abort(f"{i}")
                bench.take([] if emitted is None else [emitted])
        bench.step()
        now += 1
        assert now < 3000
    for request in requests.values():
        outcome, expected = bench.outcome(request.id), alone(request, 256)
        if outcome.reason is FinishReason.ABORT:
            n = len(outcome.tokens)
            assert (outcome.tokens, outcome.scores) == (expected.tokens[:n], expected.scores[:n])
        else:
            assert outcome == expected
