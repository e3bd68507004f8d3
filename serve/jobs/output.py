"""Output: the text, tokens and log-probs of one generation, from the engine's events."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model.token_logprobs import TokenLogprobs, empty_logprobs
from serve.engine.request import TokenEvent
from serve.text.detokenizer import Detokenizer
from serve.text.output_parts import Part
from serve.text.output_splitter import OutputSplitter

_BLOCK = 64  # steps whose log-probs are concatenated, so that the arrays of the steps are freed
_TOKEN_BYTES, _LOGPROB_BYTES = 64, 12  # id and text; float32, id and rank
_MASS_BYTES = 48  # a float32 object and a bool in lists
_PART_BYTES = 256


@dataclass(slots=True)
class Output:
    """Text and tokens that the engine generated: of one event, or of several after `add`."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # together one row per token id, or none
    processed: list[TokenLogprobs] = field(default_factory=list)  # with SamplingParams.return_processed, alike
    allowed_mass: list[np.float32] = field(default_factory=list)  # see TokenEvent
    forced: list[bool] = field(default_factory=list)
    cached_tokens: int = 0  # of the prompt
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # stop string or stop token id that ended the text, unless it is EOS
    prompt_logprobs: TokenLogprobs | None = None
    experts: list[NDArray[np.int16]] = field(default_factory=list)  # of TokenEvent.experts, in order
    # With an OutputSplitter, whose fields the last two are.
    parts: list[Part] = field(default_factory=list)
    answer_start: int | None = None
    reasoning_tokens: int = 0

    @property
    def nbytes(self) -> int:
        """Memory of the tokens and their log-probs, about."""
        parts = (*self.logprobs, *self.processed)
        numbers: int = sum(len(part.logprob) * (1 + part.top_ids.shape[1]) for part in parts)
        tokens = _TOKEN_BYTES * len(self.token_ids) + _LOGPROB_BYTES * numbers + _MASS_BYTES * len(self.allowed_mass)
        return tokens + _PART_BYTES * len(self.parts) + sum(part.nbytes for part in self.experts)

    def add(self, other: "Output") -> None:
        """Append the output of a later event."""
        self.text += other.text
        self.token_ids += other.token_ids
        self.allowed_mass += other.allowed_mass
        self.forced += other.forced
        _extend(self.logprobs, other.logprobs)
        _extend(self.processed, other.processed)
        self.cached_tokens = other.cached_tokens
        self.finish_reason, self.stop_reason = other.finish_reason, other.stop_reason
        self.prompt_logprobs = other.prompt_logprobs or self.prompt_logprobs
        self.experts += other.experts
        self.parts += other.parts
        self.answer_start, self.reasoning_tokens = other.answer_start, other.reasoning_tokens

    def tokens_from(self, start: int) -> "Output":
        """The tokens from index `start` on, without the text."""
        if start >= len(self.token_ids):
            return Output()

        def rows(parts: list[TokenLogprobs]) -> list[TokenLogprobs]:
            return [TokenLogprobs.concatenate(parts)[start:]] if parts else []

        return Output(
            token_ids=self.token_ids[start:],
            logprobs=rows(self.logprobs),
            processed=rows(self.processed),
            allowed_mass=self.allowed_mass[start:],
            forced=self.forced[start:],
        )

    def all_logprobs(self, alternatives: int) -> TokenLogprobs:
        """Scores of all tokens; `alternatives` is the number of columns if there are no tokens."""
        return TokenLogprobs.concatenate(self.logprobs or [empty_logprobs(0, alternatives)])

    def all_processed(self, alternatives: int) -> TokenLogprobs:
        """As `all_logprobs`, of the sampling distribution."""
        return TokenLogprobs.concatenate(self.processed or [empty_logprobs(0, alternatives)])


def _extend(parts: list[TokenLogprobs], others: list[TokenLogprobs]) -> None:
    """Append log-probs; the parts of a step, which are views of its arrays, are concatenated from time to time."""
    parts += others
    steps = next((i for i, part in enumerate(reversed(parts)) if len(part.logprob) > _BLOCK), len(parts))
    if steps > _BLOCK:
        parts[len(parts) - steps :] = [TokenLogprobs.concatenate(parts[len(parts) - steps :])]


class OutputDecoder:
    """Turns the events of one request into text, which ends at a stop string, and its parts."""

    def __init__(
        self, detokenizer: Detokenizer, eos_token_ids: frozenset[int], splitter: OutputSplitter | None = None
    ) -> None:
        self._detokenizer = detokenizer
        self._eos_token_ids = eos_token_ids
        self._splitter = splitter

    @property
    def found_stop(self) -> bool:
        """True if the output ends here, whatever the engine generates."""
        return self._detokenizer.stopped_by is not None or (self._splitter is not None and self._splitter.has_ended)

    def output(self, event: TokenEvent) -> Output:
        """Decode the next event. Tokens after a stop string are dropped."""
        text, count, parts = "", 0, list[Part]()
        for token_id in event.token_ids:
            count += 1
            piece = ""
            if token_id != event.stop_token_id or self._detokenizer.include_stop:
                piece = self._detokenizer.push(token_id)
                text += piece
            if self._splitter is not None:
                parts += self._splitter.push((token_id,), piece, is_complete=False)
            if self.found_stop:
                break
        reason: str | None = event.finish_reason
        stop_reason: str | int | None = None
        rest = ""
        if self.found_stop:
            reason, stop_reason = "stop", self._detokenizer.stopped_by
        elif reason is not None:
            rest = self._detokenizer.finish()
            text += rest
            stop_reason = None if event.stop_token_id in self._eos_token_ids else event.stop_token_id
        if reason is not None and self._splitter is not None:
            parts += self._splitter.push((), rest, is_complete=True)
        dropped = len(event.token_ids) - count
        return Output(
            text=text,
            token_ids=event.token_ids[:count],
            logprobs=[event.logprobs[:count]] if count else [],
            processed=[event.processed[:count]] if count and event.processed else [],
            allowed_mass=list(event.allowed_mass[:count]),
            forced=event.forced[:count],
            cached_tokens=event.cached_tokens,
            finish_reason=reason,
            stop_reason=stop_reason,
            prompt_logprobs=event.prompt_logprobs,
            experts=[] if event.experts is None else [event.experts[: len(event.experts) - dropped]],
            parts=parts,
            answer_start=self._splitter.answer_start if self._splitter else None,
            reasoning_tokens=self._splitter.reasoning_tokens if self._splitter else 0,
        )
