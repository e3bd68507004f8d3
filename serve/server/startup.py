"""Loading of a model: from an EngineConfig to compiled programs and an engine, without HTTP."""

import hashlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import jaxlib.version
from jax.sharding import Mesh

from compiled.program_cache import ProgramCache, jax_cache_disabled
from compiled.programs import RefusedError, Shape
from compiled.runner import ModelRunner
from compiled.shapes import COPY_PAGES, PENALTIES, READ_EXPERTS, ZERO_STATE, Buckets, make_buckets
from compiled.state import MAX_REQUESTED_IDS
from model.kernels.cpu.build import ensure_built
from model.kernels.dispatch import Kernels, load_kernels
from model.sharding import tensor_mesh
from model.transformer import BoundModel
from model.weights.loader import StoredWeights, kernels_used, load_model, storage_of, stored_weights
from serve import __version__
from serve.config.engine_config import EngineConfig
from serve.config.generation_config import GenerationDefaults
from serve.engine.engine import Engine
from serve.engine.observer import Observer
from serve.engine.request import EngineLimits, EngineOptions
from serve.server.console import Reporter
from serve.server.memory_plan import PlanError, free_memory, plan_memory
from serve.server.model_files import ModelFiles, StartupError, api_name, open_model
from serve.server.startup_events import (
    Event,
    all_compiled,
    defaults_applied,
    memory_planned,
    model_found,
    weights_loaded,
)
from serve.text.decisions.prompts import DecisionSettings
from serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Loaded:
    name: str  # in the API
    runner: ModelRunner
    tokenizer: Tokenizer
    limits: EngineLimits
    fingerprint: str
    defaults: GenerationDefaults
    config: EngineConfig  # dtype resolved
    decisions: DecisionSettings = field(default_factory=DecisionSettings)
    bits_per_weight: float | None = None  # of the matrices

    def start_engine(self, observer: Observer | None = None) -> Engine:
        config = self.config
        options = EngineOptions(
            max_num_batched_tokens=config.batched_tokens,
            max_num_queued_reqs=config.max_num_queued_reqs,
            max_num_queued_tokens=config.max_num_queued_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
            seed=config.seed,
        )
        engine = Engine(self.runner, self.limits, options, observer)
        engine.start()
        return engine


@jax_cache_disabled()
def load(options: EngineConfig, reporter: Reporter) -> Loaded:
    """Load and compile a model.

    Raises:
        STARTUP_ERRORS: the model cannot be served; the message is for the user.
    """
    try:
        cache = ProgramCache(options.compilation_cache_dir.expanduser())
    except (OSError, RuntimeError) as error:
        raise StartupError(f"--compilation-cache-dir {options.compilation_cache_dir}: {error}") from error
    mesh = _mesh(options)

    def on_prepare(line: str) -> None:
        reporter.report(Event("preparing", line))

    if jax.default_backend() == "cpu":
        ensure_built(on_prepare)
    with open_model(options, on_prepare) as files:
        config, max_model_len = files.config, files.max_model_len
        if values := files.defaults.as_dict():
            reporter.report(defaults_applied(values))
        reporter.report(model_found(files, jax.devices()[0]))
        kernels = load_kernels()
        buckets = make_buckets(
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=config.batched_tokens,
            full_vocab=config.max_logprobs == -1,
            segment=kernels.segment(jax.default_backend()),
        )
        shards = _shards_of(files)
        storage = storage_of(config.dtype, config.stored_quantization, kernels, shards=shards)
        stored = stored_weights(files.checkpoint, storage, shards)
        free, platform = free_memory(config.tensor_parallel_size), jax.default_backend()
        try:
            plan = plan_memory(
                files.checkpoint.config, buckets, config, weights=stored.nbytes, free=free, platform=platform
            )
        except PlanError as error:
            raise StartupError(f"{files.source.name}: {error}") from None
        reporter.report(memory_planned(plan, max_model_len))
        model = _load_weights(files, stored, kernels, mesh, reporter)
    try:
        runner = _compile(model, buckets, plan.pages, config, cache, reporter)
    except RefusedError as error:
        raise StartupError(f"{files.source.name} cannot be compiled for this device: {error}") from error
    experts = files.checkpoint.config.experts
    limits = EngineLimits(
        max_model_len=max_model_len,
        max_logprobs=runner.max_logprobs,
        vocab_size=files.checkpoint.config.vocab_size,
        cache_tokens=plan.cache_tokens,
        max_requested_ids=MAX_REQUESTED_IDS,
        full_vocab=config.max_logprobs == -1,
        routing=(files.checkpoint.config.num_layers, experts.per_token) if experts else None,
    )
    fingerprint = system_fingerprint(config, buckets, kernels_used(model))
    name = api_name(files.source.name)
    bits = round(stored.bits_per_weight, 3)
    return Loaded(name, runner, files.tokenizer, limits, fingerprint, files.defaults, config, files.decisions, bits)


