"""RequestState: the engine's part of a request. Only the engine's thread writes to it after admission."""

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from model.token_logprobs import TokenLogprobs
from serve.engine.request import Request, SamplingParams, TokenEvent

if TYPE_CHECKING:  # Ray's front uses the metrics without jax
    from serve.engine.token_mask import TokenMask


class RequestStatus(enum.Enum):
    WAITING = enum.auto()
    PREFILL = enum.auto()
    DECODE = enum.auto()
    SCORED = enum.auto()  # nothing to generate: finishes when its last step is read
    FINISHED = enum.auto()


@dataclass(slots=True)
class RequestTimes:
    """Times of events, in seconds of time.monotonic(); 0 before the event."""

    arrived: float = 0.0
    scheduled: float = 0.0  # when it first ran
    first: float = 0.0  # first token
    last: float = 0.0  # last token, or end of scoring


@dataclass(eq=False, slots=True)
class RequestState:
    request: Request
    seed: int = 0  # uint64, the request's own or a drawn one
    times: RequestTimes = field(default_factory=RequestTimes)
    status: RequestStatus = RequestStatus.WAITING
    arrival: int = 0  # order of arrival
    slot: int = -1  # row of the device's SlotState while the request runs
    mask: "TokenMask | None" = None
    waits_for_mask: bool = False  # the mask of the next token is not known: no decode step has a row of the request
    output_token_ids: list[int] = field(default_factory=list)
    max_output_tokens: int = 0  # max_tokens, or the rest of the context if that is less
    num_output_tokens: int = 0  # output tokens, including those not yet read from the device
    pages: list[int] = field(default_factory=list)  # block table
    hashes: list[bytes] = field(default_factory=list)  # of the leading full pages
    num_computed: int = 0  # leading tokens whose keys, values and hidden states are in the pages
    num_registered: int = 0  # leading pages registered by their content
    num_preemptions: int = 0
    num_cached: int | None = None  # prompt tokens found in the prefix cache when the request first ran
    num_scored: int = 0  # leading rows of prompt_logprobs that are filled, or will be by steps in flight
    prompt_logprobs: TokenLogprobs | None = None
    prompt_experts: NDArray[np.int16] | None = (
        None  # [n, L, k] from SamplingParams.experts_start on, but the last token
    )

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.request.prompt_token_ids

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def num_tokens(self) -> int:
        """Length of prompt and output, including tokens not yet read from the device."""
        return len(self.prompt_token_ids) + self.num_output_tokens

    @property
    def generates(self) -> bool:
        """False if only the prompt is scored: such a request needs no slot."""
        return self.max_output_tokens > 0

    @property
    def num_choices(self) -> int:
        """Number of output tokens that one step can choose: the tokens that are forced, and the one after them."""
        return 1 if self.mask is None else self.mask.num_choices

    @property
    def num_known(self) -> int:
        """Leading tokens that are computed, and known to the host."""
        return min(self.num_computed, len(self.prompt_token_ids) + len(self.output_token_ids))

    @property
    def prefill_end(self) -> int:
        """Number of tokens that prefill computes: all but the last, which the next decode step computes."""
        return self.num_tokens - 1

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids at positions start..end-1 of prompt and output."""
        split = len(self.prompt_token_ids)
        return self.prompt_token_ids[start:end] + self.output_token_ids[max(0, start - split) : max(0, end - split)]


type Emitted = tuple[RequestState, TokenEvent]
