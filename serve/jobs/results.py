"""Results of `LLM`: the tokens of a text with their log-probs, batches of them, and decisions."""

import math
from collections import UserList
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model.token_logprobs import MIN_LOGPROB, TokenLogprobs, empty_logprobs
from serve.text.decisions.questions import QuestionType
from serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Tokens:
    """n tokens in columns. The first token of a sequence has no log-prob: NaN, and rank 0.

    Log-probs are natural logarithms of the raw distribution, -inf for a token of probability 0. Rank 1 is the most
    likely token; ties go to the lower id. Each token has the A most likely alternatives.
    """

    token_ids: list[int]
    tokens: list[str]  # bytes that are not UTF-8 as \\xNN
    logprobs: NDArray[np.float32] = field(repr=False)  # [n]
    ranks: NDArray[np.int32] = field(repr=False)  # [n]
    top_ids: NDArray[np.int32] = field(repr=False)  # [n, A], best first
    top_logprobs: NDArray[np.float32] = field(repr=False)  # [n, A]
    top_ranks: NDArray[np.int32] = field(repr=False)  # [n, A]

    @property
    def logprob(self) -> float:
        return logprob_sum(self.logprobs)

    @property
    def perplexity(self) -> float | None:
        """exp of the mean negative log-prob; None without log-probs."""
        return perplexity(self.logprob, int((self.ranks > 0).sum()))


@dataclass(frozen=True, slots=True, kw_only=True)
class CallArgument:
    """A top-level argument of a call."""

    name: str
    tokens: range  # of its value, in the output; the first and the last may reach beyond it
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call in an output. One that the output's end cuts off has no tokens and no log-probs."""

    id: str
    type: Literal["function", "custom"]
    name: str
    arguments: str  # JSON; of a custom tool, its input
    tokens: range | None  # of the output, with the mark before it
    logprob: float | None
    argument_logprobs: tuple[CallArgument, ...]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Generation(Tokens):
    """One output for one prompt. The columns are of the generated tokens, including one that ended the text."""

    index: int  # of the prompt
    choice: int  # number of the output for this prompt, from 0
    text: str
    content: str  # the text without reasoning and calls, which a chat divides as chat completions do
    reasoning: str | None
    answer_start: int | None  # index of the token after the reasoning; None before its end, and without marks of one
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str  # "stop", "length" or "tool_calls"
    stop_reason: str | int | None  # stop string that ended the text
    prompt_token_ids: list[int] = field(repr=False)
    prompt: Tokens | None = field(repr=False)  # with prompt_logprobs
    processed_logprobs: NDArray[np.float32] | None = field(repr=False)  # [n], with return_processed_logprobs
    allowed_mass: NDArray[np.float32] | None = field(repr=False)  # [n], of the tokens that a grammar allowed
    forced: list[bool] | None = field(repr=False)  # [n], the grammar allowed no other token
    # [prompt + n - 1, layers, experts per token], with return_routed_experts: ids of the experts of each token but the
    # last, which no step has computed; the best first, 0 in layers without experts.
    routed_experts: NDArray[np.int16] | None = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Score(Tokens):
    index: int  # of the text
    completion_start: int | None = None  # index of the completion's first token, if the text has a completion

    @property
    def completion_logprob(self) -> float | None:
        return None if self.completion_start is None else logprob_sum(self.logprobs[self.completion_start :])

    @property
    def is_greedy(self) -> bool | None:
        """True if every token of the completion has rank 1."""
        return None if self.completion_start is None else bool((self.ranks[self.completion_start :] == 1).all())


