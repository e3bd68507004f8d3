"""Run requests through an EngineCore without threads or HTTP."""

from dataclasses import dataclass, field

import numpy as np

from model.token_logprobs import TokenLogprobs
from serve.engine.core import EngineCore, Runner
from serve.engine.request import (
    FinishReason,
    Request,
    SamplingParams,
)
from serve.engine.request_state import RequestState

PAGES = 100
MAX_MODEL_LEN = 1024
MAX_NUM_BATCHED_TOKENS = 272


@dataclass(slots=True)
class Answer:
    """Tokens and log-probs of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[np.float32] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    top_logprobs: list[bytes] = field(default_factory=list)
    processed: list[np.float32] = field(default_factory=list)
    allowed_mass: list[np.float32] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    num_events: int = 0
    prompt: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None


def run(
    runner: Runner,
    requests: dict[str, tuple[list[int], SamplingParams]],
    *,
    before: dict[str, tuple[list[int], SamplingParams]] | None = None,
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
) -> dict[str, Answer]:
    """Submit all requests (id -> prompt, params) at once and step until all have ended.

    The prefix cache is empty at the start, except for the requests in `before`, which run first.
    """
    core = EngineCore(runner, max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=max_num_batched_tokens)
    if before:
        _answers(core, before)
    return _answers(core, requests)


def _answers(core: EngineCore, requests: dict[str, tuple[list[int], SamplingParams]]) -> dict[str, Answer]:
    answers = {name: Answer() for name in requests}
    for name, (prompt, params) in requests.items():
        core.add(RequestState(Request(name, prompt, params), seed=params.seed or 0))
    while core.scheduler.num_requests:
        for request, event in core.step():
            answer = answers[request.id]
            answer.token_ids += event.token_ids
            answer.logprobs += list(event.logprobs.logprob)
            answer.ranks += [int(rank) for rank in event.logprobs.rank]
            answer.top_logprobs += [row.tobytes() for row in event.logprobs.top_logprobs]
            answer.processed += list(event.processed.logprob) if event.processed else []
            answer.allowed_mass += list(event.allowed_mass)
            answer.forced += event.forced
            answer.num_events += 1
            answer.prompt = event.prompt_logprobs or answer.prompt
            answer.finish_reason = event.finish_reason
    return answers
