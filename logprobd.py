"""Exact log-probs from Python: `from logprobd import LLM`."""

from serve.jobs.generate import GenerationOptions
from serve.jobs.request_queue import RequestError
from serve.jobs.results import Batch, Generation, Score, Tokens
from serve.llm import LLM

__all__ = ["LLM", "Batch", "Generation", "GenerationOptions", "RequestError", "Score", "Tokens"]
