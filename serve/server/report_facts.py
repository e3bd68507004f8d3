"""From what start-up has in hand to the events that tell of it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.monitoring
from jax.sharding import Mesh

from compiled.programs import Program
from model.kv_cache import PAGE_SIZE
from model.weights.checkpoint import Checkpoint
from serve.config.config import EngineConfig
from serve.server.memory_plan import MemoryPlan
from serve.server.startup_events import MemoryPlanned, ModelFound, ProgramCompiled


def model_found(
    name: str, checkpoint: Checkpoint, config: EngineConfig, max_model_len: int, mesh: Mesh | None
) -> ModelFound:
    """What is going to be loaded, and where to; `config` with the dtype that was chosen."""
    device = jax.devices()[0]
    return ModelFound(
        model=name,
        family=checkpoint.config.family,
        parameters=sum(math.prod(info.shape) for info in checkpoint.names().values()),
        weights_as=config.weights_as,
        platform=device.platform,
        device=device.device_kind,
        devices=mesh.size if mesh else 1,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
    )


def memory_planned(plan: MemoryPlan, max_model_len: int) -> MemoryPlanned:
    """The plan in bytes and tokens."""
    tokens = (plan.pages - 1) * PAGE_SIZE
    return MemoryPlanned(plan.weights, plan.cache, tokens, plan.workspace, plan.free, max_model_len)


def program_compiled(program: Program) -> ProgramCompiled:
    """A program that is ready."""
    return ProgramCompiled(program.name, program.lower_seconds, program.compile_seconds, program.temp_bytes)


@contextmanager
def cache_hits() -> Iterator[list[str]]:
    """A list that grows by one for each executable that the persistent cache has."""
    hits: list[str] = []

    def listen(event: str, **_: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)
