"""Random requests through EngineCore and a fake runner: the pool stays consistent, and outcomes do not change."""

from dataclasses import dataclass, replace
from random import Random

import pytest

from serve.engine.request import FinishReason, PromptScoring, SamplingParams
from serve.engine.request_state import RequestState
from tests.support.fake_runner import VOCAB_SIZE, CoreBench, InjectedError, alone, prompt_of

STEPS = 10_000
MAX_MODEL_LEN = 256


@dataclass(slots=True)
class Crowd:
    """Random requests that share prefixes, fail and are aborted."""

    random: Random
    bench: CoreBench
    requests: list[RequestState]
    num_finished: int = 0
    shared: int = 0
    failures: int = 0

    def prompt(self) -> list[int]:
        """A shared prefix and a suffix of its own; or prompt and output of an earlier request."""
        if self.num_finished and self.random.random() < 0.2:
            other = self.requests[self.random.randrange(max(0, self.num_finished - 8), self.num_finished)]
            return [*other.prompt_token_ids, *other.output_token_ids][: MAX_MODEL_LEN - 1]
        length = self.random.choice(
            (self.random.randint(1, 12), self.random.randint(60, 70), self.random.randint(1, 180))
        )
        common = prompt_of(180, self.random.randint(0, 3))[: self.random.choice((0, 63, 64, 65, 128, 180))]
        own = prompt_of(length, self.random.randint(0, 9))
        return [*common, *own][:length] if self.random.random() < 0.3 else [*common[:length], *own][: MAX_MODEL_LEN - 1]

    def params(self, prompt: list[int]) -> SamplingParams:
        random = self.random
        scoring = None
        if random.random() < 0.5 and len(prompt) > 1:
            scoring = PromptScoring(random.choice((1, random.randint(1, len(prompt) - 1))))
            if random.random() < 0.2:
                scoring = replace(scoring, requested_ids=tuple(random.sample(range(VOCAB_SIZE), random.randint(1, 5))))
        params = SamplingParams(
            max_tokens=random.choice((0, 1, random.randint(0, 80))),
            temperature=random.choice((0.0, 1.0)),
            seed=random.getrandbits(64),
            min_tokens=random.choice((0, 0, 2, 10)),
            stop_token_ids=frozenset(random.sample(range(VOCAB_SIZE), random.randint(0, 5))),
            prompt=scoring,
        )
        if random.random() < 0.2:
            params = replace(params, frequency_penalty=1.0, logit_bias=((random.randrange(VOCAB_SIZE), 5.0),))
        if random.random() < 0.2:
            params = replace(params, bad_words=(tuple(random.choices(range(VOCAB_SIZE), k=random.randint(1, 2))),))
        if random.random() < 0.2:
            params = replace(params, allowed_token_ids=frozenset(range(20, VOCAB_SIZE, 2)))
        if random.random() < 0.2:
            params = replace(params, requested_ids=(1, 50))
        return params

    def arrive(self) -> None:
        prompt = self.prompt()
        salt = self.random.choice(("", "", "", "other"))
        priority = self.random.choice((0, 0, 0, -1, 3))
        name = f"{len(self.requests)}"
        self.requests.append(self.bench.add(name, prompt, self.params(prompt), priority=priority, cache_salt=salt))

    def step(self) -> None:
        """A step; sometimes a request arrives or is aborted, or the device fails."""
        unfinished = self.bench.core.scheduler
        if self.random.random() < 0.15 and unfinished.num_requests < 12:
            self.arrive()
        if self.random.random() < 0.02 and unfinished.num_requests:
            leaves = self.random.choice([*unfinished.running, *unfinished.waiting])
            emitted = self.bench.core.abort(leaves.id)
            self.bench.take([] if emitted is None else [emitted])
        if self.random.random() < 0.001:
            self.bench.runner.fail_once(self.random.choice(("prefill", "decode", "score", "read", "adjust")))
        try:
            self.bench.step()
        except InjectedError:
            self.failures += 1
            self.bench.take(self.bench.core.fail_all("it failed"))
        unfinished.check()

    def check_finished(self) -> None:
        """Each finished request has the outcome that it has alone, up to its abort."""
        for request in self.requests[self.num_finished :]:
            events = self.bench.events[request.id]
            if not events or events[-1].finish_reason is None:
                return
            self.num_finished += 1
            start = request.params.prompt.start if request.params.prompt else 1
            outcome, expected = self.bench.outcome(request.id, start), alone(request, MAX_MODEL_LEN)
            self.shared += bool(events[0].cached_tokens)
            if outcome.reason in (FinishReason.ABORT, FinishReason.ERROR):
                n = len(outcome.tokens)
                assert (outcome.tokens, outcome.logprobs) == (expected.tokens[:n], expected.logprobs[:n])
            else:
                assert outcome == expected


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "pages", "rows"), [(1, 40, 4), (2, 6, 4), (3, 9, 2), (4, 5, 1)])
def test_random_requests_keep_outcomes(seed: int, pages: int, rows: int) -> None:
    bench = CoreBench(pages=pages, max_num_seqs=rows, max_model_len=MAX_MODEL_LEN)
    crowd = Crowd(Random(seed), bench, [])
    for _ in range(STEPS):
        crowd.step()
        crowd.check_finished()
    bench.runner.before_call = lambda _: None
    bench.run()
    crowd.check_finished()
    assert crowd.num_finished == len(crowd.requests) > 50
    assert crowd.shared
    assert crowd.failures
