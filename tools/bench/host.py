"""Host times of a decode step and of decisions: the engine with a runner that computes nothing."""

import asyncio
import statistics
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compiled.shapes import make_buckets
from compiled.state import (
    MAX_REQUESTED_IDS,
    DecodeInput,
    PageCopies,
    SamplingArrays,
    ScoreInput,
    SlotPenalties,
    StepInput,
    StepOutput,
)
from model.kv_cache import PAGE_SIZE
from model.token_logprobs import TokenLogprobs
from model.weights.source import default_model_path
from serve.engine.core import EngineCore
from serve.engine.engine import Engine
from serve.engine.request import EngineLimits, EngineOptions, Request, SamplingParams
from serve.engine.request_state import RequestState
from serve.jobs.decide import Decider
from serve.jobs.request_queue import RequestQueue
from serve.server.model_files import local_tokenizer
from serve.text.chat import ChatFormat
from serve.text.decisions.plan import DecisionFormat
from serve.text.decisions.questions import ScoringOptions, decision_request

_CONTEXT = 4096  # tokens
_PROMPT = 512
_STEPS = 500
_STATE = 120  # numbered cases in a state for decisions, of 5 tokens each
_ROUNDS = 5


class NullRunner:
    """A `serve.engine.core.Runner` that returns the same token immediately."""

    def __init__(self, *, rows: int, vocab_size: int, max_logprobs: int) -> None:
        self.buckets = make_buckets(max_num_seqs=rows, max_model_len=_CONTEXT, max_num_batched_tokens=256 + rows)
        self.pages = rows * self.buckets.pages_per_row + 1
        self.vocab_size = vocab_size
        self.max_logprobs = max_logprobs
        self._numbers = {size: _numbers(size, max_logprobs) for size in (*self.buckets.decode_rows, 64)}

    def copy_pages(self, copies: PageCopies) -> None:
        """Do nothing."""

    def prefill(self, inputs: StepInput) -> Any:
        """Do nothing."""

    def set_penalties(self, slot: int, adjustment: SlotPenalties) -> None:
        """Do nothing."""

    def decode(self, _: DecodeInput, sampling: SamplingArrays) -> StepOutput:
        """Return token 5 for each row."""
        rows = len(sampling.step)
        logprobs = self._numbers[rows]
        return StepOutput(np.full(rows, 5, np.int32), logprobs, logprobs, np.zeros(rows, np.float32))

    def score(self, inputs: ScoreInput) -> TokenLogprobs:
        """Return zeros."""
        return self._numbers[len(inputs.cache_indices)]

    def read_experts(self, pages: NDArray[np.int32]) -> Any:
        """No experts."""
        raise NotImplementedError

    def read(self, tree: Any) -> Any:
        """Return `tree`."""
        return tree

    def full_vocab_logprobs(self, places: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return zeros [M, V]."""
        return np.zeros((len(places), self.vocab_size), np.float32)

    def reset(self) -> None:
        """Do nothing."""


def host_ms_per_step(
    *, rows: int = 16, vocab_size: int = 151_936, max_logprobs: int = 20, requested_ids: int = 0
) -> float:
    """Return the median milliseconds of schedule, batch, read and events for a decode step of `rows` sampled requests.

    `requested_ids`: logprob_token_ids per request; 0 uses the top k, which every step returns.
    """
    runner = NullRunner(rows=rows, vocab_size=vocab_size, max_logprobs=max_logprobs)
    core = EngineCore(runner, max_model_len=_CONTEXT, max_num_batched_tokens=256 + rows)
    params = SamplingParams(_CONTEXT - _PROMPT, temperature=1.0, top_p=0.9, requested_ids=tuple(range(requested_ids)))
    for i in range(rows):
        core.add(RequestState(Request(f"{i}", [i] * _PROMPT, params)))
    while len(core.step()) < rows:  # prefill all prompts
        pass
    seconds = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        emitted = core.step()
        seconds.append(time.perf_counter() - start)
        assert len(emitted) == rows
    return 1e3 * statistics.median(seconds)


def host_ms_of_decisions(*, questions: int = 100, rows: int = 16) -> tuple[float, float]:
    """Return the median milliseconds of the first question on a state of 600 tokens, and of each further one.

    From the parsed JSON to the decisions: prompts of the default model, the engine and its thread, probabilities.
    """
    decisions = DecisionFormat(ChatFormat(local_tokenizer(default_model_path())))
    runner = NullRunner(rows=rows, vocab_size=49_152, max_logprobs=20)
    limits = EngineLimits(
        max_model_len=_CONTEXT,
        max_logprobs=runner.max_logprobs,
        vocab_size=runner.vocab_size,
        cache_tokens=(runner.pages - 1) * PAGE_SIZE,
        max_requested_ids=MAX_REQUESTED_IDS,
        full_vocab=False,
    )
    engine = Engine(runner, limits, EngineOptions(max_num_batched_tokens=256 + rows, max_num_queued_reqs=512))
    engine.start()

    async def seconds(count: int, number: int) -> float:
        state = " ".join(f"case {100 + number + i}" for i in range(_STATE))
        criteria = dict.fromkeys(("first", "second", "third", "fourth"))
        asked = {
            f"{i}": {"type": "choice", "instructions": f"Which fits case {i} best?", "criteria": criteria}
            for i in range(count)
        }
        start = time.perf_counter()
        decider = Decider(RequestQueue(engine, 4 * rows, 2**17), limits)
        request = decision_request({"state": state, "questions": asked})
        results = await decider.run(decisions.plan(request, ScoringOptions(), decider.max_prompt_tokens))
        elapsed = time.perf_counter() - start
        assert len(results) == count
        return elapsed

    async def rounds(count: int, first: int) -> float:
        return 1e3 * statistics.median([await seconds(count, first + i) for i in range(_ROUNDS)])

    async def measured() -> tuple[float, float]:
        await seconds(questions, 0)  # imports, and fills the tokenizer's caches
        one = await rounds(1, 1)
        return one, (await rounds(questions, 1 + _ROUNDS) - one) / (questions - 1)

    try:
        return asyncio.run(measured())
    finally:
        engine.stop()


def _numbers(rows: int, k: int) -> TokenLogprobs:
    return TokenLogprobs(
        logprob=np.zeros(rows, np.float32),
        rank=np.ones(rows, np.int32),
        top_ids=np.zeros((rows, k), np.int32),
        top_logprobs=np.zeros((rows, k), np.float32),
        requested_logprobs=np.zeros((rows, MAX_REQUESTED_IDS), np.float32),
        requested_ranks=np.zeros((rows, MAX_REQUESTED_IDS), np.int32),
    )
