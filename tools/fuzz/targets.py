"""What is fuzzed: where inputs come from, and what is done with one."""

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tools.fuzz import bodies, gguf_accidents, gguf_seeds, model_folders
from tools.fuzz.open_files import Opener
from tools.fuzz.server import answering, asked

type Run = Callable[[bytes], object]  # raises where an input is a finding


@dataclass(frozen=True, slots=True)
class Target:
    """One of them."""

    seeds: Callable[[], list[bytes]]
    mutated: Callable[[bytes, Random], bytes]
    opened: Callable[[], AbstractContextManager[Run]]  # whatever an input needs that is made once for many


@contextmanager
def _requests() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        server = runner.run(stack.enter_async_context(answering()))
        try:
            yield lambda data: runner.run(asked(server, *bodies.unpacked(data)))
        finally:
            runner.run(stack.aclose())


@contextmanager
def _gguf() -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as folder:
        yield Opener(Path(folder)).gguf


@contextmanager
def _safetensors() -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as folder:
        yield Opener(Path(folder)).safetensors


TARGETS = {
    "requests": Target(bodies.seeds, bodies.mutated, _requests),
    "gguf": Target(gguf_seeds.seeds, gguf_accidents.mutated, _gguf),
    "safetensors": Target(model_folders.seeds, model_folders.mutated, _safetensors),
}
