"""Plans of decisions: the encoded prompts of each question, and the tokens that are read after them."""

import math
import random
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice, product
from typing import Any

from serve.text.chat import ChatFormat, PromptError
from serve.text.decisions.encoder import Prompt, PromptEncoder
from serve.text.decisions.prompts import (
    DecisionSettings,
    PromptRenderer,
    QuestionView,
    default_prompt,
    sequence_prompt,
    template_question,
)
from serve.text.decisions.questions import DecisionRequest, Question, ScoringOptions

_LETTERS = tuple(string.ascii_uppercase)
_CODES = tuple(map("".join, product(_LETTERS, repeat=2)))  # labels of more than 26 options
_ALL_ORDERS = 5  # options of which all orders are read without `permutations`
_SEED = 0  # of the orders after the rotations
_MAX_UNSHARED_TOKENS = 4 << 20  # of all prompts of a request, beside what they share


@dataclass(frozen=True, slots=True)
class LabelReadout:
    """A prompt, and the labels of each option, one of which is its next token."""

    prompt: Prompt
    order: tuple[int, ...]  # options in the order of the prompt
    labels: tuple[tuple[str, ...], ...]  # by option
    label_ids: tuple[tuple[int, ...], ...]  # by option


@dataclass(frozen=True, slots=True)
class SequenceReadout:
    """A prompt and a continuation for each option."""

    prompt: Prompt
    sequences: tuple[tuple[int, ...], ...]  # by option, with the end of the turn
    num_bytes: tuple[int, ...]  # by option, of its text in UTF-8
    encoded_apart: tuple[bool, ...]  # by option: its text would have changed the prompt's last tokens
    end_of_turn: int | None  # last token of each sequence
    prior: Prompt | None  # the same question after an empty state, for `pmi`


@dataclass(frozen=True, slots=True)
class QuestionPlan:
    question: Question
    form: Any  # the question as transformers', whose `answer` gives confidence and score
    temperature: float
    readouts: tuple[LabelReadout, ...] = ()  # one per order of the options
    sequences: SequenceReadout | None = None


@dataclass(frozen=True, slots=True)
class DecisionPlan:
    """A request, ready to run."""

    questions: tuple[QuestionPlan, ...]
    options: ScoringOptions


