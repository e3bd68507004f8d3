"""Schedule: the work of one step."""

from dataclasses import dataclass, field

from serve.engine.request_state import RequestState


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start..end-1 to prefill, or rows start..end-1 of prompt_logprobs; row i scores prompt token i + 1."""

    request: RequestState
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A row of a decode step, which computes the token before output token `index`, and chooses that one."""

    request: RequestState
    index: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """The work of one step, in order of dispatch."""

    preempted: list[RequestState] = field(default_factory=list)  # while it was planned
    copies: list[tuple[int, int]] = field(default_factory=list)  # page to copy, and the page that it is copied to
    prefills: list[Chunk] = field(default_factory=list)
    scores: list[Chunk] = field(default_factory=list)
    scored: list[RequestState] = field(default_factory=list)  # finished when this step is read: nothing to generate
    started: list[RequestState] = field(default_factory=list)  # their prompts are computed: they decode from now on
    decodes: list[DecodeRow] = field(default_factory=list)  # rows of one request are neighbours, in order

    def __bool__(self) -> bool:
        work = (self.copies, self.prefills, self.scores, self.scored, self.started, self.decodes)
        return any(work)
