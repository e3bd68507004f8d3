"""EngineCore: schedule a step, dispatch it, then read the previous one.

A step is dispatched before the previous one is read: the device takes the tokens that it continues from out of its own
slots. So the host knows each token one step late, and a step may contain a row of a request that has finished, whose
result is discarded. A request whose mask depends on its last token decodes only after that has been read. The device
is idle then, so only tokens and masks come before the next step; events are made while it runs.
"""

import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compiled.shapes import Buckets
from compiled.state import (
    PAGE_COPIES,
    DecodeInput,
    PageCopies,
    SamplingArrays,
    ScoreInput,
    SlotPenalties,
    StepInput,
    StepOutput,
)
from model.token_logprobs import TokenLogprobs
from serve.engine import batch
from serve.engine.logprob_store import begin_prompt_logprobs, has_nan, store_prompt_logprobs
from serve.engine.mask_updates import MaskUpdates
from serve.engine.observer import EngineFault, EngineGauges, Observer
from serve.engine.page_pool import PagePool
from serve.engine.request import FinishReason, TokenEvent
from serve.engine.request_state import Emitted, RequestState, RequestStatus
from serve.engine.schedule import Schedule
from serve.engine.scheduler import Scheduler
from serve.engine.step import Chosen, Step, ending, token_event, write_prompt_experts, write_prompt_logprobs
from serve.engine.token_mask import TokenMask

_NAN_ERROR = "the model computed a log-probability that is not a number"


class Runner(Protocol):
    """Runs steps on a device: `compiled.runner.ModelRunner`, or a fake with simple arithmetic.

    prefill, decode, score and read_experts dispatch work and return arrays for read(). The caller does not modify
    inputs afterwards.
    """

    buckets: Buckets
    pages: int
    max_logprobs: int
    vocab_size: int

    def copy_pages(self, copies: PageCopies) -> None: ...
    def prefill(self, inputs: StepInput) -> Any: ...
    def set_penalties(self, slot: int, penalties: SlotPenalties) -> None: ...
    def decode(self, inputs: DecodeInput, sampling: SamplingArrays) -> StepOutput: ...
    def score(self, inputs: ScoreInput) -> TokenLogprobs: ...
    def read_experts(self, pages: NDArray[np.int32]) -> Any: ...
    def read(self, tree: Any) -> Any: ...
    def full_vocab_logprobs(self, cache_indices: NDArray[np.int32]) -> NDArray[np.float32]: ...
    def reset(self) -> None: ...


