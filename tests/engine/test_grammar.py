"""Grammars in the engine: outcomes are those of one token after another, whatever is forced and whatever else runs."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serve.engine.request import FinishReason, PromptScoring, SamplingParams
from tests.support.fake_runner import (
    VOCAB_SIZE,
    CoreBench,
    alone,
    hidden_after,
    logmass,
    processed_numbers,
    prompt_of,
)
from tests.support.grammars import FakeGrammar, hashed, sequence

ALL = range(VOCAB_SIZE)
MANY = (4, 30, 31, 32, 96)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps wait for all masks, those of new requests included, so that their rows do not depend on the machine."""
    monkeypatch.setattr("serve.engine.mask_updates._MAX_WAIT", 60)
    monkeypatch.setattr("serve.engine.mask_updates._decodes", lambda _: True)


def constrained(grammar: FakeGrammar, max_tokens: int = 12, **values: Any) -> SamplingParams:
    return SamplingParams(max_tokens, grammar=grammar, **{"temperature": 0.0, **values})


def decode_calls(bench: CoreBench) -> list[int]:
    """Rows of each decode step."""
    return [live for name, live in bench.runner.calls if name == "decode"]


VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 2**40 + 3},
    "penalties": {"temperature": 1.0, "seed": 3, "frequency_penalty": 1.0, "repetition_penalty": 2.0},
    "bias": {"logit_bias": ((3, 8.0),)},
    "stop ids": {"stop_token_ids": frozenset(range(0, VOCAB_SIZE, 7))},
    "min_tokens": {"min_tokens": 5, "stop_token_ids": frozenset(range(0, VOCAB_SIZE, 23))},
    "requested ids": {"requested_ids": (1, 40)},
    "prompt": {"prompt": PromptScoring()},
    "bad words": {"bad_words": ((5,), (6, 7))},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("companions", [0, 2])
def test_outcome_equals_one_token_after_another(name: str, companions: int) -> None:
    bench = CoreBench()
    requests = []
    for seed in range(6):
        params = constrained(hashed(VOCAB_SIZE, seed=seed), 40, **VARIANTS[name])
        requests.append(bench.add(f"{seed}", prompt_of(20 + 9 * seed), params))
        for i in range(companions):
            plain = SamplingParams(30, seed=seed, temperature=1.0)
            requests.append(bench.add(f"{seed}.{i}", prompt_of(5, seed), plain))
    bench.run()
    for request in requests:
        if any(event.error for event in bench.events[request.id]):
            continue  # the other constraints allowed nothing of what the grammar allowed
        assert bench.outcome(request.id) == alone(request)
    assert not all(event.error for request in requests for event in bench.events[request.id][-1:])
    if name in ("greedy", "sampled"):
        assert any(len(event.token_ids) > 1 for request in requests for event in bench.events[request.id])


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_preempted_request_continues_its_grammar(prefix_caching: bool) -> None:
    bench = CoreBench(pages=12, prefix_caching=prefix_caching)
    requests = [
        bench.add(f"{i}", prompt_of(100, i), constrained(hashed(VOCAB_SIZE, seed=i), 200, temperature=1.0, seed=i))
        for i in range(4)
    ]
    bench.run()
    assert sum(request.num_preemptions for request in requests) > 0
    for request in requests:
        assert bench.outcome(request.id) == alone(request)


def test_forced_tokens_and_the_one_after_share_a_step(bench: CoreBench) -> None:
    a = bench.add("a", prompt_of(10), constrained(sequence(7, 8, then=MANY), 4))
    bench.run()
    assert decode_calls(bench) == [3, 1]
    assert [len(event.token_ids) for event in bench.events["a"]] == [3, 1]
    assert [event.forced for event in bench.events["a"]] == [[True, True, False], [False]]
    assert bench.outcome("a") == alone(a)


def test_forced_tokens_step_alone_in_a_full_batch() -> None:
    bench = CoreBench(max_num_seqs=2)
    grammar = sequence(7, 8, 9, then=MANY)
    requests = [bench.add(f"{i}", prompt_of(10, i), constrained(grammar, 5)) for i in range(2)]
    bench.run()
    assert decode_calls(bench) == [2] * 5
    for request in requests:
        assert bench.outcome(request.id) == alone(request)
        assert [event.forced for event in bench.events[request.id]] == [[True]] * 3 + [[False]] * 2


def test_penalties_count_forced_tokens_before_the_next_choice(bench: CoreBench) -> None:
    params = constrained(sequence(7, 8, then=ALL), 4, frequency_penalty=1.0)
    a = bench.add("a", prompt_of(10), params)
    bench.run()
    assert decode_calls(bench) == [2, 1, 1]
    assert bench.outcome("a") == alone(a)


