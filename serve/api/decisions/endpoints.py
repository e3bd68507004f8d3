"""POST /v1/decisions (OpenAI's) and POST /v1/systemone (TypeSafe's): the same decisions in two forms."""

import math
import re
import uuid
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import mul
from typing import Any

import orjson

from serve.api.decisions.requests import DecisionFields, DecisionsRequest, SystemOneRequest
from serve.api.decisions.responses import decision_usage
from serve.api.errors import MAX_MESSAGE, APIError, invalid
from serve.api.middleware import AnswerRecord
from serve.api.request_group import RequestGroup
from serve.api.scoring import ScoringHandler, ScoringJob
from serve.jobs.decide import Decider
from serve.jobs.results import Decision, openai_answer, typesafe_answer
from serve.text.chat import PromptError
from serve.text.decisions.conversation import check_unique_keys
from serve.text.decisions.encoder import Prompt
from serve.text.decisions.plan import DecisionPlan, QuestionPlan
from serve.text.decisions.questions import (
    MAX_ORDERS,
    DecisionRequest,
    Question,
    ScoringOptions,
    decision_request,
    scoring_options,
)

_MAX_READS = 16_384  # prompts of one request
_TEXTS = 4  # times that the text of an option is in an answer, at most
# Bytes of JSON, at most.
_OPTION_BYTES, _ORDER_BYTES, _QUESTION_BYTES, _ID_BYTES = 250, 60, 1000, 8


class _DecisionHandler[B: (DecisionsRequest, SystemOneRequest)](ScoringHandler[B]):
    operation = "decide"

    def _job(self, body: B, name: str, record: AnswerRecord) -> ScoringJob:
        context = self._context
        options = self._options(body)
        request = self._request(body)
        raw = body.questions if isinstance(body.questions, list) else body.questions.values()
        sizes = [len(orjson.dumps(question)) for question in raw]
        self._check_reads(request.questions, sizes, options)
        group = RequestGroup(context, record, body, self._cache_salt(body))
        decider = Decider(group, context.engine.limits)
        plan = context.decisions.plan(request, options, decider.max_prompt_tokens)
        tokens = 0
        for question in plan.questions:
            lengths = [len(prompt) for prompt in _prompts(question)]
            if not all(lengths):
                raise question.question.error("", "its prompt gives no tokens.")
            tokens += sum(lengths)

        def render(decisions: list[Decision]) -> dict[str, Any]:
            return {"answers": self._answers(body, decisions), "model": name, "usage": decision_usage(decisions)}

        ids = tokens if options.return_token_ids else 0
        return ScoringJob(group, tokens, _answer_bytes(plan, sum(sizes), ids), partial(decider.run, plan), render)

    def _check_reads(self, questions: Sequence[Question], sizes: Sequence[int], options: ScoringOptions) -> None:
        """Limit the prompts of one request, and the memory that their texts take."""
        orders = [_orders(question, options) for question in questions]
        if options.scoring == "sequences":
            reads = sum(len(question.options) for question in questions) * (2 if options.normalize == "pmi" else 1)
        else:
            reads = sum(orders)
        if reads > _MAX_READS:
            message = (
                f"The request needs {reads} prompts, one for each order or option, above the maximum of {_MAX_READS}"
            )
            raise invalid("questions", f"{message}: send fewer questions.", "array_above_max_length")
        size, maximum = sum(map(mul, orders, sizes)), self._context.config.max_body_bytes
        if size > maximum:
            message = f"The questions in all their orders have {size} bytes, more than the maximum of {maximum}"
            raise invalid("permutations", f"{message} (--max-body-bytes).", "array_above_max_length")

    def _options(self, body: B) -> ScoringOptions:
        values = {name: value for name in ScoringOptions.model_fields if (value := getattr(body, name)) is not None}
        return scoring_options({"scoring": self._context.config.decision_scoring} | values)

    def _cache_salt(self, body: B) -> str:
        return body.cache_salt or ""

    @abstractmethod
    def _request(self, body: B) -> DecisionRequest:
        """Raise PromptError for invalid questions, input or state."""

    @abstractmethod
    def _answers(self, body: B, decisions: Sequence[Decision]) -> Any: ...


class Decisions(_DecisionHandler[DecisionsRequest]):
    """OpenAI's form."""

    model = DecisionsRequest

    def _request(self, body: DecisionsRequest) -> DecisionRequest:
        return decision_request(_required(body, "input", "questions"))

    def _cache_salt(self, body: DecisionsRequest) -> str:
        options = body.prompt_cache_options
        if options is not None and options.mode == "explicit" and not _has_breakpoint(body.input):
            return uuid.uuid4().hex  # OpenAI: such a request does not use the cache
        # No cache_salt has a slash.
        return f"{body.cache_salt or ''}/{body.prompt_cache_key}" if body.prompt_cache_key else body.cache_salt or ""

    def _answers(self, body: DecisionsRequest, decisions: Sequence[Decision]) -> list[dict[str, Any]]:
        del body
        return [openai_answer(decision) for decision in decisions]


