"""Questions with their options, and requests for decisions in OpenAI's and TypeSafe's form."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from serve.config.values import suggestion
from serve.text.chat import PromptError
from serve.text.decisions.conversation import check_json, content_text, is_blank, parse_input

MAX_QUESTIONS = 400
MAX_OPTIONS = 255
MAX_LEVELS = 10
MAX_ORDERS = 120  # all orders of 5 options
_MAX_LABELS = 16  # of one option
_FIELDS = ("state", "input", "questions")
# Of OpenAI's requests, and of lines of `logprobd decide`.
_WITHOUT_EFFECT = ("model", "prompt_cache_key", "prompt_cache_options", "safety_identifier", "id", "expected")
_NEEDED_SCORING = {"normalize": "sequences", "permutations": "permutations"}

type QuestionType = Literal["noul", "choice", "score"]


@dataclass(frozen=True, slots=True)
class Option:
    value: str | bool  # of a score, the text of the level
    description: Any = None  # text, object or list
    labels: tuple[str, ...] = ()  # texts whose tokens are read; () for the default label


@dataclass(frozen=True, slots=True)
class Question:
    param: str  # path of the question, for errors
    type: QuestionType
    options: tuple[Option, ...]  # of a noul, True and False
    instructions: Any = None  # text, object or list
    name: str | None = None

    def error(self, field: str, message: str, code: str = "invalid_value") -> PromptError:
        """An error in a field of this question, "" for the question itself; the message names the question."""
        name = "" if self.name is None else f" {self.name!r}"
        path = f"{self.param}{'.' if field and field[0] != '[' else ''}{field}"
        return PromptError(path, f"Question{name} (`{path}`): {message}", code)


@dataclass(frozen=True, slots=True)
class DecisionRequest:
    """Questions about one state, which is either JSON or a conversation."""

    questions: tuple[Question, ...]
    state: Any = None  # text, object or list; None with `messages`
    messages: tuple[dict[str, Any], ...] | None = None  # as `ChatFormat.render` takes them
    param: str = "state"  # path of the state or of the messages, for errors


class ScoringOptions(BaseModel):
    """How options are read. Fields of requests, and keyword arguments of `LLM.decide`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    # labels: the label tokens after the prompt; sequences: the options' own texts; permutations: labels over orders.
    scoring: Literal["labels", "sequences", "permutations"] = "labels"
    normalize: Literal["sum", "token", "byte", "pmi"] | None = None  # of sequences; None: sum
    permutations: Annotated[int, Field(ge=1, le=MAX_ORDERS)] | None = None  # orders; None: all, for up to 5 options
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] | None = None  # None: the model's for the type, or else 1
    return_token_ids: bool = False  # with the ids of each prompt

    @field_validator(*_NEEDED_SCORING)
    @classmethod
    def _check_scoring(cls, value: Any, info: ValidationInfo) -> Any:
        needed = _NEEDED_SCORING[info.field_name or ""]
        if value is not None and info.data.get("scoring", needed) != needed:
            raise ValueError(f"needs `scoring` {needed}")
        return value


class ScoringKeywords(TypedDict, total=False):
    """Keyword arguments of `LLM.decide`; the fields of ScoringOptions."""

    scoring: Literal["labels", "sequences", "permutations"]
    normalize: Literal["sum", "token", "byte", "pmi"] | None
    permutations: int | None
    temperature: float | None
    return_token_ids: bool


def scoring_options(values: Mapping[str, Any]) -> ScoringOptions:
    """Validate options. Raise TypeError for an unknown name, and PromptError for an invalid value."""
    for name in values:
        if name not in ScoringOptions.model_fields:
            raise TypeError(f"{name!r} is not an option{suggestion(name, ScoringOptions.model_fields)}")
    try:
        return ScoringOptions.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = str(first["loc"][0])
        raise PromptError(param, f"`{param}`: {first['msg'].removeprefix('Value error, ')}.") from None


def decision_request(body: Any, param: str = "") -> DecisionRequest:
    """A request from `input` and a list of questions (OpenAI), or from `state` and an object of them (TypeSafe).

    Raise PromptError for an unknown or invalid field; `param` is the path of `body`.
    """
    if not isinstance(body, Mapping):
        raise PromptError(param, f"`{param}` must be an object with `questions`.", "invalid_type")
    prefix = f"{param}." if param else ""
    _check_request_fields(body, prefix)
    questions: Any = body.get("questions")
    path = f"{prefix}questions"
    if "state" in body and "input" in body:
        raise PromptError(f"{prefix}state", "`state` and `input` cannot both be given.")
    if "input" in body:
        parsed = openai_questions(questions, path)  # first, to name SGLang's form, whose input may be an object
        messages = parse_input(body["input"], f"{prefix}input")
        return DecisionRequest(parsed, messages=messages, param=f"{prefix}input")
    if "state" not in body:
        raise PromptError(f"{prefix}state", "`state` or `input` is missing.", "missing_required_parameter")
    state = body["state"]
    if state is not None and not isinstance(state, str | dict | list):
        message = f"`{prefix}state` must be a string, an object or a list."
        raise PromptError(f"{prefix}state", message, "invalid_type")
    check_json(state, f"{prefix}state")
    if is_blank(state):
        raise PromptError(f"{prefix}state", "The state is blank.")
    return DecisionRequest(typesafe_questions(questions, path), state=state, param=f"{prefix}state")


