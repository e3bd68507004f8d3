"""`python -m tests.support.faulty_server`: `python -m serve` with a scripted model that fails on request.

The first token of a prompt chooses the fault: FAIL fails once, LOSE permanently, HANG never returns, SLOW delays steps.
A text that starts with STUCK is never tokenized. Timeouts at shutdown are shorter than usual.
"""

import sys
import threading
from dataclasses import replace
from typing import Any

from compiled.state import MAX_REQUESTED_IDS, DecodeInput, SamplingArrays, StepInput, StepOutput
from model.kv_cache import PAGE_SIZE
from serve.api.app import create_app
from serve.api.context import ServedModel
from serve.api.keys import ApiKeys
from serve.api.metrics import Metrics
from serve.api.middleware import Readiness
from serve.config.config import ServeConfig
from serve.config.flags import parse_args
from serve.engine.engine import Engine
from serve.engine.request import EngineLimits, EngineOptions
from serve.server import lifecycle
from serve.server.console import Reporter
from serve.server.lifecycle import Served
from serve.server.server import main
from serve.text.tokenizer import Tokenizer
from tests.support.fake_runner import MAX_MODEL_LEN, K
from tests.support.http_client import MODEL, VOCAB_SIZE, ScriptedRunner, byte_tokenizer
from tests.support.server_process import ServerProcess

FAIL, LOSE, HANG, SLOW = 1, 2, 3, 4  # token ids
STUCK = "stuck"

_PAGES = 64
_STEP = 0.01  # seconds per slow step


class FaultyServer(ServerProcess):
    """The process, up when the constructor returns."""

    def __init__(self, *arguments: str) -> None:
        self._start(["-m", "tests.support.faulty_server", *arguments, "--port", "0"])


class FaultyRunner(ScriptedRunner):
    """A runner whose prompts choose faults."""

    def __init__(self) -> None:
        super().__init__(b"x" * MAX_MODEL_LEN, pages=_PAGES, pages_per_row=MAX_MODEL_LEN // PAGE_SIZE)
        self._slow = self._lost = False

    def prefill(self, inputs: StepInput) -> Any:
        """Fail, hang or slow down as the first token requests."""
        token = int(inputs.tokens[0, 0])
        if token == FAIL:
            raise RuntimeError("requested failure")
        if token == LOSE:
            self._lost = True
            raise RuntimeError("requested loss")
        if token == HANG:
            threading.Event().wait()
        self._slow |= token == SLOW
        return super().prefill(inputs)

    def reset(self) -> None:
        """Fail permanently after LOSE."""
        if self._lost:
            raise RuntimeError("the device is gone")
        super().reset()

    def decode(self, inputs: DecodeInput, sampling: SamplingArrays) -> StepOutput:
        """Delay the step after SLOW."""
        if self._slow:
            threading.Event().wait(_STEP)
        output: StepOutput = super().decode(inputs, sampling)
        return output


def _tokenizer() -> Tokenizer:
    tokenizer = byte_tokenizer()
    encode = tokenizer.encode

    def encode_or_not(text: str, *, add_special_tokens: bool) -> list[int]:
        if text.startswith(STUCK):
            print(STUCK, file=sys.stderr, flush=True)
            threading.Event().wait()
        return encode(text, add_special_tokens=add_special_tokens)

    setattr(tokenizer, "encode", encode_or_not)  # noqa: B010 - mypy rejects assignment to a method
    return tokenizer


def _assemble(config: ServeConfig, _reporter: Reporter) -> Served:
    limits = EngineLimits(
        max_model_len=MAX_MODEL_LEN,
        max_logprobs=K,
        vocab_size=VOCAB_SIZE,
        cache_tokens=(_PAGES - 1) * PAGE_SIZE,
        max_requested_ids=MAX_REQUESTED_IDS,
        full_vocab=False,
    )
    metrics = Metrics(MODEL, max_model_len=MAX_MODEL_LEN, vllm_names=False)
    engine = Engine(FaultyRunner(), limits, EngineOptions(max_num_batched_tokens=68, max_num_queued_reqs=64), metrics)
    metrics.watch(lambda: engine.gauges, {})
    engine.start()
    readiness, keys = Readiness(), ApiKeys(config.api_key)
    config = replace(config, allowed_hosts=("*",))  # tests send other host names
    app = create_app(engine, ServedModel((MODEL,), _tokenizer()), config, metrics, readiness=readiness, api_keys=keys)
    return Served((MODEL,), True, engine, app, readiness, keys, metrics)


if __name__ == "__main__":
    lifecycle._FLUSH_SECONDS = 1
    lifecycle._STEP_SECONDS = 5
    sys.exit(main(parse_args(sys.argv[1:]), _assemble))
