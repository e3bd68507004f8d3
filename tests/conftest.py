"""What tests share: the real default model, compiled once for each dtype, and programs that run beside the tests."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from compiled.load import load_model
from compiled.runner import ModelRunner
from compiled.shapes import Buckets
from model.weights.load import open_checkpoint
from model.weights.source import ModelSource, default_model_path
from tests.background import Background
from tests.in_process import PAGES
from tests.serve.server_process import ServerProcess

# A server's, but for the length of a request.
BUCKETS = Buckets(decode_rows=(1, 2, 4, 8, 16), prefill_chunks=(16, 64, 256), score_rows=64, pages_per_row=16)

# Fixtures that have what `python -m tests.NAME` prints, in the order in which that is done.
_PROGRAMS = ("sharded_numbers", "target_facts", "executed_notebook", "kernel_lines")
_BACKGROUND = pytest.StashKey[Background]()


def _programs_of(item: pytest.Item) -> set[str]:
    """What a test waits for; nothing if it is skipped."""
    if not isinstance(item, pytest.Function) or any(mark.args[0] for mark in item.iter_markers("skipif")):
        return set()
    return {*_PROGRAMS} & {*item.fixturenames}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for a program come last."""
    items.sort(key=lambda item: bool(_programs_of(item)))


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """The programs that tests wait for run beside the others."""
    items: Sequence[pytest.Item] = () if session.config.option.collectonly else session.items
    needed = set().union(*map(_programs_of, items))
    background = Background(f"tests.{name}" for name in _PROGRAMS if name in needed)
    session.config.stash[_BACKGROUND] = background
    try:
        return (yield)
    finally:
        background.end()


def _printed_by(program: str) -> Callable[[pytest.Config], str]:
    @pytest.fixture(scope="session", name=program)
    def printed(pytestconfig: pytest.Config) -> str:
        return pytestconfig.stash[_BACKGROUND].output(f"tests.{program}")

    return printed


sharded_numbers, target_facts, executed_notebook, kernel_lines = map(_printed_by, _PROGRAMS)


def make_runner(path: Path, weights: str, buckets: Buckets = BUCKETS, pages: int = PAGES) -> ModelRunner:
    """A compiled model; `weights` is a dtype, or "int8"."""
    checkpoint = open_checkpoint(ModelSource(path.name, path))
    try:
        model = load_model(checkpoint, "bfloat16" if weights == "int8" else weights, int8=weights == "int8")
    finally:
        checkpoint.close()
    return ModelRunner(model, buckets, pages=pages, max_logprobs=20)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server with the default model, in float32: the numbers are true to 1e-4."""
    cache = tmp_path_factory.mktemp("xla")
    process = ServerProcess(
        "--dtype", "float32", "--max-num-seqs", "4", "--max-model-len", "8192", "--compilation-cache-dir", str(cache)
    )
    yield process
    assert process.process.poll() is None, "".join(process.log)  # nothing that was sent to it may have ended it
    assert process.terminate() == 0


@pytest.fixture(scope="session")
def float32_runner() -> ModelRunner:
    """The default model in float32."""
    return make_runner(default_model_path(), "float32")


@pytest.fixture(scope="session")
def bfloat16_runner() -> ModelRunner:
    """The default model in bfloat16, through the packed kernels where this machine has them."""
    return make_runner(default_model_path(), "bfloat16")


@pytest.fixture(scope="session")
def int8_runner() -> ModelRunner:
    """The default model with int8 matrices, through their kernels where this machine has them."""
    return make_runner(default_model_path(), "int8")


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def runner(request: pytest.FixtureRequest) -> ModelRunner:
    """The default model with weights of each kind."""
    chosen: ModelRunner = request.getfixturevalue(f"{request.param}_runner")
    return chosen
