"""Texts of decision prompts: the default one of transformers, a model's own template, or plain text without either."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _get_template_variables

from serve.config.values import error_reason
from serve.text.chat import ChatFormat, PromptError
from serve.text.chat_template import ChatTemplateError, render_chat
from serve.text.decisions.conversation import CONTROL_START, chat_messages
from serve.text.decisions.encoder import MARK, SPLIT, PromptEncoder
from serve.text.decisions.questions import DecisionRequest, Question

_LETTERS = [chr(ord("A") + i) for i in range(26)]
_SETTINGS_FILES = ("decision.json", "decision_template.jinja")
# Files of models whose decisions are read from hidden states.
_HEAD_FILES = ("head.safetensors", "readout.safetensors", "judge_config.json", "decision_config.json")
_TEMPLATE_MARK = re.compile(f"(?<!{CONTROL_START}){re.escape(MARK)}")  # not one in user text
_OPEN_REASONING = ("<think>", "[THINK]", "<seed:think>")  # at the end of a prompt
_HEADER_START = "<|channel|>"  # of an answer in harmony, which starts with its header
_PLAIN_ROLES = {"user": "User", "assistant": "Assistant", "tool": "Result"}  # others: Instructions
_PLAIN_END = "\n\nAnswer:"  # of the prompt of a model without a chat template
_VARIABLES = {"enable_thinking": False}
_UNSUPPORTED_VARIABLES = ("questions", "images", "assets")  # of a decision template


class SettingsError(ValueError):
    """The decision settings of a model cannot be used. The message is one line that names the file and the field."""


@dataclass(frozen=True, slots=True)
class DecisionSettings:
    """Settings of decision.json and decision_template.jinja, which are transformers' files."""

    labels: dict[str, list[str]] = field(default_factory=dict)  # by type of question
    temperature: dict[str, float] = field(default_factory=dict)  # by type of question
    template: str | None = None  # Jinja source that renders `state` and `question`
    noul_order: tuple[int, int] = (0, 1)  # of the options True and False in a prompt
    sanitize: bool = True  # control tokens in user text become text


def read_settings(folder: Path) -> DecisionSettings:
    """Settings in a model's folder, or defaults. Raise SettingsError for those that this server cannot follow."""
    for name in _HEAD_FILES:
        if (folder / name).exists():
            raise SettingsError(f"{name}: decision heads that read hidden states are not supported")
    if not any((folder / name).exists() for name in _SETTINGS_FILES):
        return DecisionSettings()
    from transformers.decision import DecisionConfig  # takes up to a second

    try:
        config = DecisionConfig.from_pretrained(folder, local_files_only=True)
        variables = _get_template_variables(config.chat_template)
    except TemplateError as error:
        raise SettingsError(f"decision_template.jinja: {error_reason(error)}") from None
    # transformers raises its own errors of validation, and those of reading files that are not objects.
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise SettingsError(f"decision.json: {error_reason(error)}") from None
    if config.adapter is not None:
        raise SettingsError("decision.json: `adapter`: adapters are not supported")
    if any(value <= 0 for value in config.temperature.values()):
        raise SettingsError("decision.json: `temperature` must be positive")
    for name in _UNSUPPORTED_VARIABLES:
        if name in variables:
            raise SettingsError(f"decision_template.jinja: the variable `{name}` is not supported")
    names = ["true", "false"]
    return DecisionSettings(
        labels=dict(config.labels),
        temperature={kind: float(value) for kind, value in config.temperature.items()},
        template=config.chat_template,
        noul_order=(names.index(config.noul_options[0]), names.index(config.noul_options[1])),
        sanitize=config.sanitize_control_tokens,
    )


@dataclass(frozen=True, slots=True)
class QuestionView:
    """A question as one prompt shows it."""

    question: Question
    order: tuple[int, ...]  # indices of its options, by place
    labels: tuple[str, ...] | None  # by place; None: the prompt asks for an option's own text

    @property
    def option_texts(self) -> list[str]:
        """Values by place; if two would be equal, such as True and "true", strings are written as JSON."""
        values = [self.question.options[i].value for i in self.order]
        texts = [value if isinstance(value, str) else str(value).lower() for value in values]
        if len(set(texts)) == len(texts):
            return texts
        return [json.dumps(value, ensure_ascii=False) for value in values]


def template_question(view: QuestionView) -> Any:
    """The question in the form of transformers, whose `answer` gives confidence and score."""
    from transformers.decision import Question as TemplateQuestion

    question = view.question
    descriptions = [question.options[i].description for i in view.order]
    options = view.option_texts
    if question.type == "score":
        descriptions = [level_text(text, description) for text, description in zip(options, descriptions, strict=True)]
        options = [str(i) for i in view.order]
    labels = [*(view.labels or ())]
    return TemplateQuestion(question.name or "", question.type, question.instructions, options, labels, descriptions)


