"""EngineCore: schedule -> run -> update, one step at a time, on whichever thread calls it."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from compiled.shapes import Buckets
from compiled.state import SamplingArrays, StepInput, StepOutput, TokenLogprobs
from serve.engine import batch
from serve.engine.pages import PagePool
from serve.engine.request import (
    FinishReason,
    Request,
    RequestStatus,
    TokenEvent,
    TokenScores,
    empty_scores,
)
from serve.engine.scheduler import PrefillWork, Schedule, Scheduler

type Emitted = tuple[Request, TokenEvent]

_NOT_A_NUMBER = "the model computed a log-probability that is not a number"


class Runner(Protocol):
    """What runs the steps: `compiled.runner.ModelRunner`, or a fake whose arithmetic can be done by hand."""

    buckets: Buckets
    pages: int
    max_logprobs: int

    def prefill(self, inputs: StepInput) -> None: ...
    def decode(self, inputs: StepInput, sampling: SamplingArrays) -> StepOutput: ...
    def sample(self, places: NDArray[np.int32], sampling: SamplingArrays) -> StepOutput: ...
    def score(self, places: NDArray[np.int32], targets: NDArray[np.int32]) -> TokenLogprobs: ...
    def reset(self) -> None: ...


class EngineCore:
    """The scheduler and the runner joined. Not thread-safe: one thread owns it."""

    def __init__(self, runner: Runner, *, max_model_len: int) -> None:
        self._runner = runner
        self._max_model_len = max_model_len
        self._emitted: list[Emitted] = []  # by the step at work; what ended in a step that fails must be told too
        buckets = runner.buckets
        self.scheduler = Scheduler(
            PagePool(runner.pages), max_num_seqs=buckets.decode_rows[-1], chunk=buckets.prefill_chunks[-1]
        )

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.scheduler.add(request)

    def abort(self, request_id: str) -> Emitted | None:
        """Ends a request wherever it stands; None if it had ended."""
        request = self.scheduler.find(request_id)
        return None if request is None else self._finish(request, self._event(None), FinishReason.ABORT)

    def fail_all(self, message: str) -> list[Emitted]:
        """Ends every running request with an error and starts from an empty cache: a step failed after donation.

        Waiting requests lose nothing and stay. The events of the failed step come before the errors.
        """
        for request in list(self.scheduler.running):
            event = self._event(None)
            event.error = message
            self._emitted.append(self._finish(request, event, FinishReason.ERROR))
        self._runner.reset()
        return self._take_emitted()

    def step(self) -> list[Emitted]:
        """Runs one step. Events come in the order in which the tokens were computed."""
        schedule = self.scheduler.schedule()
        self._prefill(schedule)
        self._decode(schedule.decodes)
        if not self.scheduler.num_requests:
            self.scheduler.check()
        return self._take_emitted()

    def _take_emitted(self) -> list[Emitted]:
        emitted, self._emitted = self._emitted, []
        return emitted

    def _prefill(self, schedule: Schedule) -> None:
        for work in schedule.prefills:
            self._make_scores(work.request)
            inputs = batch.prefill_input(work, self._runner.buckets.prefill(work.length))
            self._runner.prefill(inputs)
            work.request.num_computed += work.length
        self._score([row for work in schedule.prefills for row in _rows_to_score(work)])
        for work in schedule.prefills:
            if work.ends_prefill:
                self._end_prefill(work.request)

    def _make_scores(self, request: Request) -> None:
        """Room for the prompt's numbers, once its turn has come: waiting requests shall take no memory."""
        if request.params.prompt_logprobs and request.prompt_scores is None:
            request.prompt_scores = empty_scores(len(request.prompt_token_ids) - 1, self._runner.max_logprobs)

    def _end_prefill(self, request: Request) -> None:
        request.status = RequestStatus.DECODE
        if request.output_token_ids:  # computed again after a preemption: the next token is a decode step's
            return
        if request.params.max_tokens == 0:
            self._emitted.append(self._finish(request, self._event(request), FinishReason.LENGTH))
            return
        output = self._runner.sample(batch.last_place(request), batch.sampling_arrays([request], 1))
        self._emitted.append(self._append(request, output, 0))

    def _decode(self, requests: list[Request]) -> None:
        if not requests:
            return
        shape = self._runner.buckets.decode(len(requests))
        output = self._runner.decode(batch.decode_input(requests, shape), batch.sampling_arrays(requests, shape.rows))
        for request in requests:
            request.num_computed += 1
        self._emitted += [self._append(request, output, row) for row, request in enumerate(requests)]

    def _score(self, rows: list[batch.ScoreRow]) -> None:
        size = self._runner.buckets.score_rows
        for start in range(0, len(rows), size):
            block = rows[start : start + size]
            result = self._runner.score(*batch.score_input(block, size))
            for i, row in enumerate(block):
                scores = row.request.prompt_scores
                assert scores is not None
                scores.logprob[row.index] = result.logprob[i]
                scores.rank[row.index] = result.rank[i]
                scores.top_ids[row.index] = result.top_ids[i]
                scores.top_logprobs[row.index] = result.top_logprobs[i]
                row.request.num_scored = row.index + 1

    def _append(self, request: Request, output: StepOutput, row: int) -> Emitted:
        token = int(output.tokens[row])
        event = self._event(request)
        request.output_token_ids.append(token)
        event.token_ids = [token]
        event.scores = _row(output.logprobs, row)
        if np.isnan(event.scores.logprob[0]) or _holds_nan(event.prompt_scores):
            event.error = _NOT_A_NUMBER
            return self._finish(request, event, FinishReason.ERROR)
        if token in request.params.stop_token_ids:
            event.stop_token_id = token
            return self._finish(request, event, FinishReason.STOP)
        if len(request.output_token_ids) >= request.params.max_tokens or request.num_tokens >= self._max_model_len:
            return self._finish(request, event, FinishReason.LENGTH)
        return request, event

    def _event(self, request: Request | None) -> TokenEvent:
        """An event without tokens; with the prompt's scores if it is the request's first."""
        event = TokenEvent([], empty_scores(0, self._runner.max_logprobs))
        if request is not None and not request.output_token_ids:
            event.prompt_scores = request.prompt_scores
        return event

    def _finish(self, request: Request, event: TokenEvent, reason: FinishReason) -> Emitted:
        event.finish_reason = reason
        if _holds_nan(event.prompt_scores):
            event.finish_reason, event.error = FinishReason.ERROR, _NOT_A_NUMBER
        self.scheduler.finish(request)
        return request, event


def _rows_to_score(work: PrefillWork) -> Iterable[batch.ScoreRow]:
    request = work.request
    if request.prompt_scores is None:
        return []
    start = max(work.start, request.num_scored)
    end = min(work.start + work.length, len(request.prompt_token_ids) - 1)
    return [batch.ScoreRow(request, index) for index in range(start, end)]


def _holds_nan(scores: TokenScores | None) -> bool:
    return scores is not None and bool(np.isnan(scores.logprob).any())


def _row(logprobs: TokenLogprobs, row: int) -> TokenScores:
    at = slice(row, row + 1)
    return TokenScores(logprobs.logprob[at], logprobs.rank[at], logprobs.top_ids[at], logprobs.top_logprobs[at])
