"""The self-test before a model is served, with a fake runner."""

from typing import Any

import pytest

from compiled.state import MAX_REQUESTED_IDS
from model.kv_cache import PAGE_SIZE
from serve.engine.engine import Engine
from serve.engine.request import EngineLimits, EngineOptions
from serve.server.model_files import StartupError
from serve.server.self_test import run_self_test
from tests.support.fake_runner import MAX_MODEL_LEN, VOCAB_SIZE, FakeRunner, K


class Loaded:
    """Stands in for `startup.Loaded`."""

    name = "a model"

    def __init__(self, max_model_len: int = MAX_MODEL_LEN) -> None:
        pages = MAX_MODEL_LEN // PAGE_SIZE
        self.runner = FakeRunner(pages=pages + 1, pages_per_row=pages)
        self.limits = EngineLimits(max_model_len, K, VOCAB_SIZE, pages * PAGE_SIZE, MAX_REQUESTED_IDS, full_vocab=False)
        self.engines: list[Engine] = []

    def start_engine(self) -> Engine:
        options = EngineOptions(max_num_batched_tokens=68, max_num_queued_reqs=1)
        self.engines.append(Engine(self.runner, self.limits, options))
        self.engines[0].start()
        return self.engines[0]


def check(loaded: Any) -> None:
    run_self_test(loaded)


@pytest.mark.parametrize(("max_model_len", "calls"), [(2, 1), (3, 3), (MAX_MODEL_LEN, 3)])
def test_self_test_scores_and_generates(max_model_len: int, calls: int) -> None:
    loaded = Loaded(max_model_len)
    check(loaded)
    steps = ("decode", "prefill", "score")[:calls]  # a prompt of one token is only decoded
    assert {name for name, _ in loaded.runner.calls} == {"read", *steps}
    assert not loaded.engines[0].ready


@pytest.mark.parametrize("token", [1, 15])
def test_self_test_finds_nan(token: int) -> None:
    loaded = Loaded()
    loaded.runner.nan_token = token
    with pytest.raises(StartupError, match=r"a model: the self-test failed: .* not a number"):
        check(loaded)
    assert not loaded.engines[0].ready
