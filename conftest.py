"""What tests share: the real default model, compiled once for each dtype, and programs that run beside the tests."""

from collections.abc import Callable, Iterator, Sequence

import pytest

from compiled.runner import ModelRunner
from model.weights.source import default_model_path
from tests.support.background import Background
from tests.support.runners import make_runner
from tests.support.server_process import ServerProcess

# Fixture -> the module whose output it holds, in the order in which they run.
_PROGRAMS = {
    "sharded_logprobs": "tests.support.sharded_logprobs",
    "target_facts": "tools.portability.target_facts",
    "executed_notebook": "tools.hlo.executed_notebook",
    "kernel_lines": "tests.support.kernel_lines",
}
_BACKGROUND = pytest.StashKey[Background]()


def _programs_of(item: pytest.Item) -> set[str]:
    """What a test waits for; nothing if it is skipped."""
    if not isinstance(item, pytest.Function) or any(mark.args[0] for mark in item.iter_markers("skipif")):
        return set()
    return _PROGRAMS.keys() & {*item.fixturenames}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for a program come last."""
    items.sort(key=lambda item: bool(_programs_of(item)))


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """The programs that tests wait for run beside the others."""
    items: Sequence[pytest.Item] = () if session.config.option.collectonly else session.items
    needed = set().union(*map(_programs_of, items))
    background = Background(module for name, module in _PROGRAMS.items() if name in needed)
    session.config.stash[_BACKGROUND] = background
    try:
        return (yield)
    finally:
        background.end()


def _printed_by(program: str) -> Callable[[pytest.Config], str]:
    @pytest.fixture(scope="session", name=program)
    def printed(pytestconfig: pytest.Config) -> str:
        return pytestconfig.stash[_BACKGROUND].output(_PROGRAMS[program])

    return printed


sharded_logprobs, target_facts, executed_notebook, kernel_lines = map(_printed_by, _PROGRAMS)


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
