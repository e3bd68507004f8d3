"""Context: dependencies that all handlers share."""

import time
from dataclasses import dataclass, field

from serve.api.metrics import Metrics
from serve.api.prompt_logprobs import PromptLogprobsWriter
from serve.api.request_body import Bodies, Budget
from serve.config.config import ServeConfig
from serve.config.generation_config import GenerationDefaults
from serve.engine.client import EngineClient
from serve.grammar.compiler import GrammarCompiler
from serve.text.chat import ChatFormat
from serve.text.decisions.plan import DecisionFormat
from serve.text.decisions.prompts import DecisionSettings
from serve.text.tokenizer import Tokenizer
from serve.tools.markup import ChatMarkup


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Properties of the loaded model that do not come from flags."""

    names: tuple[str, ...]  # model ids in the API; the first is the default
    tokenizer: Tokenizer
    system_fingerprint: str | None = None
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    decisions: DecisionSettings = field(default_factory=DecisionSettings)
    bits_per_weight: float | None = None  # of the matrices


@dataclass(frozen=True, slots=True)
class Context:
    engine: EngineClient
    model: ServedModel
    config: ServeConfig
    metrics: Metrics
    chat_format: ChatFormat
    decisions: DecisionFormat
    grammars: GrammarCompiler
    bodies: Bodies
    unsent: Budget  # answers
    prompt_logprobs: PromptLogprobsWriter
    markup: ChatMarkup  # of the model's chat template
    unknown_fields: set[str] = field(default_factory=set)  # of requests, each logged once
    created: int = field(default_factory=lambda: int(time.time()))  # Unix time, for the model cards
