"""`python -m tests.support.faulty_server`: `python -m serve` with a scripted model that can be made to fail.

What a prompt begins with says how: FAIL fails once, LOSE for good, HANG never ends, SLOW takes its time. A text that
begins with STUCK is never tokenized. The last bytes of answers, and the last
step, get less time than usual.
"""

import sys
import threading
from dataclasses import replace
from typing import Any

from compiled.state import MAX_REQUESTED_IDS, DecodeInput, SamplingArrays, StepInput, StepOutput
from model.kv_cache import PAGE_SIZE
from serve.api.app import create_app
from serve.api.context import ServedModel
from serve.api.metrics import Metrics
from serve.api.middleware import Readiness
from serve.config.config import ServeConfig
from serve.config.flags import parse_args
from serve.engine.engine import Engine
from serve.engine.request import EngineLimits, EngineOptions
from serve.server import lifecycle
from serve.server.assembly import Served
from serve.server.console import Reporter
from serve.server.server import main
from serve.text.tokenizer import Tokenizer
from tests.support.fake_runner import MAX_MODEL_LEN, K
from tests.support.http_client import MODEL, VOCAB_SIZE, ScriptedRunner, byte_tokenizer
from tests.support.server_process import ServerProcess

FAIL, LOSE, HANG, SLOW = 1, 2, 3, 4  # token ids
STUCK = "stuck"

_PAGES = 64
_STEP = 0.01  # seconds, where it is slow


class FaultyServer(ServerProcess):
    """The process, up when the constructor returns."""

    def __init__(self, *arguments: str) -> None:
        self._start(["-m", "tests.support.faulty_server", *arguments, "--port", "0"])


class FaultyRunner(ScriptedRunner):
    """Does what prompts say."""

    def __init__(self) -> None:
        super().__init__(b"x" * MAX_MODEL_LEN, pages=_PAGES, pages_per_row=MAX_MODEL_LEN // PAGE_SIZE)
        self._slow = self._lost = False

    def prefill(self, inputs: StepInput) -> Any:
        """The first token of a prompt says what becomes of it."""
        said = int(inputs.tokens[0, 0])
        if said == FAIL:
            raise RuntimeError("it was to fail")
        if said == LOSE:
            self._lost = True
            raise RuntimeError("it was to be lost")
        if said == HANG:
            threading.Event().wait()
        self._slow |= said == SLOW
        return super().prefill(inputs)

    def reset(self) -> None:
        """Fails for good once it was lost."""
        if self._lost:
            raise RuntimeError("the device is gone")
        super().reset()

    def decode(self, inputs: DecodeInput, sampling: SamplingArrays) -> StepOutput:
        """As a device that takes its time."""
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

    setattr(tokenizer, "encode", encode_or_not)  # noqa: B010 - mypy takes no assignment to a method
    return tokenizer


def _assemble(config: ServeConfig, _reporter: Reporter) -> Served:
    limits = EngineLimits(
        max_model_len=MAX_MODEL_LEN,
        max_logprobs=K,
        vocab_size=VOCAB_SIZE,
        cache_tokens=(_PAGES - 1) * PAGE_SIZE,
        max_scored_ids=MAX_REQUESTED_IDS,
        whole_vocabulary=False,
    )
    metrics = Metrics(MODEL, max_model_len=MAX_MODEL_LEN, vllm_names=False)
    engine = Engine(FaultyRunner(), limits, EngineOptions(max_num_batched_tokens=68, max_num_queued_reqs=64), metrics)
    metrics.watch(lambda: engine.gauges, {})
    engine.start()
    readiness = Readiness()
    config = replace(config, allowed_hosts=("*",))  # clients of the tests send other names
    app = create_app(engine, _tokenizer(), ServedModel((MODEL,)), config, metrics, readiness=readiness)
    return Served((MODEL,), True, engine, app, readiness, metrics)


if __name__ == "__main__":
    lifecycle._FLUSH_SECONDS = 1
    lifecycle._STEP_SECONDS = 5
    sys.exit(main(parse_args(sys.argv[1:]), _assemble))
