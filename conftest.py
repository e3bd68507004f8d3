"""Fixtures for all tests: the default model, a real server, and programs that run in the background."""

import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from compiled.runner import ModelRunner
from model.weights.source import default_model_path
from tests.support.background import Background
from tests.support.runners import make_runner
from tests.support.server_process import ServerProcess

# Fixture -> the module whose output it returns, in the order in which they run.
_PROGRAMS = {
    "sharded_logprobs": "tests.support.sharded_logprobs",
    "target_facts": "tools.portability.target_facts",
    "executed_notebook": "tools.hlo.executed_notebook",
    "kernel_lines": "tests.support.kernel_lines",
}
_BACKGROUND = pytest.StashKey[Background]()


def pytest_configure() -> None:
    """Let Ctrl-C interrupt, also in a background job, whose shell ignores it for all processes of the job."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _programs_of(item: pytest.Item) -> set[str]:
    """Background programs that a test waits for; none if it is skipped."""
    if not isinstance(item, pytest.Function) or any(mark.args[0] for mark in item.iter_markers("skipif")):
        return set()
    return _PROGRAMS.keys() & {*item.fixturenames}


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that wait for a background program as slow and run them last."""
    items.sort(key=lambda item: bool(_programs_of(item)))
    for item in items:
        if _programs_of(item):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """Run the background programs while the other tests run."""
    items: Sequence[pytest.Item] = () if session.config.option.collectonly else session.items
    needed = set().union(*map(_programs_of, items))
    background = Background(module for name, module in _PROGRAMS.items() if name in needed)
    session.config.stash[_BACKGROUND] = background
    try:
        return (yield)
    finally:
        background.close()


def _output_of(program: str) -> Callable[[pytest.Config], str]:
    @pytest.fixture(scope="session", name=program)
    def output(pytestconfig: pytest.Config) -> str:
        return pytestconfig.stash[_BACKGROUND].output(_PROGRAMS[program])

    return output


sharded_logprobs, target_facts, executed_notebook, kernel_lines = map(_output_of, _PROGRAMS)


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of compiled programs shared by all server processes of this run."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="session")
def server(compilation_cache: Path) -> Iterator[ServerProcess]:
    """A real server with the default model in float32, whose log-probs are within 1e-4 of the reference."""
    process = ServerProcess(
        *("--dtype", "float32", "--max-num-seqs", "4", "--max-model-len", "8192"),
        *("--compilation-cache-dir", str(compilation_cache)),
    )
    yield process
    assert process.process.poll() is None, "".join(process.log)  # no request may have ended it
    assert process.terminate() == 0


@pytest.fixture(scope="session")
def float32_runner() -> ModelRunner:
    """The default model in float32."""
    return make_runner(default_model_path(), "float32")


@pytest.fixture(scope="session")
def bfloat16_runner() -> ModelRunner:
    """The default model in bfloat16, on the CPU kernels if this machine has them."""
    return make_runner(default_model_path(), "bfloat16")


@pytest.fixture(scope="session")
def int8_runner() -> ModelRunner:
    """The default model with int8 matrices, on the CPU kernels if this machine has them."""
    return make_runner(default_model_path(), "int8")


@pytest.fixture(
    params=[pytest.param("float32", marks=pytest.mark.slow), "bfloat16", pytest.param("int8", marks=pytest.mark.slow)]
)
def runner(request: pytest.FixtureRequest) -> ModelRunner:
    """The default model with weights of each kind."""
    chosen: ModelRunner = request.getfixturevalue(f"{request.param}_runner")
    return chosen
