"""A runner whose arithmetic can be done by hand: the serving loop is tested without a model.

After tokens t0..tn-1 the hidden state h is their sum plus n. The greedy token is h mod V; sampling shifts it by the
seed and the step; a banned token gives way to the next id. Token t after h has log-prob -((t + h) mod 7) / 8 and rank
1 + (t + h) mod 5. The pages hold tokens, positions and hidden states, and every step reads them back through the
block tables: a wrong page, position, chunk or place gives other numbers, or an AssertionError on the spot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from compiled.shapes import Buckets
from compiled.state import MAX_BANNED, SamplingArrays, StepInput, StepOutput, TokenLogprobs
from model.kv_cache import NULL_PAGE, PAGE_SIZE
from serve.engine.core import EngineCore
from serve.engine.request import FinishReason, Request, SamplingParams, TokenEvent, TokenScores

VOCAB_SIZE = 97  # V
K = 3

MAX_MODEL_LEN = 512  # tokens, unless a test says otherwise

_FIRST_SHIFT, _SECOND_SHIFT = 5, 3


class InjectedError(RuntimeError):
    """What a call that shall fail raises."""


def hidden_after(tokens: Sequence[int]) -> int:
    """The hidden state after a run of tokens."""
    return sum(tokens) + len(tokens)


def next_token(hidden: int, *, shift: int = 0, banned: Sequence[int] = ()) -> int:
    """The token chosen after a hidden state."""
    token = (hidden + shift) % VOCAB_SIZE
    while token in banned:
        token = (token + 1) % VOCAB_SIZE
    return token


def shift_of(seed: int, step: int) -> int:
    """What a 64-bit seed and the number of tokens chosen before add where temperature is above 0."""
    return _FIRST_SHIFT * (seed >> 32) + _SECOND_SHIFT * (seed & 0xFFFFFFFF) + step


def numbers(hidden: Sequence[int], targets: Sequence[int], nan_token: int | None = None) -> TokenLogprobs:
    """The numbers of targets [R] after hidden states [R]."""
    h, t, k = np.asarray(hidden, np.int64), np.asarray(targets, np.int64), np.arange(K)
    logprob = np.where(t == (-1 if nan_token is None else nan_token), np.nan, -((t + h) % 7) / 8)
    top_ids = (h[:, None] + k) % VOCAB_SIZE
    top_logprobs = -(h[:, None] % 3) - k / 8
    return TokenLogprobs(
        logprob.astype(np.float32),
        (1 + (t + h) % 5).astype(np.int32),
        top_ids.astype(np.int32),
        top_logprobs.astype(np.float32),
    )


class FakeRunner:
    """Implements `serve.engine.core.Runner`."""

    def __init__(self, *, pages: int = 64, decode_rows: tuple[int, ...] = (1, 2, 4), pages_per_row: int = 8) -> None:
        self.buckets = Buckets(decode_rows, prefill_chunks=(16, 64), score_rows=8, pages_per_row=pages_per_row)
        self.pages = pages
        self.max_logprobs = K
        self.calls: list[tuple[str, int]] = []  # name and live rows or tokens
        self.resets = 0
        self.before_call: Callable[[str], None] = lambda _: None  # may raise, or wait for a test
        self.nan_token: int | None = None  # its log-prob is NaN
        self._clear()

    def fail_once(self, name: str, after: int = 0) -> None:
        """Lets one call of that name raise InjectedError, after so many that succeed."""
        left = after

        def before_call(called: str) -> None:
            nonlocal left
            if called == name:
                left -= 1
                if left == -1:
                    raise InjectedError(name)

        self.before_call = before_call

    def prefill(self, inputs: StepInput) -> None:
        """Stores a chunk of one row."""
        rows, chunk = inputs.tokens.shape
        assert rows == 1
        assert chunk in self.buckets.prefill_chunks
        live = int((inputs.positions[0] >= 0).sum())
        self._call("prefill", live)
        start = int(inputs.positions[0, 0])
        np.testing.assert_array_equal(inputs.positions[0, :live], np.arange(start, start + live))
        self._store(inputs.tables[0], inputs.tokens[0, :live], start)

    def decode(self, inputs: StepInput, sampling: SamplingArrays) -> StepOutput:
        """Stores one token of every row and chooses the next."""
        rows, chunk = inputs.tokens.shape
        assert rows in self.buckets.decode_rows
        assert chunk == 1
        live = int((inputs.positions[:, 0] >= 0).sum())
        assert (inputs.positions[:live, 0] >= 0).all()
        self._call("decode", live)
        hidden = [
            self._store(inputs.tables[row], inputs.tokens[row], int(inputs.positions[row, 0])) for row in range(live)
        ]
        return self._choose(hidden + [0] * (rows - live), sampling)

    def sample(self, places: NDArray[np.int32], sampling: SamplingArrays) -> StepOutput:
        """Chooses the token after each cached one."""
        assert len(places) == 1
        self._call("sample", 1)
        return self._choose(self._hidden_at(places), sampling)

    def score(self, places: NDArray[np.int32], targets: NDArray[np.int32]) -> TokenLogprobs:
        """The numbers of given tokens; padding points at the null page."""
        assert len(places) == len(targets) == self.buckets.score_rows
        live = int((places // PAGE_SIZE != NULL_PAGE).sum())
        self._call("score", live)
        hidden = self._hidden_at(places[:live]) + [0] * (len(places) - live)
        return numbers(hidden, [int(target) for target in targets], self.nan_token)

    def reset(self) -> None:
        """Forgets every page."""
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

    def _store(self, table: NDArray[np.int32], tokens: NDArray[np.int32], start: int) -> int:
        """Writes tokens from position `start` on; the hidden state after the last one."""
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

    def _choose(self, hidden: list[int], sampling: SamplingArrays) -> StepOutput:
        tokens = []
        for row, h in enumerate(hidden):
            high, low = (int(word) for word in sampling.seed[row])
            shift = shift_of(high << 32 | low, int(sampling.step[row])) if sampling.temperature[row] > 0 else 0
            assert sampling.banned[row].shape == (MAX_BANNED,)
            tokens.append(next_token(h, shift=shift, banned=[int(token) for token in sampling.banned[row]]))
        return StepOutput(np.asarray(tokens, np.int32), numbers(hidden, tokens, self.nan_token))


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a request has been told."""

    tokens: list[int]
    scores: list[tuple[float | list[int], ...]]
    reason: FinishReason
    stop_token_id: int | None
    prompt_scores: list[tuple[float | list[int], ...]] | None