def test_forced_stop_token_ends_the_run(bench: CoreBench) -> None:
    grammar = FakeGrammar(lambda before: ([7, 9] if len(before) < 2 else [50])[len(before) :][:1] or [50])
    a = bench.add("a", prompt_of(10), constrained(grammar, stop_token_ids=frozenset({50})))
    bench.run()
    assert [event.token_ids for event in bench.events["a"]] == [[7, 9, 50]]
    assert bench.outcome("a") == alone(a)
    assert bench.outcome("a").reason is FinishReason.STOP


def test_forced_tokens_end_at_max_tokens(bench: CoreBench) -> None:
    a = bench.add("a", prompt_of(10), constrained(sequence(*range(1, 20), then=MANY), 3))
    bench.run()
    assert [event.token_ids for event in bench.events["a"]] == [[1, 2, 3]]
    assert bench.outcome("a") == alone(a)


@pytest.mark.parametrize("length", [60, 62, 63, 64])
def test_forced_tokens_across_pages(bench: CoreBench, length: int) -> None:
    a = bench.add("a", prompt_of(length), constrained(sequence(*range(1, 12), then=MANY), 15))
    bench.run()
    assert bench.outcome("a") == alone(a)


def test_step_keeps_its_tokens_within_the_budget() -> None:
    bench = CoreBench(max_num_batched_tokens=20)
    bench.add("a", prompt_of(10), constrained(sequence(*range(1, 50), then=MANY), 60))
    bench.step()
    bench.add("b", prompt_of(60), constrained(hashed(VOCAB_SIZE), 3))
    for _ in range(3):
        bench.runner.calls.clear()
        bench.step()
        assert sum(live for name, live in bench.runner.calls if name in ("prefill", "decode")) <= 20