def _check_request_fields(body: Mapping[str, Any], prefix: str) -> None:
    for name in body:
        if name in ScoringOptions.model_fields:
            message = f"`{name}` is an option of all requests, not a field of one."
            raise PromptError(f"{prefix}{name}", message, "unsupported_parameter")
        if name not in (*_FIELDS, *_WITHOUT_EFFECT):
            message = f"Unknown field `{name}`{suggestion(str(name), (*_FIELDS, *_WITHOUT_EFFECT))}."
            raise PromptError(f"{prefix}{name}", message, "unknown_parameter")


def openai_questions(values: Any, param: str = "questions") -> tuple[Question, ...]:
    """Questions of `POST /v1/decisions`: types predicate, choice and score."""
    if not isinstance(values, list):
        raise PromptError(param, f"`{param}` must be a list of questions.", "invalid_type")
    return _checked([_openai_question(value, f"{param}[{i}]") for i, value in enumerate(values)], param)


def typesafe_questions(values: Any, param: str = "questions") -> tuple[Question, ...]:
    """Questions of `POST /v1/systemone`: types noul, choice and score."""
    if not isinstance(values, Mapping):
        raise PromptError(param, f"`{param}` must be an object of questions by name.", "invalid_type")
    return _checked([_typesafe_question(str(name), value, f"{param}.{name}") for name, value in values.items()], param)


def _checked(questions: list[Question], param: str) -> tuple[Question, ...]:
    if not 1 <= len(questions) <= MAX_QUESTIONS:
        message = f"`{param}` must hold 1 to {MAX_QUESTIONS} questions, not {len(questions)}."
        raise PromptError(param, message, "empty_array" if not questions else "array_above_max_length")
    names = set[str]()
    for question in questions:
        if question.name is not None and question.name in names:
            raise question.error("name", "another question has the same name.")
        names.update(() if question.name is None else (question.name,))
        _check_options(question)
    return tuple(questions)


def _check_options(question: Question) -> None:
    field = "levels" if question.type == "score" else "options"
    limit = MAX_LEVELS if question.type == "score" else MAX_OPTIONS
    if len(question.options) > limit:
        message = f"it has {len(question.options)} {field}, more than the maximum of {limit}."
        raise question.error("", message, "array_above_max_length")
    seen = set[tuple[type, str | bool]]()
    for option in question.options:
        key = (type(option.value), option.value)
        if key in seen:
            raise question.error("", f"the option {json.dumps(option.value, ensure_ascii=False)} occurs twice.")
        seen.add(key)


def _openai_question(value: Any, param: str) -> Question:
    fields = {
        "predicate": ("type", "instructions", "name", "labels"),
        "choice": ("type", "instructions", "name", "choices"),
        "score": ("type", "instructions", "name", "levels"),
    }
    question, kind = _question(value, param, fields, name=value.get("name") if isinstance(value, Mapping) else None)
    instructions = value.get("instructions")
    if instructions is None:
        raise question.error("instructions", "`instructions` is missing.", "missing_required_parameter")
    text = content_text(instructions, f"{param}.instructions")
    if kind == "predicate":
        if is_blank(text):
            raise question.error("instructions", "is blank.")
        return replace(question, instructions=text, options=_noul_options(question, {}, value.get("labels")))
    key, name = ("choices", "value") if kind == "choice" else ("levels", "label")
    items = value.get(key)
    if not isinstance(items, list) or len(items) < 2:
        raise question.error(key, f"`{key}` must be a list of at least 2 objects.")
    options = tuple(_openai_option(question, item, f"{key}[{i}]", name) for i, item in enumerate(items))
    return replace(question, instructions=text, options=options)


def _openai_option(question: Question, item: Any, field: str, key: str) -> Option:
    if not isinstance(item, Mapping):
        raise question.error(field, f"must be an object with `{key}`.", "invalid_type")
    _check_fields(question, item, (key, "description", "labels"), f"{field}.")
    value, description = item.get(key), item.get("description")
    if not isinstance(value, str) and not (key == "value" and isinstance(value, bool)):
        kinds = "a string or a boolean" if key == "value" else "a string"
        raise question.error(f"{field}.{key}", f"must be {kinds}.", "invalid_type")
    if description is not None and not isinstance(description, str):
        raise question.error(f"{field}.description", "must be a string.", "invalid_type")
    if not description and value == "":
        raise question.error(f"{field}.{key}", "is empty.")
    labels = _labels(question, item.get("labels"), f"{field}.labels")
    return Option(value, description, labels)


