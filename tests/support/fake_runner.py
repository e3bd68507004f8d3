"""A runner with arithmetic that can be done by hand, to test the engine without a model.

After tokens t0..tn-1 the hidden state h is their sum plus n. The greedy token is h mod V; sampling shifts it by the
seed and the step, an adjusted row by what its slot holds; a masked token gives way to the next id. Token t after h has
log-prob -((t + h) mod 7) / 8 and rank 1 + (t + h) mod 5. The pages hold tokens, positions and hidden states, and every
step reads them back through the block tables: a wrong page, position, slot, chunk or place gives other numbers, or an
AssertionError on the spot. What a step gives can be looked at only through read(), as on a device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compiled.shapes import Buckets, PrefillShape
from compiled.state import (
    MAX_REQUESTED_IDS,
    PAGE_COPIES,
    DecodeInput,
    PageCopies,
    SamplingArrays,
    ScoreInput,
    SlotPenalties,
    StepInput,
    StepOutput,
    mask_words,
)
from model.kv_cache import NULL_PAGE, PAGE_SIZE
from model.token_logprobs import NO_ID, TokenLogprobs
from serve.engine.core import EngineCore
from serve.engine.request import (
    FinishReason,
    PromptScoring,
    Request,
    SamplingParams,
    TokenEvent,
)
from serve.engine.request_state import RequestState
from tests.support.grammars import FakeGrammar

VOCAB_SIZE = 97  # V
K = 3
ROUTING = (2, 3)  # L and k of models with experts

MAX_MODEL_LEN = 512  # tokens, by default

_FIRST_SHIFT, _SECOND_SHIFT = 5, 3


class InjectedError(RuntimeError):
    """Raised by a call that is made to fail."""


def hidden_after(tokens: Sequence[int]) -> int:
    """Return the hidden state after a sequence of tokens."""
    return sum(tokens) + len(tokens)


def next_token(hidden: int, *, shift: int = 0, forbidden: Callable[[int], bool] = lambda _: False) -> int:
    """Return the token chosen after a hidden state."""
    token = (hidden + shift) % VOCAB_SIZE
    while forbidden(token):
        token = (token + 1) % VOCAB_SIZE
    return token


def shift_of(seed: int, step: int) -> int:
    """Return the offset from a 64-bit seed and the step, for temperatures above 0."""
    return _FIRST_SHIFT * (seed >> 32) + _SECOND_SHIFT * (seed & 0xFFFFFFFF) + step


def adjusted_shift(bias: float, seen: int, chosen: int, presence: float, frequency: float, repetition: float) -> int:
    """What an adjusted row adds: sums over its slot, and its penalties."""
    return int(bias + 2 * seen + 7 * chosen + 16 * (presence + 2 * frequency + 3 * repetition))


def numbers(
    hidden: Sequence[int],
    targets: Sequence[int],
    requested_ids: NDArray[np.int32] | None = None,
    nan_token: int | None = None,
) -> TokenLogprobs:
    """The numbers of targets [R] after hidden states [R], and of requested_ids [R, B]."""
    h, t, k = np.asarray(hidden, np.int64), np.asarray(targets, np.int64), np.arange(K)
    scored = np.zeros((len(h), 0), np.int64) if requested_ids is None else requested_ids.astype(np.int64)
    logprob = np.where(t == (-1 if nan_token is None else nan_token), np.nan, -((t + h) % 7) / 8)
    top_ids = (h[:, None] + k) % VOCAB_SIZE
    top_logprobs = -(h[:, None] % 3) - k / 8
    return TokenLogprobs(
        logprob.astype(np.float32),
        (1 + (t + h) % 5).astype(np.int32),
        top_ids.astype(np.int32),
        top_logprobs.astype(np.float32),
        (-((scored + h[:, None]) % 7) / 8).astype(np.float32),
        (1 + (scored + h[:, None]) % 5).astype(np.int32),
    )


def experts_after(hidden: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int16]:
    """The experts [R, L, k] of tokens with hidden states [R]."""
    L, k = ROUTING
    states = np.asarray(hidden, np.int64)[..., None, None]
    return ((states + 3 * np.arange(L)[:, None] + np.arange(k)) % 11).astype(np.int16)


def processed_numbers(hidden: Sequence[int], targets: Sequence[int], scored: NDArray[np.int32]) -> TokenLogprobs:
    """The numbers of targets [R] in the distribution that they were sampled from: those after another state."""
    return numbers([h + 1 for h in hidden], targets, scored)


def logmass(masks: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Log of the allowed probability [R] of masks [R, W]: -1/8 for each forbidden token."""
    allowed = np.unpackbits(masks.astype("<u4").view(np.uint8), axis=1, bitorder="little")[:, :VOCAB_SIZE].sum(axis=1)
    return ((allowed.astype(np.float32) - VOCAB_SIZE) / 8).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Unread:
    """The result of a step before it is read."""

    tree: Any