def _shards_of(files: ModelFiles) -> int:
    """The number of devices that the model is sharded across; raises StartupError if it cannot be."""
    shards = files.config.tensor_parallel_size
    if shards > 1 and files.checkpoint.config.latent:
        message = f"--tensor-parallel-size {shards}: multi-head latent attention is not sharded"
        raise StartupError(f"{files.source.name}: {message}")
    return shards


def _mesh(config: EngineConfig) -> Mesh | None:
    """The devices that the model is sharded across; None for one device."""
    count = config.tensor_parallel_size
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # such as JAX_PLATFORMS=cuda on a machine without a GPU
        raise StartupError(f"JAX finds no device of JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}") from error
    if count > len(devices):
        platform = devices[0].platform
        hint = f"; set JAX_NUM_CPU_DEVICES={count} to split one CPU" if platform == "cpu" else ""
        raise StartupError(f"--tensor-parallel-size {count}: there are {len(devices)} {platform} devices{hint}")
    return tensor_mesh(devices[:count]) if count > 1 else None


def _load_weights(
    files: ModelFiles, stored: StoredWeights, kernels: Kernels, mesh: Mesh | None, reporter: Reporter
) -> BoundModel:
    start = time.perf_counter()
    with reporter.loading() as progress:
        model = load_model(
            files.checkpoint,
            files.config.dtype,
            progress,
            quantization=files.config.stored_quantization,
            max_model_len=files.max_model_len,
            mesh=mesh,
            kernels=kernels,
        )
    model = replace(model, kv_dtype=jnp.dtype(files.config.kv_dtype))
    size = sum(leaf.nbytes for leaf in model.leaves)
    reporter.report(weights_loaded(size, stored, time.perf_counter() - start, kernels_used(model)))
    return model


def _compile(
    model: BoundModel, buckets: Buckets, pages: int, config: EngineConfig, cache: ProgramCache, reporter: Reporter
) -> ModelRunner:
    # In the order in which the runner starts to compile them.
    shapes: tuple[Shape, ...] = (ZERO_STATE, *buckets.steps(), *buckets.heads(), PENALTIES, COPY_PAGES)
    shapes += (READ_EXPERTS,) if model.config.experts else ()
    start = time.perf_counter()
    with reporter.compiling([shape.name for shape in shapes]) as on_compiled:
        k = config.computed_logprobs
        runner = ModelRunner(model, buckets, pages=pages, max_logprobs=k, on_compiled=on_compiled, cache=cache)
    cached = sum(program.is_cached for program in runner.programs.values())
    reporter.report(all_compiled(len(shapes), cached, time.perf_counter() - start))
    return runner


def system_fingerprint(config: EngineConfig, buckets: Buckets, kernels: Sequence[str]) -> str:
    """Identify what outputs and log-probs depend on besides the weights: versions, platform, kernels, shapes, options.

    On one CPU, equal weights and fingerprints give equal bits. On different CPUs they do too, except where XLA
    multiplies matrices, since its order of summation depends on the CPU. On a GPU, XLA chooses among implementations
    by timing them when it compiles.
    """
    options = (
        *(config.computed_logprobs, config.batched_tokens),
        *(config.enable_prefix_caching, config.tensor_parallel_size, config.kv_dtype, config.grammar_fast_forward),
    )
    versions = (__version__, jaxlib.version.__version__)
    digest = hashlib.sha256(repr((versions, buckets, options)).encode()).hexdigest()[:8]
    platform = jax.default_backend()
    chip = "" if platform == "cpu" else "-" + re.sub(r"\W+", "-", jax.devices()[0].device_kind)
    return f"fp_jax{jax.__version__}_{platform}{chip}_{config.weights_as}_{'-'.join(kernels) or 'xla'}_{digest}"
