"""Schemas of the answers of decisions, for /openapi.json and the tests, and their usage."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.token_logprobs import MIN_LOGPROB
from serve.jobs.results import Decision

_Probability = Annotated[float, Field(ge=0, le=1)]
_Logprob = Annotated[float, Field(ge=MIN_LOGPROB, description=f"{MIN_LOGPROB:.0f} for probability 0")]


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class OrderAnswer(_Answer):
    """What was read after the prompt with one order of the options."""

    order: list[int]
    probabilities: list[_Probability]
    logprobs: list[_Logprob]
    label_mass: float
    argmax_is_label: bool


class EvidenceAnswer(_Answer):
    """What an answer was computed from. Lists have one item per option, in the order of the question."""

    scoring: Literal["labels", "sequences", "permutations"]
    temperature: float
    logprobs: Annotated[list[_Logprob], Field(description="of labels or sequences, in the whole vocabulary")]
    label_mass: Annotated[float, Field(description="sum of the options' probabilities in the whole vocabulary")]
    argmax_is_label: Annotated[bool, Field(description="the most likely token is a label, or begins a sequence")]
    labels: list[list[str]] | None = None
    label_token_ids: list[list[int]]
    prompt_tokens: int
    cached_tokens: int
    prompt_token_ids: list[list[int]] | None = None
    confidence_formula: str | None = None
    score_formula: str | None = None
    normalize: Literal["sum", "token", "byte", "pmi"] | None = None
    normalized: list[float] | None = None
    prior_logprobs: list[_Logprob] | None = None
    encoded_apart: list[bool] | None = None
    counts_end_of_turn: bool | None = None
    orders: list[OrderAnswer] | None = None
    spread: list[float] | None = None


class PredicateAnswer(_Answer):
    type: Literal["predicate"]
    name: str | None
    probability: _Probability
    evidence: EvidenceAnswer


class OptionProbability(_Answer):
    value: str | bool
    probability: _Probability


class ChoiceAnswer(_Answer):
    type: Literal["choice"]
    name: str | None
    choice: str | bool
    confidence: _Probability
    probabilities: list[OptionProbability]
    evidence: EvidenceAnswer


class LevelProbability(_Answer):
    value: int
    label: str
    probability: _Probability


class ScaleAnswer(_Answer):
    type: Literal["score"]
    name: str | None
    score: float
    confidence: _Probability
    probabilities: list[LevelProbability]
    evidence: EvidenceAnswer


class InputTokens(_Answer):
    cached_tokens: int
    cache_write_tokens: Annotated[int, Field(description="tokens that were computed")]


class OutputTokens(_Answer):
    reasoning_tokens: int


class DecisionUsage(_Answer):
    """Tokens of all prompts; nothing is generated."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class DecisionsAnswer(_Answer):
    """Response of /v1/decisions: answers in the order of the questions."""

    answers: list[PredicateAnswer | ChoiceAnswer | ScaleAnswer]
    model: str
    usage: DecisionUsage


class NoulAnswer(_Answer):
    type: Literal["noul"]
    noul: _Probability
    evidence: EvidenceAnswer


class NamedChoiceAnswer(_Answer):
    type: Literal["choice"]
    choice: str
    confidence: _Probability
    probabilities: dict[str, _Probability]
    evidence: EvidenceAnswer


class NamedScaleAnswer(_Answer):
    type: Literal["score"]
    score: float
    confidence: _Probability
    legend: Annotated[dict[str, str | dict[str, Any] | list[Any]], Field(description="level -> its criterion")]
    probabilities: Annotated[dict[str, _Probability], Field(description="by level, from 0 on")]
    evidence: EvidenceAnswer


class SystemOneAnswer(_Answer):
    """Response of /v1/systemone: answers by the names of the questions."""

    answers: dict[str, NoulAnswer | NamedChoiceAnswer | NamedScaleAnswer]
    model: str
    usage: DecisionUsage


class ValidationDetail(_Answer):
    loc: list[str | int]
    msg: str
    type: str


class ValidationErrors(_Answer):
    """TypeSafe's envelope of errors in a request."""

    detail: list[ValidationDetail]


def decision_usage(decisions: Sequence[Decision]) -> dict[str, Any]:
    tokens = sum(decision.evidence.prompt_tokens for decision in decisions)
    cached = sum(decision.evidence.cached_tokens for decision in decisions)
    return {
        "input_tokens": tokens,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": tokens - cached},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens,
    }
