"""Fixtures for all tests: the default model, a real server, and the outputs of programs that take long."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from xdist.scheduler import LoadFileScheduling

from tests.support.server_process import ROOT, ServerProcess

# Fixture -> the module whose output it returns. Only slow tests of one file use it.
_PROGRAMS = {
    "sharded_logprobs": "tests.support.sharded_logprobs",
    "target_facts": "tools.portability.target_facts",
    "executed_notebook": "tools.hlo.executed_notebook",
    "kernel_lines": "tests.support.kernel_lines",
}

# Files that share a server: one worker runs them.
_GROUPS = {
    "tools/guides/test_guides.py": "server",
    "tests/integration/test_complaints.py": "server",
    "tests/integration/test_dashboard.py": "server",
    "tests/integration/test_llm.py": "server",
    "tests/integration/test_score_model.py": "server",
    "tests/integration/test_server.py": "server",
    "tests/integration/test_structured_outputs.py": "server",
    "tests/integration/browser/test_decide.py": "server",
    "tests/integration/browser/test_inspector.py": "server",
    "tools/clients/test_openai_python.py": "server",
    "tools/clients/test_vllm_bench.py": "server",
    "tools/soak/test_soak.py": "server",
}
# What runs first, so that no worker ends with one of them: after programs and groups.
_LONG = (
    "tests/integration/test_ray.py",
    "tests/integration/test_package.py",
    "tests/integration/test_one_number_per_token.py",
    "tests/integration/test_golden.py",
    "tests/model/test_pallas_attention.py",
    "tests/model/test_parity.py",
)


def pytest_configure() -> None:
    """Let Ctrl-C interrupt, also in a background job, whose shell ignores it for all processes of the job."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that need a program's output as slow, and sort: what takes long comes first."""
    slow = {item for item in items if isinstance(item, pytest.Function) and _PROGRAMS.keys() & {*item.fixturenames}}
    for item in slow:
        item.add_marker(pytest.mark.slow)
    files = [*_GROUPS, *_LONG]
    order = {file: position for position, file in enumerate(files)}
    items.sort(key=lambda item: (item not in slow, order.get(item.nodeid.partition("::")[0], len(order))))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give the tests of a file, or of a group of files, to one worker."""
    scheduling: Any = LoadFileScheduling(config, log)
    scheduling._split_scope = lambda nodeid: _GROUPS.get(file := nodeid.partition("::")[0], file)
    return scheduling


def _output_of(program: str) -> Callable[[], str]:
    @pytest.fixture(scope="session", name=program)
    def output() -> str:
        process = subprocess.run(
            [sys.executable, "-m", _PROGRAMS[program]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    return output


sharded_logprobs, target_facts, executed_notebook, kernel_lines = map(_output_of, _PROGRAMS)


@pytest.fixture(scope="session")
def compilation_cache(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of compiled programs shared by all server processes, also in later runs."""
    return _cache_folder(pytestconfig, tmp_path_factory, "servers")


@pytest.fixture(scope="session", autouse=True)
def _programs_are_compiled_once(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the programs that tests compile in their own process, in JAX's cache: it notices patched code.

    JAX does not write an entry atomically, so each worker has a folder of its own.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    folder = _cache_folder(pytestconfig, tmp_path_factory, f"tests-{worker}")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _cache_folder(config: pytest.Config, temporary: pytest.TempPathFactory, name: str) -> Path:
    if not hasattr(config, "cache"):  # `-p no:cacheprovider`
        return temporary.mktemp(name)
    return config.cache.mkdir("programs") / name


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
