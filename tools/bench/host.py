"""Host time of a step: the engine with a runner that computes nothing."""

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
from model.token_logprobs import TokenLogprobs
from serve.engine.core import EngineCore
from serve.engine.request import Request, SamplingParams
from serve.engine.request_state import RequestState

_CONTEXT = 4096  # tokens
_PROMPT = 512
_STEPS = 500


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
        return StepOutput(np.full(rows, 5, np.int32), self._numbers[rows])

    def score(self, inputs: ScoreInput) -> TokenLogprobs:
        """Return zeros."""
        return self._numbers[len(inputs.cache_indices)]

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


def _numbers(rows: int, k: int) -> TokenLogprobs:
    return TokenLogprobs(
        logprob=np.zeros(rows, np.float32),
        rank=np.ones(rows, np.int32),
        top_ids=np.zeros((rows, k), np.int32),
        top_logprobs=np.zeros((rows, k), np.float32),
        requested_logprobs=np.zeros((rows, MAX_REQUESTED_IDS), np.float32),
        requested_ranks=np.zeros((rows, MAX_REQUESTED_IDS), np.int32),
    )