# Formulas of `Question.answer` in transformers; n options, p sorted as they are, D = sum p_i |i - best|.
CONFIDENCE_FORMULAS: dict[QuestionType, str | None] = {
    "noul": None,
    "choice": "max(0, (max(p) - 1/n) / (1 - 1/n))",
    "score": "max(0, 1 - sum(p[i] * |i - argmax(p)|) / mean(|i - (n-1)/2|))",
}
SCORE_FORMULA = "sum(i * p[i])"


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderEvidence:
    """What was read after the prompt with one order of the options. Lists are in the question's order of options."""

    order: tuple[int, ...]  # options in the order of the prompt
    probabilities: tuple[float, ...]
    logprobs: tuple[float, ...]  # in the whole vocabulary
    label_mass: float
    argmax_is_label: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a decision was computed from. Lists have one item per option; log-probs are natural logarithms."""

    scoring: str
    temperature: float
    # Of an option in the whole vocabulary: of all its labels together, or of its sequence. Of permutations: the
    # logarithm of the mean probability.
    logprobs: tuple[float, ...]
    label_mass: float  # sum of the probabilities of all options in the whole vocabulary
    argmax_is_label: bool  # the most likely next token is a label, or begins a sequence; of permutations, in all orders
    labels: tuple[tuple[str, ...], ...] | None  # texts of the labels; None for sequences
    label_token_ids: tuple[tuple[int, ...], ...]  # of the labels, or the sequence; of permutations, in the first order
    prompt_tokens: int  # of all prompts of the question
    cached_tokens: int  # of these
    prompt_token_ids: tuple[tuple[int, ...], ...] | None  # of each prompt, if requested
    # Sequences.
    normalize: str | None = None
    normalized: tuple[float, ...] | None = None  # values of which the probabilities are a softmax
    prior_logprobs: tuple[float, ...] | None = None  # after an empty state, for pmi
    encoded_apart: tuple[bool, ...] | None = None  # the option would have changed the prompt's last tokens
    counts_end_of_turn: bool | None = None  # the last token of each sequence is the end of the turn
    # Permutations.
    orders: tuple[OrderEvidence, ...] | None = None
    spread: tuple[float, ...] | None = None  # largest minus smallest probability of an option


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The answer to one question. Probabilities sum to 1: the largest, with 15 decimals, is what the others leave."""

    name: str | None  # of the question
    type: QuestionType
    options: tuple[str | bool, ...]  # of a noul, True and False
    probabilities: tuple[float, ...]  # by option
    choice: str | bool | None  # the most likely option of a choice
    score: float | None  # expected index of the level
    confidence: float | None  # None for a noul
    score_formula: str | None
    confidence_formula: str | None
    evidence: Evidence

    @property
    def probability(self) -> float:
        """The probability of the first option: of a noul, that it is true."""
        return self.probabilities[0]


_EVIDENCE_FIELDS = tuple(item.name for item in fields(Evidence))


def openai_answer(decision: Decision) -> dict[str, Any]:
    """An answer of POST /v1/decisions."""
    pairs = [*zip(decision.options, decision.probabilities, strict=True)]
    answer: dict[str, Any]
    match decision.type:
        case "noul":
            answer = {"type": "predicate", "name": decision.name, "probability": decision.probability}
        case "choice":
            probabilities = [{"value": value, "probability": probability} for value, probability in pairs]
            answer = {"type": "choice", "name": decision.name, "choice": decision.choice}
            answer |= {"confidence": decision.confidence, "probabilities": probabilities}
        case "score":
            probabilities = [
                {"value": i, "label": label, "probability": probability} for i, (label, probability) in enumerate(pairs)
            ]
            answer = {"type": "score", "name": decision.name, "score": decision.score}
            answer |= {"confidence": decision.confidence, "probabilities": probabilities}
    return answer | {"evidence": _evidence(decision)}


def typesafe_answer(decision: Decision, criteria: Any) -> dict[str, Any]:
    """An answer of POST /v1/systemone; `criteria` of the question, as they were sent."""
    answer: dict[str, Any]
    match decision.type:
        case "noul":
            answer = {"type": "noul", "noul": decision.probability}
        case "choice":
            probabilities = dict(zip(map(str, decision.options), decision.probabilities, strict=True))
            answer = {"type": "choice", "choice": decision.choice, "confidence": decision.confidence}
            answer |= {"probabilities": probabilities}
        case "score":
            answer = {"type": "score", "score": decision.score, "confidence": decision.confidence}
            answer |= {
                "legend": {str(i): criterion for i, criterion in enumerate(criteria)},
                "probabilities": {str(i): value for i, value in enumerate(decision.probabilities)},
            }
    return answer | {"evidence": _evidence(decision)}


