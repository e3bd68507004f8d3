"""Decisions: the probabilities of named options, read from a model's log-probs after a prompt."""

import math
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from decimal import Decimal
from itertools import batched
from typing import Any

from serve.engine.request import EngineLimits
from serve.jobs.request_queue import RequestError, RequestQueue
from serve.jobs.results import CONFIDENCE_FORMULAS, SCORE_FORMULA, Decision, Evidence, OrderEvidence
from serve.jobs.score import Continuation, score_continuation
from serve.text.chat import PromptError
from serve.text.decisions.encoder import Prompt
from serve.text.decisions.plan import DecisionPlan, LabelReadout, QuestionPlan, SequenceReadout
from serve.text.decisions.questions import Question


@dataclass(frozen=True, slots=True)
class _Read:
    """One engine request: tokens after a prompt that are scored, and ids whose log-probs are read before the last."""

    prompt: Prompt
    tokens: Sequence[int]
    requested_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.tokens)


type _Result = tuple[_Read, Continuation]


class Decider:
    """Answers the questions of plans that `DecisionFormat.plan` made."""

    def __init__(self, queue: RequestQueue, limits: EngineLimits) -> None:
        self._queue = queue
        self._limits = limits

    @property
    def max_prompt_tokens(self) -> int:
        """Maximum length of a prompt; one more token is scored after it."""
        return min(self._limits.max_model_len, self._limits.cache_tokens) - 1

    async def run(self, plan: DecisionPlan) -> list[Decision]:
        """One decision per question, in order. All engine requests are admitted at once, within the queue's bounds.

        Raises:
            PromptError: an option does not fit after its prompt.
            RequestError: the engine failed on a request.
            EngineStoppedError: the engine has stopped.
        """
        reads = [[*self._reads(question)] for question in plan.questions]
        for question, items in zip(plan.questions, reads, strict=True):
            longest = max(item.num_tokens for item in items)
            if longest > self.max_prompt_tokens + 1:
                message = (
                    f"its prompt and an option have {longest} tokens; there is room for {self.max_prompt_tokens + 1}."
                )
                raise question.question.error("", message, "context_length_exceeded")
        items = [item for part in reads for item in part]
        async with aclosing(self._queue.run_in_order(items, self._run, lambda item: item.num_tokens)) as stream:
            remaining = iter([scored async for scored in stream])
        return [
            _decision(question, [(item, next(remaining)) for item in part], plan)
            for question, part in zip(plan.questions, reads, strict=True)
        ]

    def stream(self, plans: Iterable[DecisionPlan]) -> AsyncGenerator[list[Decision]]:
        """Run many plans at the same time; yield the decisions of each, in order. Plans are read as `run` needs them.

        Raises as `run`.
        """
        return self._queue.run_in_order(plans, self.run, self._num_tokens)

    def stream_results[K](
        self, plans: Iterable[tuple[K, DecisionPlan | PromptError]]
    ) -> AsyncGenerator[tuple[K, list[Decision] | PromptError | RequestError]]:
        """As `stream`, for plans with keys; an error, of a plan or of its run, takes the place of the decisions.

        Raises EngineStoppedError.
        """

        async def run(item: tuple[K, DecisionPlan | PromptError]) -> tuple[K, Any]:
            key, plan = item
            try:
                return key, plan if isinstance(plan, PromptError) else await self.run(plan)
            except (PromptError, RequestError) as error:
                return key, error

        def num_tokens(item: tuple[K, DecisionPlan | PromptError]) -> int:
            return 0 if isinstance(item[1], PromptError) else self._num_tokens(item[1])

        return self._queue.run_in_order(plans, run, num_tokens)

    def _num_tokens(self, plan: DecisionPlan) -> int:
        return sum(read.num_tokens for question in plan.questions for read in self._reads(question))

    def _reads(self, plan: QuestionPlan) -> Iterator[_Read]:
        for readout in plan.readouts:
            ids = [label_id for group in readout.label_ids for label_id in group]
            for chunk in batched(ids, self._limits.max_requested_ids):
                yield _Read(readout.prompt, ids[:1], chunk)
        if (sequences := plan.sequences) is not None:
            for prompt in (sequences.prompt, sequences.prior):
                if prompt is not None:
                    yield from (_Read(prompt, ids) for ids in sequences.sequences)

    async def _run(self, read: _Read) -> Continuation:
        return await score_continuation(self._queue, read.prompt.token_ids, read.tokens, read.requested_ids)


def _decision(plan: QuestionPlan, results: list[_Result], request: DecisionPlan) -> Decision:
    question, options = plan.question, request.options
    if plan.sequences is not None:
        probabilities, fields = _sequence_results(plan, plan.sequences, results, options.normalize or "sum")
    else:
        probabilities, fields = _label_results(plan, results, options.scoring == "permutations")
    prompts = {id(read.prompt): (read.prompt, scored.cached_tokens) for read, scored in reversed(results)}.values()
    ids = tuple(tuple(prompt.token_ids) for prompt, _ in reversed(prompts)) if options.return_token_ids else None
    evidence = Evidence(
        scoring=options.scoring,
        temperature=plan.temperature,
        prompt_tokens=sum(len(prompt) for prompt, _ in prompts),
        cached_tokens=sum(cached for _, cached in prompts),
        prompt_token_ids=ids,
        **fields,
    )
    probabilities, mean = summing_to_one(probabilities)
    answer = plan.form.answer([*probabilities])
    values = tuple(option.value for option in question.options)
    best = values[max(range(len(values)), key=probabilities.__getitem__)]
    return Decision(
        name=question.name,
        type=question.type,
        options=values,
        probabilities=probabilities,
        choice=best if question.type == "choice" else None,
        score=mean if question.type == "score" else None,
        confidence=answer.get("confidence"),
        score_formula=SCORE_FORMULA if question.type == "score" else None,
        confidence_formula=CONFIDENCE_FORMULAS[question.type],
        evidence=evidence,
    )