class EngineCore:
    """Runs the scheduler's steps on the runner. Not thread-safe."""

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
        self._observer = observer or Observer()
        self._pool = PagePool(runner.pages, caching=prefix_caching)
        self.masks = MaskUpdates(runner.buckets.decode_rows[-1])
        self._unread: Step | None = None
        self.in_flight = False  # the last step dispatched or read something; otherwise step() has nothing to do
        self._emitted: list[Emitted] = []  # by the current step; kept if it fails, as requests may have finished in it
        self.scheduler = Scheduler(
            self._pool,
            runner.buckets,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            on_scheduled=self._on_scheduled,
        )

    @property
    def gauges(self) -> EngineGauges:
        """Any thread may read it."""
        scheduler = self.scheduler
        return EngineGauges(len(scheduler.running), len(scheduler.waiting), len(scheduler.pinned), self._pool.usage)

    def add(self, request: RequestState) -> None:
        request.mask = TokenMask(request.params, self._runner.vocab_size)
        self.scheduler.add(request)
        if request.mask.has_grammar and request.generates:
            self.masks.start(request)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> Emitted | None:
        """Finish a request in any state, or unpin a finished one. Returns None if it had finished."""
        request = self.scheduler.find(request_id)
        if request is None:
            return None
        if request.status is RequestStatus.FINISHED:
            self.scheduler.finish(request)
            return None
        return self._finish(request, TokenEvent(cached_tokens=request.num_cached or 0), reason)

    def fail_all(self, message: str) -> list[Emitted]:
        """Finish all running requests with an error and clear the cache, whose buffers a failed step has donated.

        Waiting requests stay. The events of the failed step come before the errors.
        """
        self._unread, self.in_flight = None, True
        for request in self.scheduler.reset():
            self._observer.on_finished(request, FinishReason.ERROR)
            event = TokenEvent(finish_reason=FinishReason.ERROR, cached_tokens=request.num_cached or 0, error=message)
            self._emitted.append((request, event))
        self._runner.reset()
        return self._take_emitted()

    def step(self) -> list[Emitted]:
        """Dispatch a step and read the previous one. Events are in the order in which tokens were computed."""
        reads = self._unread is not None
        if self._unread is not None and any(row.request.waits_for_mask for row in self._unread.rows):
            self._read_tokens(self._unread)
        self._finish_masks()
        if self._unread is not None and self.scheduler.must_preempt():
            self._read()
        schedule = self.scheduler.schedule()
        if schedule.preempted:
            self._observer.on_preempted(len(schedule.preempted))
        dispatched = self._dispatch(schedule)
        self._read()
        self._unread = dispatched
        self.in_flight = reads or dispatched is not None or self.masks.in_progress
        if not self.scheduler.num_requests:
            self.scheduler.check()
        return self._take_emitted()

    def full_vocab_logprobs(self, request_id: str, start: int, count: int) -> NDArray[np.float32]:
        """Log-probs [count, V] of all tokens after the prompt tokens start..start+count-1 of a pinned request.

        Raises:
            LookupError: the request is not pinned.
        """
        request = self.scheduler.pinned[request_id]
        size = self._runner.buckets.full_vocab_rows
        blocks = [
            self._runner.full_vocab_logprobs(
                batch.cache_indices(request, first, size, min(size, start + count - first))
            )
            for first in range(start, start + count, size)
        ]
        return np.concatenate(blocks)[:count]

    def _on_scheduled(self, request: RequestState) -> None:
        begin_prompt_logprobs(request, self._pool, self._runner.max_logprobs)
        if not request.times.scheduled:  # otherwise it was preempted
            request.times.scheduled = time.monotonic()
            self._observer.on_scheduled(request)

    def _finish_masks(self) -> None:
        """Let requests decode whose masks are done, and finish those that have none: the others wait."""
        for request in self.masks.collect():
            mask = request.mask
            if mask is None or mask.forced or not (mask.is_complete or mask.error is not None):
                continue
            self._read()  # events of earlier tokens come first
            if request.status is RequestStatus.FINISHED:
                continue
            if mask.is_complete:
                self._emitted.append(self._finalize(request, TokenEvent(), FinishReason.STOP))
            else:
                event = TokenEvent(error=mask.error, grammar_failed=True, cached_tokens=request.num_cached or 0)
                self._emitted.append(self._finish(request, event, FinishReason.ERROR))
                self._observer.on_grammar_error()

    def _dispatch(self, schedule: Schedule) -> Step | None:
        if not schedule:
            return None
        self._observer.on_step(sum(chunk.end - chunk.start for chunk in schedule.prefills) + len(schedule.decodes))
        step = Step(scored=schedule.scored, rows=schedule.decodes)
        for start in range(0, len(schedule.copies), PAGE_COPIES):
            self._runner.copy_pages(batch.page_copies(schedule.copies[start : start + PAGE_COPIES]))
        if schedule.prefills:
            step.prefilled = self._runner.prefill(batch.prefill_input(schedule.prefills, self._runner.buckets))
        rows = [(chunk.request, index) for chunk in schedule.scores for index in range(chunk.start, chunk.end)]
        size = self._runner.buckets.score_rows
        for start in range(0, len(rows), size):
            block = rows[start : start + size]
            step.blocks.append((block, self._runner.score(batch.score_input(block, size))))
        for request in (*schedule.started, *schedule.scored):
            if request.prompt_experts is None and (pages := batch.prompt_pages(request)):
                step.experts.append((request, [self._runner.read_experts(part) for part in pages]))
        for request in schedule.started:
            if request.params.adjusts:
                self._runner.set_penalties(request.slot, batch.slot_penalties(request, self._runner.vocab_size))
        if schedule.decodes:
            shape = self._runner.buckets.decode(len(schedule.decodes))
            inputs = batch.decode_input(schedule.decodes, shape, self._runner.buckets.slots - 1)
            sampling = batch.sampling_arrays(schedule.decodes, shape.rows, self._runner.vocab_size)
            step.output = self._runner.decode(inputs, sampling)
            for row in schedule.decodes:
                row.request.waits_for_mask = row.request.mask is not None and row.request.mask.waits
        return step

    def _read(self) -> None:
        step, self._unread = self._unread, None
        if step is None:
            return
        if step.prefilled is not None and step.output is None and not step.blocks:
            self._runner.read(step.prefilled)  # no result is needed, but the host must not run ahead of the device
        for block, logprobs in step.blocks:
            write_prompt_logprobs(block, self._runner.read(logprobs))
        for request, blocks in step.experts:
            write_prompt_experts(request, [self._runner.read(block) for block in blocks])
        for request in step.scored:
            if request.status is not RequestStatus.FINISHED:
                self._emitted.append(self._finalize(request, TokenEvent(), FinishReason.LENGTH))
        self._read_tokens(step)
        self._emit_chosen(step)

    def _read_tokens(self, step: Step) -> None:
        """Append the tokens of a step to its requests, and compute the masks after them."""
        if step.output is None or step.chosen is not None:
            return
        step.output, step.chosen = self._runner.read(step.output), []
        for request, group in groupby(enumerate(step.rows), key=lambda item: item[1].request):
            indices, mask = [index for index, _ in group], request.mask
            if request.status is RequestStatus.FINISHED:
                continue
            chosen = Chosen(request, slice(indices[0], indices[-1] + 1), len(mask.forced) if mask else 0)
            step.chosen.append(chosen)
            request.output_token_ids += step.output.tokens[chosen.rows].tolist()
            self.scheduler.register_pages(request)
            request.waits_for_mask = mask is not None and mask.has_grammar
            if request.waits_for_mask and ending(request) is None:
                self.masks.start(request)

    def _emit_chosen(self, step: Step) -> None:
        for chosen in step.chosen or ():
            assert step.output is not None
            event = token_event(chosen, step.output)
            self._note_times(chosen.request, event.forced)
            self._emitted.append(self._finalize(chosen.request, event, ending(chosen.request)))

    def _note_times(self, request: RequestState, forced: Sequence[bool]) -> None:
        """Note that tokens were read now, the first of them after the last gap."""
        now, times = time.monotonic(), request.times
        gap = now - times.last if times.first else None
        times.first, times.last = times.first or now, now
        for is_forced in forced:
            self._observer.on_token(request, gap, forced=is_forced)
            gap = 0.0

    def _finalize(self, request: RequestState, event: TokenEvent, reason: FinishReason | None) -> Emitted:
        """Complete an event and check it for NaN. Finishes the request if there is a reason, or if a log-prob is NaN.

        The first event of a request contains the log-probs of its prompt.
        """
        event.cached_tokens = request.num_cached or 0
        if len(request.output_token_ids) == len(event.token_ids):
            event.prompt_logprobs = request.prompt_logprobs
            if request.prompt_experts is not None:
                parts = [request.prompt_experts, *([] if event.experts is None else [event.experts])]
                event.experts = np.concatenate(parts)
        scoring, logprobs = request.params.prompt, event.prompt_logprobs
        failed = has_nan(event.logprobs)
        if logprobs is not None and scoring is not None:
            failed |= has_nan(logprobs, scoring.start - 1)
            if not failed:
                store_prompt_logprobs(request, self._pool)
        if failed:
            self.scheduler.discard_pages(request)  # any of them may contain the NaN
            self._observer.on_fault(EngineFault.NAN)
            event.error, reason = _NAN_ERROR, FinishReason.ERROR
        return (request, event) if reason is None else self._finish(request, event, reason)

    def _finish(self, request: RequestState, event: TokenEvent, reason: FinishReason) -> Emitted:
        event.finish_reason = reason
        request.times.last = request.times.last or time.monotonic()
        self._observer.on_finished(request, reason)
        pins = request.params.prompt is not None and request.params.prompt.full_vocab
        self.scheduler.finish(request, pin=pins and reason in (FinishReason.STOP, FinishReason.LENGTH))
        return request, event

    def _take_emitted(self) -> list[Emitted]:
        emitted, self._emitted = self._emitted, []
        return emitted
