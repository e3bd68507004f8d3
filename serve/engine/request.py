"""The engine's input and output types: Request and SamplingParams, TokenEvent, and its errors."""

import enum
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model.token_logprobs import TokenLogprobs, empty_logprobs
from serve.engine.grammar import Grammar


class FinishReason(enum.StrEnum):
    """Why a request finished; the first two are OpenAI's `finish_reason`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class QueueFullError(Exception):
    """The queue is full; `limit` is the name of the option whose limit is reached."""

    def __init__(self, limit: str) -> None:
        super().__init__(limit)
        self.limit = limit


class QueueTimeoutError(Exception):
    """The request did not start within its `queue_timeout`."""


class DeadlineError(Exception):
    """The request did not finish by its `deadline`."""


class NotPinnedError(Exception):
    """The pages of the request are not pinned, or no longer."""


class EngineStoppedError(Exception):
    """The engine has stopped or failed and admits no more requests."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    max_model_len: int  # tokens of prompt and output together
    max_logprobs: int  # K, alternatives per token
    vocab_size: int  # V, exclusive upper bound of token ids
    cache_tokens: int  # capacity of the page cache in tokens; a request that needs more can never run
    max_requested_ids: int  # B, maximum length of logprob_token_ids and prompt_logprob_token_ids
    full_vocab: bool  # PromptScoring.full_vocab is available
    routing: tuple[int, int] | None = None  # L and k of TokenEvent.experts; None: the model has no experts


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of an engine, named like their flags."""

    max_num_batched_tokens: int  # prompt and decode tokens per step
    max_num_queued_reqs: int  # unfinished requests; more raise QueueFullError
    max_num_queued_tokens: int | None = None  # prompt tokens of all unfinished requests; more raise QueueFullError
    enable_prefix_caching: bool = True
    seed: int | None = None  # seeds the draw of seeds for requests without one; None draws them from the system
    # How long the pages of a request stay pinned without a call of full_vocab_logprobs(), so that a client that stops
    # reading does not keep them from other requests.
    pin_seconds: float = 120


@dataclass(frozen=True, slots=True)
class PromptScoring:
    """Which prompt tokens are scored. Their log-probs are always of the raw distribution."""

    start: int = 1  # index of the first prompt token to score; the token at index 0 has no log-prob
    requested_ids: tuple[int, ...] = ()  # alternatives to report instead of the K best
    # Score nothing now: when the request has finished, its pages stay pinned until abort(), and full_vocab_logprobs()
    # returns the distribution over the full vocabulary before each prompt token.
    full_vocab: bool = False


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, and which log-probs are returned. Callers validate the values."""

    max_tokens: int  # 0 generates nothing: only the prompt is scored
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # int64; None draws one
    min_tokens: int = 0  # stop_token_ids are masked until this number of tokens is generated
    stop_token_ids: frozenset[int] = frozenset()  # finish the request; includes the model's EOS ids unless ignored
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # pairs of token id and the value added to its logit
    allowed_token_ids: frozenset[int] | None = None  # None allows all
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that the output must not contain
    requested_ids: tuple[int, ...] = ()  # alternatives to report instead of the K best
    processed: bool = False  # log-probs of generated tokens are of the sampling distribution, not the raw one
    return_processed: bool = False  # those of the sampling distribution are returned, too, as TokenEvent.processed
    grammar: Grammar | None = None  # of the output; combined with the other constraints
    prompt: PromptScoring | None = None
    experts_start: int | None = None  # index of the first prompt token whose experts are returned; None: of no token

    @property
    def adjusts(self) -> bool:
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return bool(self.logit_bias) or penalties != (0.0, 0.0, 1.0)


@dataclass(slots=True)
class TokenEvent:
    """One output of the engine for one request: the tokens generated since the last event."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: TokenLogprobs = field(default_factory=lambda: empty_logprobs(0, 0))  # one row per token id
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop id that finished the request, EOS included
    processed: TokenLogprobs | None = None  # of the sampling distribution, with SamplingParams.return_processed
    # Per token id: the probability, in the raw distribution, of the tokens that were allowed; 1 if all were.
    allowed_mass: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    forced: list[bool] = field(default_factory=list)  # per token id: the grammar allowed no other
    # In the first event only. Row i scores prompt token i + 1; rows before PromptScoring.start - 1 are undefined.
    prompt_logprobs: TokenLogprobs | None = None
    # With SamplingParams.experts_start, [n, L, k]: the ids of the experts of the token before each token id, the best
    # first, 0 in layers without experts. In the first event those of all tokens from `experts_start` on.
    experts: NDArray[np.int16] | None = None
    cached_tokens: int = 0  # prompt tokens found in the prefix cache; equal in all events of a request
    error: str | None = None  # with FinishReason.ERROR, a message that clients may see
    grammar_failed: bool = False  # with FinishReason.ERROR: the request's own constraints allow no token
    stopped: bool = False  # with FinishReason.ABORT, because the engine stops; iterating over the handle raises it


@dataclass(eq=False, frozen=True, slots=True)
class Request:
    """What a client asks of the engine: one prompt, one output."""

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0  # lower runs first
    cache_salt: str = ""  # only requests with the same salt share pages
    queue_timeout: float = math.inf  # maximum time in the queue, seconds
    deadline: float = math.inf  # time.monotonic() by which the request must have finished
    owner: str | None = None  # only requests of one owner share part of a page: others could guess token by token
