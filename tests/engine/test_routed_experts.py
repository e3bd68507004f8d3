"""The experts of prompt and output with a fake runner: cached, chunked, preempted and cut off."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.engine.request import SamplingParams, TokenEvent
from serve.engine.request_state import RequestState
from tests.support.fake_runner import CoreBench, alone, experts_after, greedy, prompt_of

ALL = replace(greedy(5), experts_start=0)


def experts_of(events: list[TokenEvent]) -> NDArray[np.int16]:
    """Those of all events; the first may also have the prompt's."""
    parts = [event.experts for event in events if event.experts is not None]
    for event, part in zip(events[1:], parts[1:], strict=True):
        assert len(part) == len(event.token_ids)
    return np.concatenate(parts)


def check(bench: CoreBench, name: str, request: RequestState) -> None:
    outcome = bench.outcome(name)
    assert outcome == alone(request)
    tokens = [*request.prompt_token_ids, *outcome.tokens][:-1]
    states = np.cumsum(np.asarray(tokens) + 1)
    expected = experts_after(states)[request.params.experts_start :]
    np.testing.assert_array_equal(experts_of(bench.events[name]), expected)


@pytest.mark.parametrize("length", [1, 2, 64, 65, 66, 200])
@pytest.mark.parametrize("max_tokens", [0, 1, 70])
def test_experts_of_prompt_and_output(bench: CoreBench, length: int, max_tokens: int) -> None:
    request = bench.add("a", prompt_of(length), replace(ALL, max_tokens=max_tokens))
    bench.run()
    if length == 1 and not max_tokens:
        assert bench.events["a"][0].experts is None
    else:
        check(bench, "a", request)


def test_experts_are_not_read_unless_requested(bench: CoreBench) -> None:
    bench.add("a", prompt_of(100), greedy(3))
    bench.run()
    assert all(event.experts is None for event in bench.events["a"])
    assert "experts" not in {name for name, _ in bench.runner.calls}


def test_experts_of_cached_prompts(bench: CoreBench) -> None:
    """Of shared pages, and of one that starts with a copy."""
    bench.add("a", prompt_of(200), greedy(3))
    bench.run()
    requests = {
        "same": bench.add("same", prompt_of(200), ALL),
        "other end": bench.add("other end", [*prompt_of(200)[:180], *prompt_of(20)], ALL),
        "shorter": bench.add("shorter", prompt_of(200)[:100], replace(ALL, max_tokens=0)),
    }
    bench.run()
    for name, request in requests.items():
        assert bench.events[name][0].cached_tokens > 64
        check(bench, name, request)


@pytest.mark.parametrize("start", [1, 63, 64, 100, 198, 199])
@pytest.mark.parametrize("max_tokens", [1, 4])
def test_experts_from_a_token_on(bench: CoreBench, start: int, max_tokens: int) -> None:
    params = SamplingParams(max_tokens, temperature=0.0, experts_start=start)
    for name in "ab":
        request = bench.add(name, prompt_of(200), params)
        bench.run()
        check(bench, name, request)


def test_experts_of_long_prompts_are_read_in_parts() -> None:
    bench = CoreBench(max_model_len=2048)
    request = bench.add("a", prompt_of(1500), replace(ALL, experts_start=70))
    bench.run()
    assert [live for name, live in bench.runner.calls if name == "experts"] == [16, 7]
    tokens = [*request.prompt_token_ids, *bench.outcome("a").tokens][:-1]
    expected = experts_after(np.cumsum(np.asarray(tokens) + 1))[70:]
    np.testing.assert_array_equal(experts_of(bench.events["a"]), expected)


def test_experts_of_preempted_requests_come_once() -> None:
    bench = CoreBench(pages=6)
    requests = {
        name: bench.add(name, prompt_of(60, seed), replace(ALL, max_tokens=100)) for seed, name in enumerate("abc")
    }
    bench.run()
    assert sum(request.num_preemptions for request in requests.values()) > 0
    for name, request in requests.items():
        check(bench, name, request)