def test_mass_and_processed_logprobs_of_each_token(bench: CoreBench) -> None:
    grammar = sequence(7, 8, then=MANY)
    bench.add("a", prompt_of(10), constrained(grammar, 6, return_processed=True))
    bench.add("b", prompt_of(10), SamplingParams(6, temperature=0.0))
    bench.run()
    tokens = bench.outcome("a").tokens
    hidden = [hidden_after(prompt_of(10) + tokens[:i]) for i in range(6)]
    masks = np.zeros((6, 4), np.uint32)
    for i in range(6):
        for token in grammar.allowed(tokens[:i]):
            masks[i, token // 32] |= np.uint32(1 << token % 32)
    expected = processed_numbers(hidden, tokens, np.zeros((6, 0), np.int32))
    processed = [row for event in bench.events["a"] if event.processed for row in event.processed.logprob.tolist()]
    assert processed == expected.logprob.tolist()
    mass = [value for event in bench.events["a"] for value in event.allowed_mass.tolist()]
    assert mass == np.exp(logmass(masks)).tolist()
    assert len(set(mass)) == 2
    for event in bench.events["b"]:
        assert (event.processed, event.allowed_mass.tolist(), event.forced) == (None, [1.0], [False])


def test_other_constraints_can_force_a_token(bench: CoreBench) -> None:
    grammar = FakeGrammar(lambda _: {3, 4, 5})
    a = bench.add("a", [1], constrained(grammar, 3, allowed_token_ids=frozenset({4, 5, 60}), bad_words=((5,),)))
    bench.run()
    assert bench.outcome("a").tokens == [4, 4, 4]
    assert bench.outcome("a") == alone(a)
    assert len(bench.events["a"]) == 1


def message(before: Sequence[int]) -> str | None:
    return "the lexer is too complex" if len(before) == 2 else None


NOTHING = "the grammar and the other constraints of the request allow no token"


@pytest.mark.parametrize(
    ("grammar", "tokens", "error"),
    [
        (FakeGrammar(lambda _: MANY, error=message), 2, "the lexer is too complex"),
        (FakeGrammar(lambda before: [len(before)], error=message), 2, "the lexer is too complex"),  # forced
        (FakeGrammar(lambda _: MANY, error=lambda _: "it is wrong"), 0, "it is wrong"),
        (FakeGrammar(lambda before: MANY if len(before) < 3 else ()), 3, NOTHING),
        (FakeGrammar(lambda before: [9] if len(before) < 3 else ()), 3, NOTHING),
        (FakeGrammar(lambda _: ()), 0, NOTHING),
    ],
)
def test_grammar_error_ends_its_request(bench: CoreBench, grammar: FakeGrammar, tokens: int, error: str) -> None:
    bench.add("a", prompt_of(10), constrained(grammar))
    b = bench.add("b", prompt_of(10), SamplingParams(8, temperature=0.0))
    bench.run()
    events = bench.events["a"]
    assert sum(len(event.token_ids) for event in events) == tokens
    assert (events[-1].finish_reason, events[-1].error) == (FinishReason.ERROR, error)
    assert all(event.finish_reason is None for event in events[:-1])
    assert bench.outcome("b") == alone(b)


def test_grammar_that_raises_ends_its_request(bench: CoreBench, caplog: pytest.LogCaptureFixture) -> None:
    def fail(before: Sequence[int]) -> None:
        if len(before) == 3:
            raise BaseException("panic")  # as libraries in Rust raise

    bench.add("a", prompt_of(10), constrained(FakeGrammar(lambda _: MANY, before_fill=fail)))
    b = bench.add("b", prompt_of(10), SamplingParams(8, temperature=0.0))
    bench.run()
    assert bench.events["a"][-1].error == "the grammar failed"
    assert bench.outcome("b") == alone(b)
    assert "a grammar failed" in caplog.text


def test_request_that_waits_for_its_first_mask_gets_its_cached_page(
    bench: CoreBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.engine.mask_updates._MAX_WAIT", 0)
    bench.add("a", prompt_of(10), SamplingParams(3, temperature=0.0))
    bench.run()
    ready = threading.Event()
    grammar = FakeGrammar(lambda _: MANY, before_fill=lambda _: assert_set(ready))
    b = bench.add("b", prompt_of(10), constrained(grammar, 4, frequency_penalty=1.0))
    for _ in range(3):
        bench.step()  # copies the part of a page that the prompts share, and has no row yet
    ready.set()
    bench.run()
    assert bench.outcome("b") == alone(b)


def assert_set(event: threading.Event) -> None:
    assert event.wait(60)


@pytest.mark.parametrize("length", [0, 3])
def test_finished_grammar_without_a_stop_token_ends_the_text(bench: CoreBench, length: int) -> None:
    grammar = FakeGrammar(lambda _: MANY, ends=lambda before: len(before) == length)
    params = constrained(grammar, prompt=PromptScoring())
    a = bench.add("a", prompt_of(30), params)
    bench.run()
    expected = alone(replace(a.request, params=replace(params, max_tokens=length)))
    assert bench.outcome("a") == replace(expected, reason=FinishReason.STOP)


def test_slow_mask_does_not_stop_others(bench: CoreBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.engine.mask_updates._MAX_WAIT", 0)
    monkeypatch.setattr("serve.engine.mask_updates._SLOW", 0)
    released = threading.Event()

    def wait_once(before: Sequence[int]) -> None:
        if len(before) == 2:
            released.wait(60)

    grammar = FakeGrammar(lambda _: MANY, before_fill=wait_once)
    a = bench.add("a", prompt_of(10), constrained(grammar, 5))
    b = bench.add("b", prompt_of(10), SamplingParams(200, temperature=0.0))
    while len(bench.events["a"]) < 2:
        bench.step()
    while not bench.events["b"] or bench.events["b"][-1].finish_reason is None:
        bench.step()
    assert bench.outcome("b") == alone(b)
    assert len(bench.events["a"]) == 2
    assert bench.core.in_flight
    released.set()
    while bench.core.scheduler.num_requests:
        bench.step()
    assert bench.outcome("a") == alone(a)


@pytest.mark.parametrize(("slow", "expected"), [(60, [True, False, False, False]), (0, [True, True, True, True])])
def test_threads_compute_first_masks_and_those_after_a_slow_one(
    bench: CoreBench, monkeypatch: pytest.MonkeyPatch, slow: float, expected: list[bool]
) -> None:
    monkeypatch.setattr("serve.engine.mask_updates._SLOW", slow)
    on_other_thread = []

    def note_thread(_: Sequence[int]) -> None:
        on_other_thread.append(threading.current_thread() is not threading.main_thread())

    bench.add("a", prompt_of(10), constrained(FakeGrammar(lambda _: MANY, before_fill=note_thread), 4))
    bench.run()
    assert on_other_thread == expected


def test_abort_while_a_mask_is_computed(bench: CoreBench) -> None:
    released = threading.Event()

    def wait_for_release(_: Sequence[int]) -> None:
        released.wait(60)

    bench.add("a", prompt_of(10), constrained(FakeGrammar(lambda _: MANY, before_fill=wait_for_release)))
    bench.take([emitted for emitted in [bench.core.abort("a")] if emitted])
    assert bench.events["a"][-1].finish_reason is FinishReason.ABORT
    released.set()
    b = bench.add("b", prompt_of(10), constrained(hashed(VOCAB_SIZE)))
    bench.run()
    assert bench.outcome("b") == alone(b)


def test_failed_step_leaves_waiting_grammars(bench: CoreBench) -> None:
    requests = [bench.add(f"{i}", prompt_of(10), constrained(hashed(VOCAB_SIZE, seed=i))) for i in range(6)]
    bench.runner.fail_once("decode", after=2)
    bench.fail()
    bench.run()
    outcomes = [bench.events[request.id][-1].finish_reason for request in requests]
    assert FinishReason.ERROR in outcomes
    for request in requests[4:]:
        assert bench.outcome(request.id) == alone(request)