def _typesafe_question(name: str, value: Any, param: str) -> Question:
    fields = dict.fromkeys(("noul", "choice", "score"), ("type", "instructions", "criteria", "labels"))
    question, kind = _question(value, param, fields, name)
    instructions, criteria, labels = (value.get(key) for key in ("instructions", "criteria", "labels"))
    _check_content(question, instructions, "instructions")
    if kind == "noul":
        if criteria is not None and not (isinstance(criteria, Mapping) and criteria.keys() <= {"true", "false"}):
            raise question.error("criteria", "must be an object with `true` and `false`.")
        if is_blank(instructions) and all(map(is_blank, (criteria or {}).values())):
            raise question.error("instructions", "has neither instructions nor criteria.")
        return replace(question, instructions=instructions, options=_noul_options(question, criteria or {}, labels))
    if not isinstance(criteria, dict if kind == "choice" else list) or not criteria:
        kinds = "an object of options" if kind == "choice" else "a list of levels"
        raise question.error("criteria", f"must be {kinds} with at least one item.")
    pairs = [*criteria.items()] if isinstance(criteria, dict) else [(_json(level), level) for level in criteria]
    groups = _label_groups(question, labels, [key for key, _ in pairs], by_position=kind == "score")
    options = []
    for i, ((key, content), group) in enumerate(zip(pairs, groups, strict=True)):
        _check_content(question, content, f"criteria.{key}" if kind == "choice" else f"criteria[{i}]")
        if kind == "score" and content is None:
            raise question.error(f"criteria[{i}]", "must be a string, an object or a list.", "invalid_type")
        options.append(Option(key, content if kind == "choice" else None, group))
    return replace(question, instructions=instructions, options=tuple(options))


def _question(value: Any, param: str, fields: Mapping[str, Iterable[str]], name: str | None) -> tuple[Question, str]:
    """A question without options, and its type as written; `fields` are the names that each type allows."""
    question = Question(param, "noul", (), name=name if isinstance(name, str) else None)
    if not isinstance(value, Mapping):
        raise question.error("", "must be an object.", "invalid_type")
    if name is not None and not isinstance(name, str):
        raise question.error("name", "must be a string.", "invalid_type")
    kind = value.get("type")
    if "question" in value or "id" in value:
        raise question.error("", "`id` and `question` belong to SGLang's own format, which is not supported.")
    if not isinstance(kind, str) or kind not in fields:
        raise question.error("type", f"`type` must be one of {', '.join(fields)}.")
    _check_fields(question, value, tuple(fields[kind]), "")
    types: dict[str, QuestionType] = {"predicate": "noul", "noul": "noul", "choice": "choice", "score": "score"}
    return replace(question, type=types[kind]), kind


def _check_fields(question: Question, value: Mapping[str, Any], allowed: tuple[str, ...], prefix: str) -> None:
    for key in value:
        if key not in allowed:
            message = f"unknown field `{key}`{suggestion(str(key), allowed)}."
            raise question.error(f"{prefix}{key}", message, "unknown_parameter")


def _check_content(question: Question, value: Any, field: str) -> None:
    if value is not None and not isinstance(value, str | dict | list):
        raise question.error(field, "must be a string, an object or a list.", "invalid_type")
    check_json(value, f"{question.param}.{field}")


def _noul_options(question: Question, criteria: Mapping[str, Any], labels: Any) -> tuple[Option, ...]:
    for key, content in criteria.items():
        _check_content(question, content, f"criteria.{key}")
    groups = _label_groups(question, labels, ["true", "false"])
    return tuple(
        Option(value, criteria.get(key), group)
        for value, key, group in zip((True, False), ("true", "false"), groups, strict=True)
    )


def _label_groups(
    question: Question, labels: Any, keys: list[str], *, by_position: bool = False
) -> list[tuple[str, ...]]:
    """Labels of each option, from an object by option, or for levels from a list."""
    if labels is None:
        return [()] * len(keys)
    if by_position:
        if not isinstance(labels, list) or len(labels) != len(keys):
            raise question.error("labels", f"must be a list of {len(keys)} items, one for each level.")
        return [_labels(question, group, f"labels[{i}]") for i, group in enumerate(labels)]
    if not isinstance(labels, Mapping):
        raise question.error("labels", "must be an object: option to labels.", "invalid_type")
    for key in labels:
        if key not in keys:
            raise question.error(f"labels.{key}", f"{key!r} is not an option.")
    return [_labels(question, labels.get(key), f"labels.{key}") for key in keys]


def _labels(question: Question, value: Any, field: str) -> tuple[str, ...]:
    """Labels of one option: a string or a list of strings; () for None."""
    labels = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(labels, list) or len(labels) > _MAX_LABELS:
        raise question.error(field, f"must be a string or a list of at most {_MAX_LABELS} strings.", "invalid_type")
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise question.error(field, "a label must be a string that is not blank.")
    return tuple(labels)


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
