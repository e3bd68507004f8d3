"""What the engine is asked and what it answers: SamplingParams, Request, TokenEvent, PromptLogprobs."""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class FinishReason(enum.StrEnum):
    """Why a request ended; the first two are OpenAI's `finish_reason`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestStatus(enum.Enum):
    """Where a request stands in the scheduler."""

    WAITING = enum.auto()
    PREFILL = enum.auto()
    DECODE = enum.auto()
    SCORED = enum.auto()  # nothing to choose: it ends when its last scores are read
    FINISHED = enum.auto()


class Place(enum.Enum):
    """What a request is told where the queue is full."""

    REFUSED = enum.auto()
    WAITS = enum.auto()  # the same, but its client is not sent away: another of the client's requests is being served
    GIVEN = enum.auto()  # nothing: it comes after those of the same client, which have ended


class QueueFullError(Exception):
    """The engine holds as many waiting requests as it may; try again later."""

    def __init__(self, limit: str) -> None:
        """`limit` names what is reached, as its flag does."""
        super().__init__(limit)
        self.limit = limit


class QueueTimeoutError(Exception):
    """The request waited for as long as it may."""


class DeadlineError(Exception):
    """The request did not end by the time by which it had to."""


class NotHeldError(Exception):
    """The request is not held for questions, or no longer."""


class EngineStoppedError(Exception):
    """The engine has stopped or failed and takes no more requests."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one request may ask for."""

    max_model_len: int  # tokens of prompt and output together
    max_logprobs: int  # K: alternatives per token
    vocab_size: int  # V: ids are below it
    cache_tokens: int  # that the pages hold: a request that needs more can never run
    max_scored_ids: int  # B: of logprob_token_ids and prompt_logprob_token_ids
    whole_vocabulary: bool  # whether prompt rows may be asked for whole (PromptScoring.whole)


@dataclass(frozen=True, slots=True)
class PromptScoring:
    """What is told about the tokens of a prompt. The numbers are raw: sampling parameters never touch them."""

    start: int = 1  # the first prompt token whose numbers are asked for; 1 is all, as the first has none
    token_ids: tuple[int, ...] = ()  # the alternatives shown are these instead of the K best
    # No scores in the events: once the request has ended it is held until abort(), so that Engine.vocabulary() can be
    # asked for the whole distribution before each prompt token.
    whole: bool = False


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and what is told about them. Validated where it is made (serve.api)."""

    max_tokens: int  # 0 chooses nothing: the prompt is scored
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # int64; None draws one
    min_tokens: int = 0  # until so many are chosen, stop_token_ids are forbidden
    stop_token_ids: frozenset[int] = frozenset()  # end the request; the model's EOS ids are in it unless ignored
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit
    allowed_token_ids: frozenset[int] | None = None  # None is all
    bad_words: tuple[tuple[int, ...], ...] = ()  # runs of ids that the output may not contain
    logprob_token_ids: tuple[int, ...] = ()  # the alternatives shown are these instead of the K best
    processed: bool = False  # the numbers of chosen tokens are of what they are drawn from, not of the raw distribution
    prompt: PromptScoring | None = None

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a choice, apart from temperature and masks."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return bool(self.logit_bias) or penalties != (0.0, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probs of a run of tokens, in columns. Row i: the token's own numbers, then those of its alternatives.

    A is K, the best of the distribution, unless the request named the ids.
    """

    logprob: NDArray[np.float32]  # [n] natural log
    rank: NDArray[np.int32]  # [n] 1 = most likely; unique: ties go to the lower id
    top_ids: NDArray[np.int32]  # [n, A] best first, or as named
    top_ranks: NDArray[np.int32]  # [n, A]
    top_logprobs: NDArray[np.float32]  # [n, A]

    def __getitem__(self, rows: slice) -> "TokenScores":
        """Some of the rows, as views."""
        return TokenScores(*(getattr(self, name)[rows] for name in self.__slots__))


