"""What a handler holds: the collaborators that every endpoint shares."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.api.errors import APIError
from serve.api.full_vocab_logprobs import RowWriter
from serve.api.generation import Choice, Delta, Finished, TimeLimits
from serve.api.middleware import AnswerRecord
from serve.api.parsing import FieldLog
from serve.api.prompt_logprobs import EntryWriter
from serve.api.request_body import Bodies
from serve.api.requests import GenerationRequest
from serve.config.config import LogprobsMode, ServeConfig
from serve.config.generation_config import GenerationDefaults
from serve.engine.client import EngineClient
from serve.text.template_sandbox import TemplateSandbox
from serve.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Facts about the loaded model that its configuration flags do not determine."""

    names: tuple[str, ...]  # model ids in the API; the first is the default
    system_fingerprint: str | None = None
    chat_template: str | None = None  # overrides the tokenizer's
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Engine, tokenizer, model and configuration of the server."""

    engine: EngineClient
    tokenizer: Tokenizer
    model: ServedModel
    config: ServeConfig
    row_writer: RowWriter | None  # where the engine gives whole rows
    entry_writer: EntryWriter
    bodies: Bodies
    on_answers: Callable[[Sequence[int]], None]  # told of the tokens of each answer to a prompt
    on_rejected: Callable[[str], None]  # called with the limit when the queue is full
    jail: TemplateSandbox | None  # where templates are taken from requests
    fields: FieldLog = field(default_factory=FieldLog)
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970, of the models' cards

    def model_name(self, asked: str | None) -> str:
        """The name to answer with.

        Raises:
            APIError: 404 for a model that is not served.
        """
        if asked is None:
            return self.model.names[0]
        if asked not in self.model.names:
            raise APIError(404, f"The model {asked[:200]!r} does not exist.", "model", "model_not_found")
        return asked

    def filled[B: GenerationRequest](self, body: B) -> B:
        """The request, with the server's defaults where it says nothing."""
        return self.model.defaults.fill(body)

    def time_limits(self, body: GenerationRequest, record: AnswerRecord) -> TimeLimits:
        """Until when a request may wait, and run: what the server allows, or less where the request says so."""
        seconds = min(self.config.request_timeout, math.inf if body.timeout is None else body.timeout)
        return TimeLimits(self.config.queue_timeout, record.began + seconds)

    def cache_salt(self, body: GenerationRequest, record: AnswerRecord) -> str:
        """Requests of the same salt share cached prompts. One of the request holds no slash (`check_common`)."""
        own = body.cache_salt or ""
        return f"{record.key}/{own}" if self.config.prefix_cache_per_key and record.key else own

    def logprobs_mode(self, body: GenerationRequest) -> LogprobsMode:
        """Which distribution the numbers of generated tokens are of."""
        return body.logprobs_mode or self.config.logprobs_mode

    def header(self, prefix: str, kind: str, body: GenerationRequest, request_id: str) -> "Header":
        """The header of an answer. Its id is the request's: of the body, or else of the HTTP header.

        Raises:
            APIError: 404 for a model that is not served.
        """
        name, mode = self.model_name(body.model), self.logprobs_mode(body)
        told = mode if body.logprobs_mode is not None or mode != "raw_logprobs" else None
        return Header(f"{prefix}-{body.request_id or request_id}", kind, name, self.model.system_fingerprint, told)

    def wants_usage(self, body: GenerationRequest) -> tuple[bool, bool]:
        """Whether a stream ends with its usage, and whether every chunk carries it."""
        options = body.stream_options
        final = self.config.enable_force_include_usage or bool(options and options.include_usage)
        return final, final and bool(options and options.continuous_usage_stats)

    def log_request(self, header: "Header", body: GenerationRequest, prompts: Sequence[str]) -> None:
        """Writes a request to the log; `prompts` as text, cut to the length that is allowed."""
        fields = body.model_dump(exclude_none=True, exclude={"prompt", "messages", "prompt_token_ids"})
        shown = [prompt[: self.config.max_log_len] for prompt in prompts]
        logger.warning("request %s: prompts %r, fields %r", header.id, shown, fields)

    def abort_all(self, request_ids: Sequence[str]) -> Callable[[], None]:
        """A callback that ends all requests to the engine; harmless where they have ended."""

        def abort() -> None:
            for request_id in request_ids:
                self.engine.abort(request_id)

        return abort


@dataclass(frozen=True, slots=True)
class Header:
    """The fields that open every answer and every chunk of it."""

    id: str
    object: str
    model: str
    system_fingerprint: str | None
    logprobs_mode: str | None = None  # told where it was asked for, or is not the usual one
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self) -> dict[str, Any]:
        """As JSON fields."""
        fields = {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }
        return fields if self.logprobs_mode is None else fields | {"logprobs_mode": self.logprobs_mode}


@dataclass(slots=True)
class Usage:
    """Counts tokens; a prompt counts once, however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompts, those that the engine did not compute again

    @classmethod
    def of_prompts(cls, choices: Sequence[Choice]) -> "Usage":
        """The prompts of all choices, nothing generated yet."""
        return cls(sum(len(choice.request.prompt_token_ids) for choice in choices if choice.first))

    def open(self, choice: Choice, told: Delta | Finished) -> None:
        """Counts what is told of a choice's prompt; once for each choice."""
        if choice.first:
            self.cached_tokens += told.cached_tokens

    def fields(self) -> dict[str, Any]:
        """As JSON fields."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def usage_of(results: Sequence[Finished]) -> Usage:
    """The usage of a whole answer."""
    usage = Usage.of_prompts([result.choice for result in results])
    for result in results:
        usage.open(result.choice, result)
        usage.completion_tokens += len(result.token_ids)
    return usage