def json_text(value: Any) -> str:
    """Text of a state, of instructions or of a description; JSON if it is no string, "" for None."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def level_text(value: str, description: Any) -> str:
    return f"{value}: {json_text(description)}" if description else value


def default_prompt(view: QuestionView) -> str:
    """What `DECISION_PROMPT` of transformers writes after a state; rendering that template takes 0.3 ms."""
    question, labels = view.question, view.labels
    assert labels is not None
    lines = [json_text(question.instructions)]
    for label, text, index in zip(labels, view.option_texts, view.order, strict=True):
        answer = json_text(question.options[index].description)
        if question.type == "noul":
            answer = answer or ("" if labels == ("Yes", "No") else text)
            lines.append(f"{label}: {answer}" if answer else "")
        else:
            lines.append(f"{label}. {level_text(text, answer)}")
    if question.type == "noul":
        end = f"Answer {labels[0]} or {labels[1]} only."
    else:
        kind = "letter" if [*labels] == _LETTERS[: len(labels)] else "label"
        noun = "option" if question.type == "choice" else "level"
        end = f"Answer with the {kind} of the {noun} that fits best ({labels[0]} to {labels[-1]}) only."
    return "\n\n" + "\n".join(filter(None, lines)) + "\n" + end


def sequence_prompt(view: QuestionView, texts: Sequence[str]) -> str:
    """Like `default_prompt`, but asks for one of `texts`, which are by place."""
    question = view.question
    lines = [json_text(question.instructions)]
    for text, index in zip(texts, view.order, strict=True):
        description = json_text(question.options[index].description)
        if question.type == "noul":
            lines.append(f"{text}: {description}" if description else "")
        else:
            lines.append(f"- {level_text(text, description)}")
    noun = "level" if question.type == "score" else "option"
    end = (
        f"Answer {texts[0]} or {texts[1]} only."
        if question.type == "noul"
        else f"Answer with the text of the {noun} that fits best only."
    )
    return "\n\n" + "\n".join(filter(None, lines)) + "\n" + end


class PromptRenderer:
    """Renders the prompts of one model as marked texts."""

    def __init__(self, chats: ChatFormat, settings: DecisionSettings, encoder: PromptEncoder) -> None:
        self._chats = chats
        self._settings = settings
        self._encoder = encoder

    def render(self, request: DecisionRequest, questions: Sequence[tuple[QuestionView, str]]) -> Iterator[str]:
        """One marked text per question, given with its default prompt. Raise PromptError if a template refuses."""
        if self._settings.template is not None:
            state = self._clean(_json_state(request))
            for view, _ in questions:
                yield self._from_template(self._settings.template, state, view, request.param)
            return
        template = self._chats.tokenizer.chat_template
        messages = self._encoder.mark(_messages(request, template))
        for _, text in questions:
            text = self._encoder.mark(text)
            last = messages[-1]
            if last["role"] == "user":
                chat = [*messages[:-1], {**last, "content": last["content"] + text}]
            else:
                chat = [*messages, {"role": "user", "content": text.lstrip("\n")}]
            yield self._plain(chat) if template is None else self._chat(chat, request.param)

    def render_answer(self) -> tuple[str, str]:
        """Texts before and after a short answer in a chat template's own rendering of a conversation.

        The first is what stands between the generation prompt and the answer, such as a space.
        """
        if self._chats.tokenizer.chat_template is None:
            return " ", ""
        separator, tail = self._around_answer
        return separator if separator == " " else "", tail

    @cached_property
    def _around_answer(self) -> tuple[str, str]:
        chat = [{"role": "user", "content": "Hi"}]
        prompt = self._chats.render(chat, variables=_VARIABLES)
        answer = "Cogito"
        whole = self._chats.render(
            [*chat, {"role": "assistant", "content": answer}], add_generation_prompt=False, variables=_VARIABLES
        )
        head, match, tail = whole.rpartition(answer)
        return head.removeprefix(prompt) if head.startswith(prompt) else "", tail if match else ""

    def _chat(self, messages: list[dict[str, Any]], param: str) -> str:
        text = self._chats.render(messages, variables=_VARIABLES, param=param)
        if text.rstrip().endswith(_OPEN_REASONING):
            message = "This model's chat template starts to reason before it answers, so no decision can be read."
            raise PromptError("model", message)
        separator, _ = self._around_answer
        return text + separator if separator.startswith(_HEADER_START) else text

    def _plain(self, messages: Sequence[dict[str, Any]]) -> str:
        if len(messages) == 1:
            return f"{messages[0]['content']}{_PLAIN_END}"
        parts = (f"{_PLAIN_ROLES.get(message['role'], 'Instructions')}: {message['content']}" for message in messages)
        return "\n\n".join(parts) + _PLAIN_END

    def _from_template(self, template: str, state: Any, view: QuestionView, param: str) -> str:
        question = self._clean(asdict(template_question(view)))
        try:
            text = render_chat(
                template,
                [{"role": "user", "content": ""}],
                special_tokens=self._chats.tokenizer.special_tokens,
                add_generation_prompt=True,
                template_kwargs={**_VARIABLES, "state": state, "question": question},
            )
        except ChatTemplateError as error:
            raise PromptError(param, f"The decision template refused the request: {error}") from None
        text, *rest = _TEMPLATE_MARK.split(text)
        if len(rest) > 1:
            raise PromptError("model", "The decision template marks more than one place, which is not supported.")
        return text

    def _clean(self, value: Any) -> Any:
        """User values for a model's template: with marks, or without the template's own marks if it needs no others."""
        if self._settings.sanitize:
            return self._encoder.mark(value)
        return json.loads(json.dumps(value, ensure_ascii=False).replace(MARK, "").replace(SPLIT, ""))


def _messages(request: DecisionRequest, template: str | None) -> list[dict[str, Any]]:
    if request.messages is None:
        return [{"role": "user", "content": json_text(request.state)}]
    return chat_messages(request.messages, renders_calls=template is not None and "tool_calls" in template)


def _json_state(request: DecisionRequest) -> Any:
    """The state for a model's template: of a conversation its only message, or its messages."""
    if request.messages is None:
        return request.state
    messages = chat_messages(request.messages, renders_calls=False)
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return [{"role": message["role"], "content": message["content"]} for message in messages]