class SystemOne(_DecisionHandler[SystemOneRequest]):
    """TypeSafe's form. Errors in fields are lists, with the status 422."""

    model = SystemOneRequest

    def _parse(self, data: bytes) -> dict[str, Any]:
        values = super()._parse(data)
        questions = values.get("questions")
        with _detailed_errors(questions if isinstance(questions, dict) else ()):
            check_unique_keys(data)
        return values

    def _validate(self, values: dict[str, Any]) -> SystemOneRequest:
        with _detailed_errors():
            return super()._validate(values)

    def _job(self, body: SystemOneRequest, name: str, record: AnswerRecord) -> ScoringJob:
        names = body.questions if isinstance(body.questions, dict) else ()
        with _detailed_errors(names):
            job = super()._job(body, name, record)

        async def run() -> Any:
            with _detailed_errors(names):
                return await job.run()

        return replace(job, run=run)

    def _request(self, body: SystemOneRequest) -> DecisionRequest:
        return decision_request(_required(body, "state", "questions"))

    def _answers(self, body: SystemOneRequest, decisions: Sequence[Decision]) -> dict[str, dict[str, Any]]:
        return {
            name: typesafe_answer(decision, question.get("criteria"))
            for (name, question), decision in zip(body.questions.items(), decisions, strict=True)
        }


def _required(body: DecisionFields, *names: str) -> dict[str, Any]:
    """Fields that must be there. Raise APIError 400 for one that is missing or null."""
    for name in names:
        if getattr(body, name) is None:
            raise invalid(name, f"`{name}` is missing.", "missing_required_parameter")
    return {name: getattr(body, name) for name in names}


def _orders(question: Question, options: ScoringOptions) -> int:
    """Prompts of a question, at most."""
    if options.scoring != "permutations":
        return 1
    return min(options.permutations or MAX_ORDERS, math.factorial(len(question.options)))


def _prompts(plan: QuestionPlan) -> Iterator[Prompt]:
    yield from (readout.prompt for readout in plan.readouts)
    if plan.sequences is not None:
        yield from (prompt for prompt in (plan.sequences.prompt, plan.sequences.prior) if prompt is not None)


def _answer_bytes(plan: DecisionPlan, text_bytes: int, prompt_ids: int) -> int:
    """Upper bound of an answer's JSON; `text_bytes` are those of the questions."""
    size = _TEXTS * text_bytes + prompt_ids * _ID_BYTES
    for question in plan.questions:
        options = len(question.question.options)
        size += _QUESTION_BYTES + options * (_OPTION_BYTES + len(question.readouts) * _ORDER_BYTES)
        if question.sequences is not None:
            size += sum(map(len, question.sequences.sequences)) * _ID_BYTES
    return size


def _has_breakpoint(items: Any) -> bool:
    """True if a part of OpenAI's input items has a cache breakpoint."""
    contents = [item.get("content") or item.get("output") for item in items] if isinstance(items, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(part.get("prompt_cache_breakpoint") is not None for part in parts)


@dataclass
class DetailedError(APIError):
    """An error in a field, in FastAPI's envelope."""

    location: list[str | int] = field(default_factory=list)  # in the body

    @property
    def body(self) -> dict[str, Any]:
        detail = {"loc": ["body", *self.location], "msg": self.message[:MAX_MESSAGE], "type": self.code or ""}
        return {"detail": [detail]}


@contextmanager
def _detailed_errors(names: Iterable[str] = ()) -> Iterator[None]:
    """Raise errors in fields as DetailedErrors; `names` are those of the questions."""
    try:
        yield
    except PromptError as error:
        location = _location(error.param, names)
        raise DetailedError(422, str(error), error.param, error.code, location=location) from None
    except APIError as error:
        if error.status != 400 or error.param is None:
            raise
        location = _location(error.param, names)
        raise DetailedError(422, error.message, error.param, error.code, location=location) from None


def _location(param: str, names: Iterable[str]) -> list[str | int]:
    """The steps of a path such as "questions.tone.criteria[2]". A name may contain any character."""
    start: list[str | int] = []
    rest = param.removeprefix("questions.")
    found = [name for name in names if rest == name or rest.startswith((f"{name}.", f"{name}["))]
    if found and rest != param:
        start, param = ["questions", max(found, key=len)], rest[len(max(found, key=len)) :]
    return start + [int(part) if part.isdecimal() else part for part in re.findall(r"[^.\[\]]+", param)]
