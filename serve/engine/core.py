"""EngineCore: schedule -> begin -> read the step before, on whichever thread calls it.

A step is begun before the one before it is read: the tokens that it continues from are still on the device, which takes
them from its slots. So what a request has chosen is known one step late: a step may hold a row of a request that had
ended, whose result is thrown away.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compiled.shapes import Buckets
from compiled.state import (
    Adjustment,
    DecodeInput,
    SamplingArrays,
    ScoreInput,
    StepInput,
    StepOutput,
)
from model.token_logprobs import TokenLogprobs
from serve.engine import batch
from serve.engine.batch import ScoreRow
from serve.engine.logprob_store import begin_prompt_scores, holds_nan, keep_prompt_scores, token_scores, write
from serve.engine.observer import EngineFault, EngineGauges, NoObserver, Observer
from serve.engine.page_pool import PagePool
from serve.engine.request import FinishReason, Request, RequestStatus, TokenEvent, TokenScores, empty_scores
from serve.engine.scheduler import Schedule, Scheduler
from serve.engine.token_mask import TokenMask

type Emitted = tuple[Request, TokenEvent]

_NOT_A_NUMBER = "the model computed a log-probability that is not a number"


class Runner(Protocol):
    """What runs the steps: `compiled.runner.ModelRunner`, or a fake whose arithmetic can be done by hand.

    prefill, decode and score begin a step and return what read() waits for. Inputs are not changed afterwards.
    """

    buckets: Buckets
    pages: int
    max_logprobs: int
    vocab_size: int

    def prefill(self, inputs: StepInput) -> Any: ...
    def adjust(self, slot: int, adjustment: Adjustment) -> None: ...
    def decode(self, inputs: DecodeInput, sampling: SamplingArrays) -> StepOutput: ...
    def score(self, inputs: ScoreInput) -> TokenLogprobs: ...
    def read(self, tree: Any) -> Any: ...
    def vocabulary(self, places: NDArray[np.int32]) -> NDArray[np.float32]: ...
    def reset(self) -> None: ...


@dataclass(slots=True)
class _Begun:
    """A step whose results have not been read."""

    prefilled: Any = None  # tells when the last chunk is done
    blocks: list[tuple[Sequence[ScoreRow], TokenLogprobs]] = field(default_factory=list)
    scored: list[Request] = field(default_factory=list)
    rows: list[Request] = field(default_factory=list)
    output: StepOutput | None = None


class EngineCore:
    """The scheduler and the runner joined. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        runner: Runner,
        *,
        max_model_len: int,
        max_num_batched_tokens: int,
        prefix_caching: bool = True,
        observer: Observer | None = None,
    ) -> None:
        self._runner = runner
        self._observer: Observer = observer or NoObserver()
        self._pool = PagePool(runner.pages, caching=prefix_caching)
        self._begun: _Begun | None = None
        self.at_work = False  # the last step began or read something; else only a call can change anything
        self._emitted: list[Emitted] = []  # by the step at work; what ended in a step that fails must be told too
        self.scheduler = Scheduler(
            self._pool,
            runner.buckets,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            on_admit=self._admitted,
        )

    @property
    def gauges(self) -> EngineGauges:
        """How things stand; may be read by any thread."""
        scheduler = self.scheduler
        return EngineGauges(len(scheduler.running), len(scheduler.waiting), len(scheduler.held), self._pool.usage)

    def add(self, request: Request) -> None:
        """Queues a request."""
        request.mask = TokenMask(request.params, self._runner.vocab_size)
        self.scheduler.add(request)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> Emitted | None:
        """Ends a request wherever it stands, and frees what it holds; None if it had ended."""
        request = self.scheduler.find(request_id)
        if request is None:
            return None
        if request.status is RequestStatus.FINISHED:  # held until now
            self.scheduler.finish(request)
            return None
        return self._finish(request, _ending(request, reason), reason)

    def fail_all(self, message: str) -> list[Emitted]:
        """Ends every running request with an error and starts from an empty cache: a step failed after donation.

        Waiting requests lose nothing and stay. The events of the failed step come before the errors.
        """
        self._begun, self.at_work = None, True
        for request in self.scheduler.end_all():
            self._observer.on_finished(request, FinishReason.ERROR)
            self._emitted.append((request, _ending(request, FinishReason.ERROR, message)))
        self._runner.reset()
        return self._take_emitted()

    def step(self) -> list[Emitted]:
        """Begins a step and reads the one before. Events come in the order in which the tokens were computed."""
        reads = self._begun is not None
        if self._must_read_first():
            self._read()
        preempted = self.scheduler.num_preempted
        schedule = self.scheduler.schedule()
        if self.scheduler.num_preempted > preempted:
            self._observer.on_preempted(self.scheduler.num_preempted - preempted)
        begun = self._begin(schedule)
        self._read()
        self._begun = begun
        self.at_work = reads or begun is not None
        if not self.scheduler.num_requests:
            self.scheduler.check()
        return self._take_emitted()

    def vocabulary(self, request_id: str, start: int, count: int) -> NDArray[np.float32]:
        """Log-probs [count, V] of every token after the prompt tokens start..start+count-1 of a held request.

        Raises:
            LookupError: no such request is held.
        """
        request = self.scheduler.held[request_id]
        size = self._runner.buckets.vocabulary_rows
        blocks = [
            self._runner.vocabulary(batch.places(request, at, size, min(size, start + count - at)))
            for at in range(start, start + count, size)
        ]
        return np.concatenate(blocks)[:count]

    def _admitted(self, request: Request) -> None:
        begin_prompt_scores(request, self._pool, self._runner.max_logprobs)
        if not request.times.admitted:  # else it has been preempted
            request.times.admitted = time.monotonic()
            self._observer.on_admitted(request)

    def _must_read_first(self) -> bool:
        """Whether what the next step is to be depends on tokens that are still on the device."""
        if self._begun is None:
            return False
        waits = any(request.mask is not None and request.mask.waits for request in self._begun.rows)
        return waits or self.scheduler.must_preempt()

    def _begin(self, schedule: Schedule) -> _Begun | None:
        if not schedule:
            return None
        self._observer.on_step(sum(work.length for work in schedule.prefills) + len(schedule.decodes))
        begun = _Begun(scored=schedule.scored, rows=schedule.decodes)
        for work in schedule.prefills:
            chunk = batch.prefill_input(work, self._runner.buckets.prefill(work.length))
            begun.prefilled = self._runner.prefill(chunk)
        rows = [(work.request, index) for work in schedule.scores for index in range(work.start, work.end)]
        size = self._runner.buckets.score_rows
        for start in range(0, len(rows), size):
            block = rows[start : start + size]
            begun.blocks.append((block, self._runner.score(batch.score_input(block, size))))
        for request in schedule.begun:
            if request.params.adjusts:
                self._runner.adjust(request.slot, batch.adjustment(request, self._runner.vocab_size))
        if schedule.decodes:
            begun.output = self._decode(schedule.decodes)
        return begun

    def _decode(self, requests: list[Request]) -> StepOutput:
        buckets = self._runner.buckets
        shape = buckets.decode(len(requests))
        inputs = batch.decode_input(requests, shape, buckets.slots - 1)
        return self._runner.decode(inputs, batch.sampling_arrays(requests, shape.rows, self._runner.vocab_size))

    def _read(self) -> None:
        begun, self._begun = self._begun, None
        if begun is None:
            return
        if begun.prefilled is not None and begun.output is None and not begun.blocks:
            self._runner.read(begun.prefilled)  # nothing is to be known, but the device must not fall behind
        for block, logprobs in begun.blocks:
            _fill(block, self._runner.read(logprobs))
        for request in begun.scored:
            if request.status is not RequestStatus.FINISHED:
                event = self._event(request, [], empty_scores(0, 0))
                self._emitted.append(self._told(request, event, FinishReason.LENGTH))
        if begun.output is not None:
            output = self._runner.read(begun.output)
            for row, request in enumerate(begun.rows):
                if request.status is not RequestStatus.FINISHED:
                    self._emitted.append(self._append(request, output, row))

    def _append(self, request: Request, output: StepOutput, row: int) -> Emitted:
        token = int(output.tokens[row])
        scores = token_scores(output.logprobs, slice(row, row + 1), request.params.logprob_token_ids)
        event = self._event(request, [token], scores)
        request.output_token_ids.append(token)
        self._timed(request)
        self.scheduler.register_pages(request)
        if token in request.params.stop_token_ids:
            event.stop_token_id = token
            return self._told(request, event, FinishReason.STOP)
        done = len(request.output_token_ids) >= request.max_chosen
        return self._told(request, event, FinishReason.LENGTH if done else None)

    def _timed(self, request: Request) -> None:
        now, times = time.monotonic(), request.times
        gap = now - times.last if times.first else None
        times.first, times.last = times.first or now, now
        self._observer.on_token(request, gap)

    def _event(self, request: Request, token_ids: list[int], scores: TokenScores) -> TokenEvent:
        """An event, with the prompt's scores if it is the request's first."""
        event = TokenEvent(token_ids, scores, cached_tokens=request.num_cached or 0)
        if not request.output_token_ids:
            event.prompt_scores = request.prompt_scores
        return event

    def _told(self, request: Request, event: TokenEvent, reason: FinishReason | None) -> Emitted:
        """An event that carries numbers; it ends the request where there is a reason, or a number is not one."""
        scoring, scores = request.params.prompt, event.prompt_scores
        wrong = holds_nan(event.scores)
        if scores is not None and scoring is not None:
            wrong |= holds_nan(scores, scoring.start - 1)
            if not wrong:
                keep_prompt_scores(request, self._pool)
        if wrong:
            self._pool.forget(request.pages)  # which of them is to blame is not known: nobody shall find any
            self._observer.on_fault(EngineFault.NAN)
            event.error, reason = _NOT_A_NUMBER, FinishReason.ERROR
        return (request, event) if reason is None else self._finish(request, event, reason)

    def _finish(self, request: Request, event: TokenEvent, reason: FinishReason) -> Emitted:
        event.finish_reason = reason
        request.times.last = request.times.last or time.monotonic()
        self._observer.on_finished(request, reason)
        whole = request.params.prompt is not None and request.params.prompt.whole
        self.scheduler.finish(request, hold=whole and reason in (FinishReason.STOP, FinishReason.LENGTH))
        return request, event

    def _take_emitted(self) -> list[Emitted]:
        emitted, self._emitted = self._emitted, []
        return emitted


def _ending(request: Request, reason: FinishReason, error: str | None = None) -> TokenEvent:
    """An event that carries no numbers."""
    return TokenEvent([], empty_scores(0, 0), reason, cached_tokens=request.num_cached or 0, error=error)


def _fill(block: Sequence[ScoreRow], logprobs: TokenLogprobs) -> None:
    """Writes a block's numbers into its requests' columns, a run of one request's rows at a time."""
    start = 0
    while start < len(block):
        request, index = block[start]
        end = start + 1
        while end < len(block) and block[end][0] is request:
            end += 1
        scoring = request.params.prompt
        assert request.prompt_scores is not None
        assert scoring is not None
        scores = token_scores(logprobs, slice(start, end), scoring.token_ids)
        write(request.prompt_scores, slice(index, index + end - start), scores)
        start = end
