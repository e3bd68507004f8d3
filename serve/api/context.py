"""Context: dependencies that all handlers share."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serve.api.parsing import FieldLog
from serve.api.prompt_logprobs import PromptLogprobsWriter
from serve.api.request_body import Bodies
from serve.config.config import ServeConfig
from serve.config.generation_config import GenerationDefaults
from serve.engine.client import EngineClient
from serve.text.chat import ChatFormat
from serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Facts about the loaded model that its configuration flags do not determine."""

    names: tuple[str, ...]  # model ids in the API; the first is the default
    system_fingerprint: str | None = None
    chat_template: str | None = None  # overrides the tokenizer's
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)


@dataclass(frozen=True, slots=True)
class Context:
    engine: EngineClient
    tokenizer: Tokenizer
    model: ServedModel
    config: ServeConfig
    chat_format: ChatFormat
    bodies: Bodies
    prompt_logprobs: PromptLogprobsWriter
    on_answers: Callable[[Sequence[int]], None]  # called per prompt with the tokens of each of its finished choices
    on_rejected: Callable[[str], None]  # called with the name of the limit when the queue is full
    fields: FieldLog = field(default_factory=FieldLog)
    created: int = field(default_factory=lambda: int(time.time()))  # Unix time, for the model cards