class FakeRunner:
    """A `serve.engine.core.Runner`."""

    def __init__(self, *, pages: int = 64, decode_rows: tuple[int, ...] = (1, 2, 4), pages_per_row: int = 8) -> None:
        self.buckets = Buckets(
            decode_rows, prefill_chunks=(16, 64), score_rows=8, pages_per_row=pages_per_row, full_vocab_rows=4
        )
        self.pages = pages
        self.max_logprobs = K
        self.vocab_size = VOCAB_SIZE
        self.calls: list[tuple[str, int]] = []  # name and live rows or tokens
        self.resets = 0
        self.before_call: Callable[[str], None] = lambda _: None  # may raise, or wait for a test
        self.nan_token: int | None = None  # its log-prob is NaN
        self._clear()

    def fail_once(self, name: str, after: int = 0) -> None:
        """Make one later call of that name raise InjectedError."""
        left = after

        def before_call(called: str) -> None:
            nonlocal left
            if called == name:
                left -= 1
                if left == -1:
                    raise InjectedError(name)

        self.before_call = before_call

    def copy_pages(self, copies: PageCopies) -> None:
        """Copy pages; padding copies the null page to itself."""
        pairs = np.stack([copies.sources, copies.targets], axis=1)
        live = int((pairs != NULL_PAGE).any(axis=1).sum())
        assert (pairs[:live] != NULL_PAGE).all()
        self._call("copy", live)
        for source, target in pairs[:live]:  # in order, as on a device
            for pages in (self._tokens, self._positions, self._hidden):
                pages[target] = pages[source]

    def prefill(self, inputs: StepInput) -> Any:
        """Store a chunk of one row, or packed chunks: each row after those before it, on whose pages it may depend."""
        rows, tokens = inputs.tokens.shape
        assert PrefillShape(rows, tokens, inputs.tables.shape[1]) in self.buckets.steps()
        live = (inputs.positions >= 0).sum(axis=1)
        self._call("prefill", int(live.sum()))
        assert not live[np.argmin(live > 0) :].any() or live.all()  # rows of padding are last
        for row, count in enumerate(live.tolist()):
            if count:
                start = int(inputs.positions[row, 0])
                np.testing.assert_array_equal(inputs.positions[row, :count], np.arange(start, start + count))
                self._store(inputs.tables[row], inputs.tokens[row, :count], start)
        return Unread(np.int32(live.sum()))

    def set_penalties(self, slot: int, adjustment: SlotPenalties) -> None:
        """Fill a slot."""
        self._call("adjust", 1)
        assert 0 <= slot < self.buckets.slots - 1
        assert adjustment.bias.shape == adjustment.counts.shape == adjustment.seen.shape == (VOCAB_SIZE,)
        self._bias[slot] = adjustment.bias.sum()
        self._seen[slot] = adjustment.seen.sum()
        self._chosen[slot] = adjustment.counts.sum()

    def decode(self, inputs: DecodeInput, sampling: SamplingArrays) -> Any:
        """Store one token per row and choose the next."""
        rows = len(inputs.tokens)
        assert rows in self.buckets.decode_rows
        live = int((inputs.positions >= 0).sum())
        assert (inputs.positions[:live] >= 0).all()
        assert (inputs.slots[live:] == self.buckets.slots - 1).all()
        tables = {
            (slot, *table) for slot, table in zip(inputs.slots[:live], inputs.tables[:live].tolist(), strict=True)
        }
        assert len(tables) == len(set(inputs.slots[:live]))  # rows of one slot are of one request
        self._call("decode", live)
        tokens = np.where(inputs.tokens >= 0, inputs.tokens, self._last[inputs.slots])
        hidden = [
            self._store(inputs.tables[row], tokens[row : row + 1], int(inputs.positions[row])) for row in range(live)
        ]
        output = self._choose(hidden + [0] * (rows - live), inputs, sampling)
        used, counts = np.unique(inputs.slots, return_counts=True)
        self._last[inputs.slots] = output.tokens
        self._last[used[counts > 1]] = -99  # any of several rows may be the last to write
        np.add.at(self._chosen, inputs.slots, 1)
        return Unread(output)

    def score(self, inputs: ScoreInput) -> Any:
        """Return log-probs of given tokens; padding refers to the null page."""
        assert len(inputs.cache_indices) == len(inputs.targets) == self.buckets.score_rows
        live = int((inputs.cache_indices // PAGE_SIZE != NULL_PAGE).sum())
        self._call("score", live)
        hidden = self._hidden_at(inputs.cache_indices[:live]) + [0] * (len(inputs.cache_indices) - live)
        return Unread(numbers(hidden, inputs.targets.tolist(), inputs.requested_ids, self.nan_token))

    def read_experts(self, pages: NDArray[np.int32]) -> Any:
        """Return the experts of all tokens in pages."""
        assert pages.shape == (PAGE_COPIES,)
        self._call("experts", int((pages != NULL_PAGE).sum()))
        return Unread(experts_after(self._hidden[pages]))

    def read(self, tree: Any) -> Any:
        """Return the result of a step."""
        self._call("read", 0)
        assert isinstance(tree, Unread)
        return tree.tree

    def full_vocab_logprobs(self, places: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the log-prob of every token after each cached one."""
        assert len(places) == self.buckets.full_vocab_rows
        live = int((places // PAGE_SIZE != NULL_PAGE).sum())
        self._call("vocabulary", live)
        hidden = np.asarray(self._hidden_at(places[:live]) + [0] * (len(places) - live))
        return (-((np.arange(VOCAB_SIZE) + hidden[:, None]) % 7) / 8).astype(np.float32)

    def reset(self) -> None:
        """Clear all pages."""
        self._call("reset", 0)
        self.resets += 1
        self._clear()

    def _call(self, name: str, live: int) -> None:
        self.before_call(name)
        self.calls.append((name, live))

    def _clear(self) -> None:
        self._tokens = np.full((self.pages, PAGE_SIZE), -1, np.int64)
        self._positions = np.full((self.pages, PAGE_SIZE), -1, np.int64)
        self._hidden = np.full((self.pages, PAGE_SIZE), -1, np.int64)
        self._last, self._chosen, self._seen = (np.zeros(self.buckets.slots, np.int64) for _ in range(3))
        self._bias = np.zeros(self.buckets.slots)

    def _store(self, table: NDArray[np.int32], tokens: NDArray[np.int32], start: int) -> int:
        """Write tokens from position `start` on and return the hidden state after the last one."""
        assert len(table) == self.buckets.pages_per_row
        positions = np.arange(start + len(tokens))
        pages, offsets = table[positions // PAGE_SIZE], positions % PAGE_SIZE
        assert (pages != NULL_PAGE).all()
        self._tokens[pages[start:], offsets[start:]] = tokens
        self._positions[pages[start:], offsets[start:]] = positions[start:]
        np.testing.assert_array_equal(self._positions[pages, offsets], positions)
        hidden = np.cumsum(self._tokens[pages, offsets] + 1)
        self._hidden[pages[start:], offsets[start:]] = hidden[start:]
        return int(hidden[-1])

    def _hidden_at(self, places: NDArray[np.int32]) -> list[int]:
        hidden = self._hidden.reshape(-1)[places]
        assert (hidden >= 0).all()
        return [int(h) for h in hidden]

    def _choose(self, hidden: list[int], inputs: DecodeInput, sampling: SamplingArrays) -> StepOutput:
        assert inputs.requested_ids.shape == (len(hidden), MAX_REQUESTED_IDS)
        assert sampling.mask.shape == (len(hidden), mask_words(VOCAB_SIZE))
        tokens = []
        for row, h in enumerate(hidden):
            high, low = (int(word) for word in sampling.seed[row])
            shift = shift_of(high << 32 | low, int(sampling.step[row])) if sampling.temperature[row] > 0 else 0
            if sampling.penalized[row]:
                slot = inputs.slots[row]
                penalties = (float(sampling.presence_penalty[row]), float(sampling.frequency_penalty[row]))
                shift += adjusted_shift(
                    self._bias[slot],
                    self._seen[slot],
                    self._chosen[slot],
                    *penalties,
                    float(sampling.repetition_penalty[row]),
                )
            tokens.append(next_token(h, shift=shift, forbidden=_cleared_in(sampling.mask[row])))
        scored = np.where(inputs.requested_ids == NO_ID, 0, inputs.requested_ids)
        return StepOutput(
            np.asarray(tokens, np.int32),
            numbers(hidden, tokens, scored, self.nan_token),
            processed_numbers(hidden, tokens, scored),
            logmass(sampling.mask),
            experts_after(hidden),
        )


def _cleared_in(words: NDArray[np.uint32]) -> Callable[[int], bool]:
    return lambda token: not int(words[token // 32]) >> token % 32 & 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything returned for a request."""

    tokens: list[int]
    logprobs: list[tuple[float | list[int], ...]]
    reason: FinishReason
    stop_token_id: int | None
    prompt_logprobs: list[tuple[float | list[int], ...]] | None


def expected_outcome(prompt: list[int], params: SamplingParams, *, seed: int = 0, max_model_len: int) -> Outcome:
    """Compute the expected result of a request without an engine."""
    prompt_logprobs = None
    if params.prompt is not None:
        hidden = [hidden_after(prompt[:n]) for n in range(params.prompt.start, len(prompt))]
        prompt_logprobs = _expected_rows(hidden, prompt[params.prompt.start :], params.prompt.requested_ids)
    tokens: list[int] = []
    states: list[int] = []
    reason, stop = FinishReason.LENGTH, None
    while len(tokens) < params.max_tokens and stop is None and len(prompt) + len(tokens) < max_model_len:
        states.append(hidden_after(prompt + tokens))
        shift = shift_of(seed, len(tokens)) if params.temperature > 0 else 0
        if params.adjusts:
            penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
            shift += adjusted_shift(
                sum(value for _, value in params.logit_bias), len(set(prompt)), len(tokens), *penalties
            )
        tokens.append(next_token(states[-1], shift=shift, forbidden=lambda t: _forbidden(t, tokens, params)))
        if tokens[-1] in params.stop_token_ids:
            reason, stop = FinishReason.STOP, tokens[-1]
    return Outcome(tokens, _expected_rows(states, tokens, params.requested_ids), reason, stop, prompt_logprobs)


def outcome_of(events: Sequence[TokenEvent], start: int = 1) -> Outcome:
    """Merge the events of a finished request; prompt log-probs from token `start` on."""
    last = events[-1]
    assert last.finish_reason is not None
    assert all(event.finish_reason is None for event in events[:-1])
    assert all(event.prompt_logprobs is None for event in events[1:])
    assert len({event.cached_tokens for event in events}) == 1
    for event in events:
        assert len(event.token_ids) == len(event.logprobs.logprob)
    first = events[0].prompt_logprobs
    return Outcome(
        [token for event in events for token in event.token_ids],
        [row for event in events for row in _rows(event.logprobs)],
        last.finish_reason,
        last.stop_token_id,
        None if first is None else _rows(first[start - 1 :]),
    )


def _forbidden(token: int, before: list[int], params: SamplingParams) -> bool:
    if params.grammar is not None:
        assert isinstance(params.grammar, FakeGrammar)
        if token not in params.grammar.allowed(before):
            return True
    if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
        return True
    if len(before) < params.min_tokens and token in params.stop_token_ids:
        return True
    return any(
        word[-1] == token and (len(word) == 1 or tuple(before[1 - len(word) :]) == word[:-1])
        for word in params.bad_words
    )


def _expected_rows(hidden: list[int], targets: list[int], ids: tuple[int, ...]) -> list[tuple[float | list[int], ...]]:
    named = np.broadcast_to(np.asarray(ids, np.int32), (len(hidden), len(ids)))
    all_numbers = numbers(hidden, targets, named)
    own = all_numbers.logprob, all_numbers.rank
    if ids:
        return _rows(TokenLogprobs(*own, named, all_numbers.requested_logprobs, top_ranks=all_numbers.requested_ranks))
    ranks = np.broadcast_to(np.arange(1, K + 1, dtype=np.int32), all_numbers.top_ids.shape)
    return _rows(TokenLogprobs(*own, all_numbers.top_ids, all_numbers.top_logprobs, top_ranks=ranks))


def _rows(scores: TokenLogprobs) -> list[tuple[float | list[int], ...]]:
    columns = (scores.logprob, scores.rank, scores.top_ids, scores.top_ranks, scores.top_logprobs)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def greedy(max_tokens: int, *, prompt_logprobs: bool = False) -> SamplingParams:
    return SamplingParams(max_tokens, temperature=0.0, prompt=PromptScoring() if prompt_logprobs else None)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng([length, seed]).integers(0, VOCAB_SIZE, length)]


class CoreBench:
    """A core, its fake runner and the results of all requests."""

    def __init__(
        self,
        *,
        pages: int = 64,
        max_num_seqs: int = 4,
        max_model_len: int = MAX_MODEL_LEN,
        max_num_batched_tokens: int = 68,
        prefix_caching: bool = True,
    ) -> None:
        rows = tuple(n for n in (1, 2, 4) if n <= max_num_seqs)
        self.runner = FakeRunner(pages=pages, decode_rows=rows, pages_per_row=-(-max_model_len // 64))
        self.core = EngineCore(
            self.runner,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            prefix_caching=prefix_caching,
        )
        self.events: dict[str, list[TokenEvent]] = {}

    def add(
        self, name: str, prompt: list[int], params: SamplingParams, *, priority: int = 0, cache_salt: str = ""
    ) -> RequestState:
        request = RequestState(Request(name, prompt, params, priority, cache_salt), seed=uint64(params.seed or 0))
        self.core.add(request)
        self.events[name] = []
        return request

    def step(self) -> None:
        self.take(self.core.step())
        self.core.scheduler.check()

    def take(self, emitted: Sequence[tuple[RequestState, TokenEvent]]) -> None:
        for request, event in emitted:
            self.events[request.id].append(event)

    def run(self) -> None:
        for _ in range(3000):
            if not self.core.scheduler.num_requests:
                return
            self.step()
        raise AssertionError("the requests do not end")

    def fail(self) -> None:
        """Run a step that raises, and recover as the engine does."""
        with pytest.raises(InjectedError):
            self._step_until_it_fails()
        self.take(self.core.fail_all("it failed"))
        self.core.scheduler.check()

    def _step_until_it_fails(self) -> None:
        while True:
            self.step()

    def outcome(self, name: str, start: int = 1) -> Outcome:
        return outcome_of(self.events[name], start)


def alone(request: Request | RequestState, max_model_len: int = MAX_MODEL_LEN) -> Outcome:
    prompt, params = request.prompt_token_ids, request.params
    return expected_outcome(prompt, params, seed=uint64(params.seed or 0), max_model_len=max_model_len)


def uint64(seed: int) -> int:
    return seed & (2**64 - 1)
