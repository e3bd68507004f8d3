"""What the engine is asked and what it answers: SamplingParams, Request, TokenEvent, PromptLogprobs."""

import enum
from dataclasses import dataclass, field

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
    FINISHED = enum.auto()


class QueueFullError(Exception):
    """The engine holds as many waiting requests as it may; try again later."""


class EngineStoppedError(Exception):
    """The engine has stopped or failed and takes no more requests."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one request may ask for."""

    max_model_len: int  # tokens of prompt and output together
    max_logprobs: int  # K: alternatives per token
    vocab_size: int  # V: ids are below it
    max_banned_ids: int  # ids that min_tokens can hold back


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and what is told about them. Validated where it is made (serve.openai)."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # int64; None draws one
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # end the request; the model's EOS ids are in it unless ignored
    prompt_logprobs: bool = False  # score the prompt into Request.prompt_scores


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probs of a run of tokens, in columns. Row i: the token's own numbers, then the K best of its distribution."""

    logprob: NDArray[np.float32]  # [n] natural log
    rank: NDArray[np.int32]  # [n] 1 = most likely; unique: ties go to the lower id
    top_ids: NDArray[np.int32]  # [n, K] best first
    top_logprobs: NDArray[np.float32]  # [n, K]


@dataclass(slots=True)
class TokenEvent:
    """One output of the engine for one request: tokens chosen since the last event (none for pure scoring)."""

    token_ids: list[int]
    scores: TokenScores  # one row per token id
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop id that ended it, EOS included
    prompt_scores: TokenScores | None = None  # first event only: row i scores prompt token i + 1, so n = prompt - 1
    error: str | None = None  # with FinishReason.ERROR: what may be told to the client


@dataclass(eq=False, slots=True)
class Request:
    """One sequence in the engine. Whoever submits it sets the first three fields and reads no other."""

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)  # block table: pages held, in order
    num_computed: int = 0  # leading tokens whose keys, values and hidden states are in the pages
    num_scored: int = 0  # leading rows of prompt_scores that are filled
    prompt_scores: TokenScores | None = None
    seed: int = 0  # the seed in use: the one asked for, or one drawn at submit

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def prefill_end(self) -> int:
        """Tokens that prefill computes: all but the last chosen one, which the next decode step runs."""
        return len(self.prompt_token_ids) + max(0, len(self.output_token_ids) - 1)

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids of positions start..end-1, prompt and output in one line."""
        split = len(self.prompt_token_ids)
        return self.prompt_token_ids[start:end] + self.output_token_ids[max(0, start - split) : max(0, end - split)]


def empty_scores(rows: int, k: int) -> TokenScores:
    """Columns to be filled. Log-probs start as NaN, so that a row that nobody filled is found out."""
    return TokenScores(
        logprob=np.full(rows, np.nan, np.float32),
        rank=np.zeros(rows, np.int32),
        top_ids=np.zeros((rows, k), np.int32),
        top_logprobs=np.full((rows, k), np.nan, np.float32),
    )