def _label_results(
    plan: QuestionPlan, results: list[_Result], is_permuted: bool
) -> tuple[tuple[float, ...], dict[str, Any]]:
    remaining, orders = iter(results), list[OrderEvidence]()
    for readout in plan.readouts:
        orders.append(_order_evidence(plan, readout, remaining))
    first = plan.readouts[0]
    shared = {"labels": first.labels, "label_token_ids": first.label_ids}
    if not is_permuted:
        [order] = orders
        return order.probabilities, shared | {
            "logprobs": order.logprobs,
            "label_mass": order.label_mass,
            "argmax_is_label": order.argmax_is_label,
        }
    columns = [*zip(*(order.probabilities for order in orders), strict=True)]
    masses = [*zip(*(map(math.exp, order.logprobs) for order in orders), strict=True)]
    return tuple(map(_mean, columns)), shared | {
        "logprobs": tuple(_log(_mean(mass)) for mass in masses),
        "label_mass": _mean([order.label_mass for order in orders]),
        "argmax_is_label": all(order.argmax_is_label for order in orders),
        "orders": tuple(orders),
        "spread": tuple(max(column) - min(column) for column in columns),
    }


def _order_evidence(plan: QuestionPlan, readout: LabelReadout, results: Iterator[_Result]) -> OrderEvidence:
    by_id, is_top = dict[int, float](), False
    count = sum(map(len, readout.label_ids))
    while len(by_id) < count:
        read, scored = next(results)
        ranks = scored.logprobs.top_ranks[-1].tolist()
        by_id |= zip(read.requested_ids, scored.logprobs.top_logprobs[-1].tolist(), strict=True)
        is_top |= 1 in ranks
    logprobs = tuple(_log_sum([by_id[label_id] for label_id in group]) for group in readout.label_ids)
    return OrderEvidence(
        order=readout.order,
        probabilities=softmax(plan.question, logprobs, plan.temperature),
        logprobs=logprobs,
        label_mass=math.fsum(map(math.exp, by_id.values())),
        argmax_is_label=is_top,
    )


def _sequence_results(
    plan: QuestionPlan, readout: SequenceReadout, results: list[_Result], normalize: str
) -> tuple[tuple[float, ...], dict[str, Any]]:
    count = len(readout.sequences)
    sums = [math.fsum(scored.logprobs.logprob.tolist()) for _, scored in results]
    logprobs, priors = tuple(sums[:count]), tuple(sums[count:]) or None
    values = logprobs
    if normalize == "token":
        values = tuple(x / len(ids) for x, ids in zip(logprobs, readout.sequences, strict=True))
    elif normalize == "byte":
        values = tuple(x / size for x, size in zip(logprobs, readout.num_bytes, strict=True))
    elif priors is not None:
        # An option that is impossible after the state stays so, whatever its prior is.
        values = tuple(x if x == -math.inf else x - prior for x, prior in zip(logprobs, priors, strict=True))
    return softmax(plan.question, values, plan.temperature), {
        "logprobs": logprobs,
        "label_mass": math.fsum(map(math.exp, logprobs)),
        "argmax_is_label": any(scored.logprobs.rank[0] == 1 for _, scored in results[:count]),
        "labels": None,
        "label_token_ids": readout.sequences,
        "normalize": normalize,
        "normalized": values,
        "prior_logprobs": priors,
        "encoded_apart": readout.encoded_apart,
        "counts_end_of_turn": readout.end_of_turn is not None,
    }


def softmax(question: Question, values: Sequence[float], temperature: float) -> tuple[float, ...]:
    """exp(value / temperature), divided by their sum, by option.

    Raises:
        PromptError: all options are impossible, or one is only after the empty state of `pmi`.
        RequestError: a value is NaN.
    """
    highest = max(values)
    if any(map(math.isnan, values)):
        raise RequestError("the engine failed: a log-prob is not a number")
    if highest == -math.inf:
        raise question.error("", "all its options have the probability 0 after this prompt.")
    if highest == math.inf:
        raise question.error("", "an option has the probability 0 after an empty state; use another `normalize`.")
    weights = [math.exp((value - highest) / temperature) for value in values]
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def summing_to_one(probabilities: Sequence[float]) -> tuple[tuple[float, ...], float]:
    """Probabilities whose largest is what the others leave of 1, and their mean index.

    As decimals, the others are as they are, the largest has 15 places and the mean 14. So JSON's texts of them sum to
    1, and give the mean, within half a unit of the last place, as pydantic-ai demands.
    """
    values = [*map(Decimal, map(repr, probabilities))]
    largest = max(range(len(values)), key=values.__getitem__)
    values[largest] = 1 - (sum(values, Decimal(0)) - values[largest])
    mean = sum((i * value for i, value in enumerate(values)), Decimal(0))
    completed = (*probabilities[:largest], float(round(values[largest], 15)), *probabilities[largest + 1 :])
    return completed, float(round(mean, 14))


def _log_sum(logprobs: Sequence[float]) -> float:
    """Log of the sum of probabilities; one log-prob stays as it is, to the bit."""
    return logprobs[0] if len(logprobs) == 1 else _log(math.fsum(map(math.exp, logprobs)))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
