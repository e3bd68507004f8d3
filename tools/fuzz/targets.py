"""Fuzz targets: seeds, mutation and execution of inputs."""

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tools.fuzz import bodies, gguf_mutations, gguf_seeds, model_folders
from tools.fuzz.model_opener import ModelOpener
from tools.fuzz.server import fuzz_server, send

type Run = Callable[[bytes], object]  # raises if the input is a finding


@dataclass(frozen=True, slots=True)
class Target:
    """A fuzz target."""

    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, Random], bytes]
    open: Callable[[], AbstractContextManager[Run]]  # shared state for many runs


@contextmanager
def _requests() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        server = runner.run(stack.enter_async_context(fuzz_server()))
        try:
            yield lambda data: runner.run(send(server, *bodies.unpack(data)))
        finally:
            runner.run(stack.aclose())


@contextmanager
def _gguf() -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as folder:
        yield ModelOpener(Path(folder)).gguf


@contextmanager
def _safetensors() -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as folder:
        yield ModelOpener(Path(folder)).safetensors


TARGETS = {
    "requests": Target(bodies.seeds, bodies.mutate, _requests),
    "gguf": Target(gguf_seeds.seeds, gguf_mutations.mutate, _gguf),
    "safetensors": Target(model_folders.seeds, model_folders.mutate, _safetensors),
}