class DecisionFormat:
    """Renders and encodes the prompts of one model. Thread-safe."""

    def __init__(self, chats: ChatFormat, settings: DecisionSettings | None = None) -> None:
        self._chats = chats
        self._settings = settings or DecisionSettings()

    @cached_property
    def _encoder(self) -> PromptEncoder:
        return PromptEncoder(self._chats.tokenizer, self._settings.template or self._chats.tokenizer.chat_template)

    @cached_property
    def _renderer(self) -> PromptRenderer:
        return PromptRenderer(self._chats, self._settings, self._encoder)

    @cached_property
    def _answer(self) -> tuple[str, str, int | None]:
        """Text before an answer, and the token that ends it, as text and id; "" and None without such a token."""
        prefix, suffix = ("", "") if self._settings.template is not None else self._renderer.render_answer()
        tokenizer = self._chats.tokenizer
        ids = tokenizer.encode(suffix.lstrip(), add_special_tokens=False)
        if ids and tokenizer.is_special(ids[0]):
            return prefix, tokenizer.token_text(ids[0]), ids[0]
        return prefix, "", None

    def plan(self, request: DecisionRequest, options: ScoringOptions, max_tokens: int) -> DecisionPlan:
        """Encode the prompts of all questions.

        Raises:
            PromptError: a label is not one token, or a prompt has more than `max_tokens` tokens; it names the question.
        """
        is_sequences = options.scoring == "sequences"
        if is_sequences and self._settings.template is not None:
            message = "`scoring` sequences is not possible: this model has a decision template, which asks for labels."
            raise PromptError("scoring", message)
        for question in request.questions if is_sequences else ():
            if any(option.labels for option in question.options):
                raise question.error("labels", "labels need `scoring` labels or permutations, not sequences.")
        views = [[*self._views(question, options)] for question in request.questions]
        texts = [(view, self._question_text(view)) for group in views for view in group]
        prompts = iter(self._encode(request, texts, max_tokens))
        priors: Iterator[Prompt] = iter(())
        if options.normalize == "pmi":
            empty = DecisionRequest(request.questions, state="", param=request.param)
            priors = iter(self._encode(empty, texts, max_tokens))
        plans = list[QuestionPlan]()
        for question, group in zip(request.questions, views, strict=True):
            temperature = options.temperature or self._settings.temperature.get(question.type, 1.0)
            form = template_question(QuestionView(question, tuple(range(len(question.options))), None))
            if is_sequences:
                sequences = self._sequences(question, self._texts(group[0]), next(prompts), next(priors, None))
                plans.append(QuestionPlan(question, form, temperature, sequences=sequences))
            else:
                pairs = zip(group, islice(prompts, len(group)), strict=True)
                readouts = tuple(self._labels(*pair) for pair in pairs)
                plans.append(QuestionPlan(question, form, temperature, readouts))
        return DecisionPlan(tuple(plans), options)

    def _encode(self, request: DecisionRequest, texts: list[tuple[QuestionView, str]], max_tokens: int) -> list[Prompt]:
        tokenizer = self._chats.tokenizer

        def checked() -> Iterator[str]:
            for (view, _), text in zip(texts, self._renderer.render(request, texts), strict=True):
                if tokenizer.certainly_exceeds(text, max_tokens):
                    raise _too_long(view.question, f"has {len(text)} characters", max_tokens)
                yield text

        prompts, unshared, limit = list[Prompt](), 0, max(_MAX_UNSHARED_TOKENS, 2 * max_tokens)
        for (view, _), prompt in zip(texts, self._encoder.encode(checked(), request.param), strict=True):
            if not len(prompt):
                raise view.question.error("", "its prompt gives no tokens.")
            if len(prompt) > max_tokens:
                raise _too_long(view.question, f"has {len(prompt)} tokens", max_tokens)
            prompts.append(prompt)
            unshared += len(prompt.tail)
            if unshared > limit:
                message = f"The prompts of the questions have more than {limit} tokens that they do not share"
                raise _questions_error(request, f"{message}: send fewer questions or orders.")
        return prompts

    def _views(self, question: Question, options: ScoringOptions) -> Iterator[QuestionView]:
        """The question in each order of its options that is asked for."""
        count = len(question.options)
        natural = self._settings.noul_order if question.type == "noul" else tuple(range(count))
        orders: tuple[tuple[int, ...], ...] = (tuple(range(count)),)
        if options.scoring == "permutations":
            if options.permutations is None and count > _ALL_ORDERS:
                message = f"`permutations` is required for more than {_ALL_ORDERS} options; this question has {count}."
                raise question.error("", message, "missing_required_parameter")
            orders = option_orders(count, options.permutations or math.factorial(count))
        labels = None if options.scoring == "sequences" else self._view_labels(question, natural)
        for order in orders:
            places = tuple(natural[i] for i in order)
            by_place = labels
            if labels is not None and (question.type == "noul" or any(option.labels for option in question.options)):
                by_place = tuple(labels[i] for i in order)  # these labels belong to options, others to places
            yield QuestionView(question, places, by_place)

    def _view_labels(self, question: Question, order: tuple[int, ...]) -> tuple[str, ...]:
        count = len(order)
        labels = tuple(self._settings.labels.get(question.type, ()))
        if not labels:
            labels = ("Yes", "No") if question.type == "noul" else _LETTERS if count <= len(_LETTERS) else self._codes
        if len(labels) < count:
            message = f"this model has {len(labels)} labels for {count} options; use `scoring` sequences instead."
            raise question.error("", message)
        groups = [question.options[i].labels for i in order]
        return tuple(group[0].strip() if group else label for group, label in zip(groups, labels, strict=False))

    @cached_property
    def _codes(self) -> tuple[str, ...]:
        """Two-letter labels that are one token each after a prompt."""
        request = DecisionRequest((), state="Hi")
        question = QuestionView(Question("", "noul", ()), (), ("Yes", "No"))
        [prompt] = self._encoder.encode(self._renderer.render(request, [(question, "")]), "model")
        prefix = self._answer[0]
        return tuple(code for code in _CODES if self._encoder.label_id(prompt.context, prefix + code) is not None)

    def _labels(self, view: QuestionView, prompt: Prompt) -> LabelReadout:
        question, prefix = view.question, self._answer[0]
        assert view.labels is not None
        groups: dict[int, tuple[str, ...]] = {}
        for index, label in zip(view.order, view.labels, strict=True):
            groups[index] = question.options[index].labels or (prefix + label,)
        labels = tuple(groups[i] for i in range(len(question.options)))
        ids = [[self._encoder.label_id(prompt.context, label) for label in group] for group in labels]
        counts = Counter(label_id for group in ids for label_id in dict.fromkeys(group))
        wrong = [
            label
            for group, group_ids in zip(labels, ids, strict=True)
            for label, label_id in zip(group, group_ids, strict=True)
            if label_id is None or counts[label_id] > 1
        ]
        if wrong:
            names = ", ".join(map(repr, wrong[:20]))
            raise question.error("", f"the labels {names} are not one distinct token each after this prompt.")
        label_ids = tuple(tuple(dict.fromkeys(i for i in group if i is not None)) for group in ids)
        return LabelReadout(prompt, view.order, labels, label_ids)

    def _sequences(self, question: Question, texts: list[str], prompt: Prompt, prior: Prompt | None) -> SequenceReadout:
        prefix, end, end_id = self._answer
        sequences, encoded_apart = list[tuple[int, ...]](), list[bool]()
        for text in texts:
            marked = self._encoder.mark(text)
            ids, is_apart = self._encoder.continuation(prompt.context, prefix + marked, end, question.param)
            if not marked or len(ids) <= (end_id is not None):
                raise question.error("", "an option without text cannot be scored as a sequence.")
            sequences.append(tuple(ids))
            encoded_apart.append(is_apart)
        if len(set(sequences)) < len(sequences):
            raise question.error("", "two options have the same tokens.")
        num_bytes = tuple(len(text.encode()) for text in texts)
        return SequenceReadout(prompt, tuple(sequences), num_bytes, tuple(encoded_apart), end_id, prior)

    def _texts(self, view: QuestionView) -> list[str]:
        """The text of each option, by option, that is scored as a sequence."""
        if view.question.type == "noul":
            return ["Yes", "No"]
        return QuestionView(view.question, tuple(range(len(view.order))), None).option_texts

    def _question_text(self, view: QuestionView) -> str:
        if self._settings.template is not None:
            return ""
        if view.labels is None:
            texts = self._texts(view)
            return sequence_prompt(view, [texts[i] for i in view.order])
        return default_prompt(view)


@lru_cache(256)
def option_orders(count: int, limit: int) -> tuple[tuple[int, ...], ...]:
    """At most `limit` orders of `count` options: rotations first, then orders drawn with a fixed seed."""
    rotations = (tuple((i + shift) % count for i in range(count)) for shift in range(count))
    orders = dict.fromkeys(order for _, order in zip(range(limit), rotations, strict=False))
    draw = random.Random(_SEED).random  # the same numbers in every version of Python
    while len(orders) < min(limit, math.factorial(count)):
        keys = [draw() for _ in range(count)]
        orders[tuple(sorted(range(count), key=keys.__getitem__))] = None
    return tuple(orders)


def _questions_error(request: DecisionRequest, message: str) -> PromptError:
    prefix = request.param.rpartition(".")[0]
    return PromptError(f"{prefix}.questions" if prefix else "questions", message, "array_above_max_length")


def _too_long(question: Question, length: str, max_tokens: int) -> PromptError:
    message = f"its prompt {length}; this model and cache have room for {max_tokens} tokens."
    return question.error("", message, "context_length_exceeded")