@dataclass(slots=True)
class TokenEvent:
    """One output of the engine for one request: tokens chosen since the last event (none for pure scoring)."""

    token_ids: list[int]
    scores: TokenScores  # one row per token id
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop id that ended it, EOS included
    # First event only: row i scores prompt token i + 1, so n = prompt - 1. Rows before PromptScoring.start are NaN.
    prompt_scores: TokenScores | None = None
    cached_tokens: int = 0  # prompt tokens that the prefix cache had; the same in all events
    error: str | None = None  # with FinishReason.ERROR: what may be told to the client
    stopped: bool = False  # with FinishReason.ABORT: because the engine was told to stop; `Engine.submit` raises it


class Mask(Protocol):
    """Which tokens a request may choose next."""

    waits: bool  # the row depends on the token chosen last: it must be read before the next step can begin

    def row(self, output_token_ids: Sequence[int], num_chosen: int) -> NDArray[np.uint32] | None:
        """Packed words [W] as in `SamplingArrays.mask`, None = any token."""


@dataclass(slots=True)
class RequestTimes:
    """When things happened to a request, in seconds of time.monotonic()."""

    arrived: float = 0.0
    admitted: float = 0.0  # ran for the first time
    first: float = 0.0  # token
    last: float = 0.0  # token, or the end of a scoring


@dataclass(eq=False, slots=True)
class Request:
    """One sequence in the engine. Whoever submits it sets the first fields, up to place, and changes no other."""

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0  # lower runs first
    cache_salt: str = ""  # only requests of the same salt share pages
    queue_seconds: float = math.inf  # that it may wait until it runs
    end_by: float = math.inf  # time.monotonic() by which it must have ended
    place: Place = Place.REFUSED
    status: RequestStatus = RequestStatus.WAITING
    arrival: int = 0  # order of submission
    slot: int = -1  # its place in the device's SlotState while it runs
    output_token_ids: list[int] = field(default_factory=list)
    max_chosen: int = 0  # tokens to choose at most: max_tokens, or what the context leaves
    num_chosen: int = 0  # output tokens, those included that are still on the device
    pages: list[int] = field(default_factory=list)  # block table: pages held, in order
    hashes: list[bytes] = field(default_factory=list)  # of the leading pages that are full
    num_computed: int = 0  # leading tokens whose keys, values and hidden states are in the pages
    num_registered: int = 0  # leading pages that are known by their content
    num_cached: int | None = None  # prompt tokens that the prefix cache had when the request first ran
    num_scored: int = 0  # leading rows of prompt_scores that are filled, or will be by steps already begun
    prompt_scores: TokenScores | None = None
    mask: Mask | None = None
    seed: int = 0  # the seed in use: the one asked for, or one drawn at submit
    times: RequestTimes = field(default_factory=RequestTimes)

    @property
    def num_tokens(self) -> int:
        """Prompt and output together, chosen tokens that are still on the device included."""
        return len(self.prompt_token_ids) + self.num_chosen

    @property
    def prefill_end(self) -> int:
        """Tokens that prefill computes: all but the last, which the next decode step runs."""
        return self.num_tokens - 1

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids of positions start..end-1, prompt and output in one line."""
        split = len(self.prompt_token_ids)
        return self.prompt_token_ids[start:end] + self.output_token_ids[max(0, start - split) : max(0, end - split)]


def empty_scores(rows: int, alternatives: int) -> TokenScores:
    """Columns to be filled. Log-probs start as NaN, so that a row that nobody filled is found out."""
    return TokenScores(
        logprob=np.full(rows, np.nan, np.float32),
        rank=np.zeros(rows, np.int32),
        top_ids=np.zeros((rows, alternatives), np.int32),
        top_ranks=np.zeros((rows, alternatives), np.int32),
        top_logprobs=np.full((rows, alternatives), np.nan, np.float32),
    )