def expected_outcome(prompt: list[int], params: SamplingParams, *, seed: int = 0, max_model_len: int) -> Outcome:
    """What a request computed alone is told, by the formulas above and no engine."""
    prompt_scores = None
    if params.prompt_logprobs:
        hidden = [hidden_after(prompt[:n]) for n in range(1, len(prompt))]
        prompt_scores = _rows(numbers(hidden, prompt[1:]))
    tokens: list[int] = []
    states: list[int] = []
    reason, stop = FinishReason.LENGTH, None
    while len(tokens) < params.max_tokens and stop is None:
        states.append(hidden_after(prompt + tokens))
        shift = shift_of(seed, len(tokens)) if params.temperature > 0 else 0
        banned = sorted(params.stop_token_ids) if len(tokens) < params.min_tokens else []
        tokens.append(next_token(states[-1], shift=shift, banned=banned))
        if tokens[-1] in params.stop_token_ids:
            reason, stop = FinishReason.STOP, tokens[-1]
        elif len(prompt) + len(tokens) >= max_model_len:
            break
    return Outcome(tokens, _rows(numbers(states, tokens)), reason, stop, prompt_scores)


def outcome_of(events: Sequence[TokenEvent]) -> Outcome:
    """All events of one finished request taken together."""
    last = events[-1]
    assert last.finish_reason is not None
    assert all(event.finish_reason is None for event in events[:-1])
    assert all(event.prompt_scores is None for event in events[1:])
    for event in events:
        assert len(event.token_ids) == len(event.scores.logprob)
    first = events[0].prompt_scores
    return Outcome(
        [token for event in events for token in event.token_ids],
        [row for event in events for row in _rows(event.scores)],
        last.finish_reason,
        last.stop_token_id,
        None if first is None else _rows(first),
    )


def _rows(scores: TokenScores | TokenLogprobs) -> list[tuple[float | list[int], ...]]:
    columns = (scores.logprob, scores.rank, scores.top_ids, scores.top_logprobs)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def greedy(max_tokens: int, *, prompt_logprobs: bool = False) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, prompt_logprobs=prompt_logprobs)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng([length, seed]).integers(0, VOCAB_SIZE, length)]


class CoreBench:
    """A core, its fake runner and what every request has been told."""

    def __init__(self, *, pages: int = 64, max_num_seqs: int = 4, max_model_len: int = MAX_MODEL_LEN) -> None:
        rows = tuple(n for n in (1, 2, 4) if n <= max_num_seqs)
        self.runner = FakeRunner(pages=pages, decode_rows=rows, pages_per_row=-(-max_model_len // 64))
        self.core = EngineCore(self.runner, max_model_len=max_model_len)
        self.events: dict[str, list[TokenEvent]] = {}

    def add(self, name: str, prompt: list[int], params: SamplingParams) -> Request:
        request = Request(name, prompt, params)
        request.seed = params.seed or 0
        self.core.add(request)
        self.events[name] = []
        return request

    def step(self) -> None:
        self.take(self.core.step())
        self.core.scheduler.check()

    def take(self, emitted: Sequence[tuple[Request, TokenEvent]]) -> None:
        for request, event in emitted:
            self.events[request.id].append(event)

    def run(self) -> None:
        for _ in range(3000):
            if not self.core.scheduler.num_requests:
                return
            self.step()
        raise AssertionError("the requests do not end")

    def fail(self) -> None:
        """A step that raises, and what the engine does then."""
        with pytest.raises(InjectedError):
            self.core.step()
        self.take(self.core.fail_all("it failed"))
        self.core.scheduler.check()

    def outcome(self, name: str) -> Outcome:
        return outcome_of(self.events[name])


def alone(request: Request, max_model_len: int = MAX_MODEL_LEN) -> Outcome:
    return expected_outcome(request.prompt_token_ids, request.params, seed=request.seed, max_model_len=max_model_len)
