"""Exact log-probs from Python: `from logprobd import LLM`."""

from serve.engine.request import EngineStoppedError
from serve.jobs.generate import GenerationOptions
from serve.jobs.output import Output
from serve.jobs.request_queue import RequestError
from serve.jobs.results import Batch, Decision, Evidence, Generation, OrderEvidence, Score, Tokens
from serve.llm import LLM
from serve.server.model_files import StartupError
from serve.text.chat import PromptError

__all__ = [
    "LLM",
    "Batch",
    "Decision",
    "EngineStoppedError",
    "Evidence",
    "Generation",
    "GenerationOptions",
    "OrderEvidence",
    "Output",
    "PromptError",
    "RequestError",
    "Score",
    "StartupError",
    "Tokens",
]
