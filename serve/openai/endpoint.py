"""What a handler holds: the collaborators that every endpoint shares."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.openai.errors import APIError
from serve.openai.generation import Choice, Engine, Finished
from serve.openai.schema import FieldLog, GenerationRequest
from serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class AppConfig:
    """How the API presents itself."""

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()  # empty: open to all
    system_fingerprint: str | None = None
    chat_template: str | None = None  # instead of the tokenizer's
    max_body_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Engine, tokenizer and presentation."""

    engine: Engine
    tokenizer: Tokenizer
    config: AppConfig
    fields: FieldLog = field(default_factory=FieldLog)
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970, of the models' cards

    def model_name(self, asked: str | None) -> str:
        """The name to answer with.

        Raises:
            APIError: 404 for a model that is not served.
        """
        if asked is None:
            return self.config.served_model_names[0]
        if asked not in self.config.served_model_names:
            raise APIError(404, f"The model {asked[:200]!r} does not exist.", "model", "model_not_found")
        return asked

    def abort_all(self, choices: Sequence[Choice]) -> Callable[[], None]:
        """A callback that ends all choices; harmless where they have ended."""

        def abort() -> None:
            for choice in choices:
                self.engine.abort(choice.request.id)

        return abort


@dataclass(frozen=True, slots=True)
class Header:
    """The fields that open every answer and every chunk of it."""

    id: str
    object: str
    model: str
    system_fingerprint: str | None
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def make(cls, prefix: str, kind: str, model: str, fingerprint: str | None, request_id: str | None) -> "Header":
        """A header with the client's request id, or one of our own."""
        return cls(f"{prefix}-{request_id or uuid.uuid4().hex}", kind, model, fingerprint)

    def fields(self) -> dict[str, Any]:
        """As JSON fields."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


@dataclass(slots=True)
class Usage:
    """Counts tokens; a prompt counts once, however many answers it gets."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def of_prompts(cls, choices: Sequence[Choice]) -> "Usage":
        """The prompts of all choices, nothing generated yet."""
        return cls(sum(len(choice.request.prompt_token_ids) for choice in choices if choice.first))

    def fields(self) -> dict[str, Any]:
        """As JSON fields."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": None,
        }


def usage_of(results: Sequence[Finished]) -> Usage:
    """The usage of a whole answer."""
    usage = Usage.of_prompts([result.choice for result in results])
    usage.completion_tokens = sum(len(result.token_ids) for result in results)
    return usage


def wants_usage(body: GenerationRequest) -> tuple[bool, bool]:
    """Whether a stream ends with its usage, and whether every chunk carries it."""
    options = body.stream_options
    final = bool(options and options.include_usage)
    return final, final and bool(options and options.continuous_usage_stats)