def _evidence(decision: Decision) -> dict[str, Any]:
    """Evidence without fields that are None, and with MIN_LOGPROB for -inf."""
    evidence = decision.evidence
    values = {name: value for name in _EVIDENCE_FIELDS if (value := getattr(evidence, name)) is not None}
    for name in ("logprobs", "normalized", "prior_logprobs"):
        if name in values:
            values[name] = _clamped(values[name])
    if evidence.orders is not None:
        values["orders"] = [asdict(replace(order, logprobs=_clamped(order.logprobs))) for order in evidence.orders]
    formulas = {"confidence_formula": decision.confidence_formula, "score_formula": decision.score_formula}
    return values | {name: formula for name, formula in formulas.items() if formula is not None}


def _clamped(logprobs: Sequence[float]) -> tuple[float, ...]:
    return tuple(max(value, MIN_LOGPROB) for value in logprobs)


class Batch[T: (Generation, Score)](UserList[T]):
    """Results in the order of the inputs."""

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with one row per token.

        Columns: index, choice (generations only), part ("prompt", "completion" or "text"), position within the part,
        token_id, token, logprob, rank, and the lists top_ids, top_logprobs and top_ranks.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd  # type: ignore[import-untyped, unused-ignore]  # not a dependency
        except ImportError:
            raise ImportError("to_pandas() needs pandas: pip install pandas") from None
        parts = [part for item in self for part in _parts(item)]
        names = parts[0] if parts else ()
        return pd.DataFrame({name: [value for part in parts for value in part[name]] for name in names})


def token_columns(
    tokenizer: Tokenizer, token_ids: list[int], logprobs: TokenLogprobs, *, starts_sequence: bool
) -> dict[str, Any]:
    """Fields of a Tokens. If the tokens start a sequence, the first has no log-prob and no row of `logprobs`."""
    if starts_sequence:
        logprobs = TokenLogprobs.concatenate([empty_logprobs(1, logprobs.top_ids.shape[1]), logprobs])
    return {
        "token_ids": token_ids,
        "tokens": [tokenizer.token_text(token_id) for token_id in token_ids],
        "logprobs": logprobs.logprob,
        "ranks": logprobs.rank,
        "top_ids": logprobs.top_ids,
        "top_logprobs": logprobs.top_logprobs,
        "top_ranks": logprobs.top_ranks,
    }


def logprob_sum(logprobs: NDArray[np.float32]) -> float:
    """Sum of the log-probs that are not NaN, rounded once: it does not depend on their order."""
    return math.fsum(logprobs[~np.isnan(logprobs)].tolist())


def perplexity(logprob: float, tokens: int) -> float | None:
    """exp of the mean negative log-prob; None without tokens or if it overflows."""
    try:
        return math.exp(-logprob / tokens) if tokens else None
    except OverflowError:
        return None


def _rows(item: Tokens, rows: slice) -> Tokens:
    return Tokens(**{name: getattr(item, name)[rows] for name in Tokens.__slots__})


def _parts(item: Generation | Score) -> Iterator[dict[str, Sequence[Any]]]:
    """Columns of each part of a result for `Batch.to_pandas`."""
    parts: dict[str, Tokens | None]
    if isinstance(item, Generation):
        parts = {"prompt": item.prompt if item.choice == 0 else None, "completion": item}
    elif (start := item.completion_start) is None:
        parts = {"text": item}
    else:
        parts = {"prompt": _rows(item, slice(start)), "completion": _rows(item, slice(start, None))}
    for part, tokens in parts.items():
        if tokens is None:
            continue
        count = len(tokens.token_ids)
        yield {
            "index": [item.index] * count,
            **({"choice": [item.choice] * count} if isinstance(item, Generation) else {}),
            "part": [part] * count,
            "position": range(count),
            "token_id": tokens.token_ids,
            "token": tokens.tokens,
            "logprob": tokens.logprobs.tolist(),
            "rank": tokens.ranks.tolist(),
            "top_ids": tokens.top_ids.tolist(),
            "top_logprobs": tokens.top_logprobs.tolist(),
            "top_ranks": tokens.top_ranks.tolist(),
        }
