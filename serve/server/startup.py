"""From an EngineConfig to a running engine: files, weights, programs, with a Reporter told of each."""

import hashlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from compiled.program_cache import use_persistent_cache
from compiled.programs import RefusedError, Shape
from compiled.runner import ModelRunner
from compiled.shapes import Buckets, SlotShape, StateShape, make_buckets
from compiled.state import MAX_REQUESTED_IDS
from model.config import ConfigError, ModelConfig
from model.kernels.cpu.build import ensure_built
from model.kv_cache import PAGE_SIZE
from model.sharding import tensor_mesh
from model.transformer import BoundModel
from model.weights.checkpoint import Checkpoint
from model.weights.errors import ModelLoadError
from model.weights.gguf import GgufCheckpoint
from model.weights.loader import kernels_used, load_model
from model.weights.source import ModelSource, default_model_path, resolve_model
from model.weights.weight_table import open_checkpoint
from serve.config.config import EngineConfig
from serve.config.generation_config import DefaultsError, GenerationDefaults, defaults_of
from serve.engine.engine import Engine
from serve.engine.observer import Observer
from serve.engine.request import EngineLimits
from serve.server.memory import free_memory
from serve.server.memory_plan import MemoryPlan, PlanError, plan_memory
from serve.server.report import Reporter
from serve.server.report_facts import cache_hits, memory_planned, model_found, program_compiled
from serve.server.startup_events import AllCompiled, DefaultsTaken, Preparing, WeightsLoaded
from serve.text.chat_template import ChatTemplateError
from serve.text.gguf_tokenizer import tokenizer_from_gguf
from serve.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer


class StartupError(Exception):
    """The options and the model do not fit together; the message is meant for whoever started us."""


# What is wrong with a model or the options, in words for whoever started us.
STARTUP_ERRORS = (ModelLoadError, ConfigError, TokenizerError, DefaultsError, StartupError)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is compiled, and what belongs to it."""

    name: str
    runner: ModelRunner
    tokenizer: Tokenizer
    limits: EngineLimits
    chat_template: str | None  # instead of the tokenizer's
    fingerprint: str
    defaults: GenerationDefaults
    config: EngineConfig  # with the dtype that was chosen

    def cache_labels(self) -> dict[str, str]:
        """What a dashboard is told of the cache."""
        return {
            "block_size": str(PAGE_SIZE),
            "num_gpu_blocks": str(self.runner.pages - 1),
            "cache_dtype": self.config.dtype,
            "enable_prefix_caching": str(self.config.enable_prefix_caching),
        }

    def start_engine(self, observer: Observer | None = None) -> Engine:
        """An engine that runs; `observer` is told of its work."""
        config = self.config
        engine = Engine(
            self.runner,
            self.limits,
            max_waiting=config.max_num_queued_reqs,
            max_num_batched_tokens=config.batched_tokens,
            prefix_caching=config.enable_prefix_caching,
            max_waiting_tokens=config.max_num_queued_tokens,
            seed=config.seed,
            observer=observer,
        )
        engine.start()
        return engine


def load(config: EngineConfig, reporter: Reporter) -> Loaded:
    """Loads and compiles a model.

    Raises:
        ModelLoadError, ConfigError, TokenizerError, DefaultsError, StartupError: what is wrong, in words for the user.
    """
    try:
        use_persistent_cache(config.compilation_cache_dir.expanduser())
    except (OSError, RuntimeError) as error:
        raise StartupError(f"--compilation-cache-dir {config.compilation_cache_dir}: {error}") from error
    template = chosen_template(config)
    source = _find(config, reporter)
    defaults = defaults_of(config.generation_config, config.override_generation_config, source.path)
    if said := defaults.said():
        reporter.tell(DefaultsTaken(said))
    mesh = _mesh(config)
    if jax.default_backend() == "cpu":
        ensure_built(lambda line: reporter.tell(Preparing(line)))
    checkpoint = open_checkpoint(source)
    try:
        tokenizer = _tokenizer(config, source, checkpoint)
        model_config = checkpoint.config
        max_model_len = _max_model_len(config, model_config)
        check_tokenizer(source.name, tokenizer, model_config.vocab_size)
        if config.needs_chat_template and template is None and tokenizer.chat_template is None:
            raise StartupError(f"{source.name} has no chat template: give one with --chat-template")
        check_template(source.name, tokenizer, template)
        config = replace(config, dtype=chosen_dtype(config, checkpoint))
        buckets = make_buckets(
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=config.batched_tokens,
            whole_vocabulary=config.max_logprobs == -1,
        )
        reporter.tell(model_found(source.name, checkpoint, config, max_model_len, mesh))
        plan = _plan(source.name, model_config, buckets, config)
        reporter.tell(memory_planned(plan, max_model_len))
        model = _load(checkpoint, config, max_model_len, mesh, reporter)
    finally:
        checkpoint.close()
    try:
        runner = _compile(model, buckets, plan.pages, config, reporter)
    except RefusedError as error:
        raise StartupError(f"{source.name} cannot be compiled for this device: {error}") from error
    limits = EngineLimits(
        max_model_len=max_model_len,
        max_logprobs=runner.max_logprobs,
        vocab_size=model_config.vocab_size,
        cache_tokens=(runner.pages - 1) * PAGE_SIZE,
        max_scored_ids=MAX_REQUESTED_IDS,
        whole_vocabulary=config.max_logprobs == -1,
    )
    fingerprint = system_fingerprint(config, runner.buckets, kernels_used(model))
    return Loaded(source.name, runner, tokenizer, limits, template, fingerprint, defaults, config)


def _find(config: EngineConfig, reporter: Reporter) -> ModelSource:
    if config.model:
        return resolve_model(config.model, config.revision)
    path = default_model_path(lambda line: reporter.tell(Preparing(line)))
    return ModelSource("SmolLM2-135M-Instruct", path)


def _tokenizer(config: EngineConfig, source: ModelSource, checkpoint: Checkpoint) -> Tokenizer:
    if config.tokenizer is not None:
        return local_tokenizer(config.tokenizer.expanduser())
    if isinstance(checkpoint, GgufCheckpoint):
        return tokenizer_from_gguf(checkpoint.metadata)
    return load_tokenizer(source.path)


def local_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory or a .gguf file."""
    if path.suffix != ".gguf":
        return load_tokenizer(path)
    checkpoint = open_checkpoint(ModelSource(path.stem, path))
    try:
        assert isinstance(checkpoint, GgufCheckpoint)
        return tokenizer_from_gguf(checkpoint.metadata)
    finally:
        checkpoint.close()


def check_tokenizer(name: str, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises StartupError for a tokenizer of another model than the one whose vocabulary has `vocab_size` tokens."""
    if tokenizer.vocab_size > vocab_size:
        raise StartupError(f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}")
    for token_id in tokenizer.eos_token_ids:
        if not 0 <= token_id < vocab_size:
            raise StartupError(f"{name}: eos_token_id {token_id} is none of the model's {vocab_size} tokens")


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    own = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > own:
        raise StartupError(f"--max-model-len {config.max_model_len} is above the model's own {own}")
    return config.max_model_len or own


def _load(
    checkpoint: Checkpoint, config: EngineConfig, max_model_len: int, mesh: Mesh | None, reporter: Reporter
) -> BoundModel:
    began = time.perf_counter()
    with reporter.loading() as progress:
        model = load_model(
            checkpoint,
            config.dtype,
            progress,
            int8=config.quantization == "int8",
            max_model_len=max_model_len,
            mesh=mesh,
        )
    size = sum(leaf.nbytes for leaf in model.leaves)
    reporter.tell(WeightsLoaded(size, time.perf_counter() - began, kernels_used(model)))
    return model


def check_template(name: str, tokenizer: Tokenizer, instead: str | None) -> None:
    """Raises StartupError for a template, the tokenizer's or another, that cannot even write a user's "Hi"."""
    if instead is None and tokenizer.chat_template is None:
        return
    try:
        tokenizer.render_chat(
            [{"role": "user", "content": "Hi"}],
            add_generation_prompt=True,
            continue_final_message=False,
            chat_template_kwargs={},
            chat_template=instead,
        )
    except ChatTemplateError as error:
        raise StartupError(f"{name}: the chat template fails: {error}") from None


def chosen_template(config: EngineConfig) -> str | None:
    """The template that --chat-template names or is.

    Raises:
        StartupError: the file cannot be read.
    """
    option = config.chat_template
    if option is None or "{" in option:
        return option
    try:
        return Path(option).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--chat-template {option}: cannot be read as a text file") from error


def chosen_dtype(config: EngineConfig, checkpoint: Checkpoint) -> str:
    """Of weights and cache: what --dtype says, or float32 for a model whose matrices are all stored so."""
    if config.dtype != "auto":
        return config.dtype
    kinds = {info.stored_as for info in checkpoint.names().values() if len(info.shape) > 1}
    return "float32" if kinds == {"F32"} and config.quantization is None else "bfloat16"


def _mesh(config: EngineConfig) -> Mesh | None:
    """The devices over which the model is cut; None: one."""
    count, devices = config.tensor_parallel_size, _devices()
    if count > len(devices):
        platform = devices[0].platform
        hint = f"; JAX_NUM_CPU_DEVICES={count} in the environment makes as many of one" if platform == "cpu" else ""
        raise StartupError(f"--tensor-parallel-size {count}: there are {len(devices)} {platform} devices{hint}")
    return tensor_mesh(devices[:count]) if count > 1 else None


def _devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # such as JAX_PLATFORMS=cuda where there is no GPU
        raise StartupError(f"JAX finds no device of JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}") from error


def _plan(name: str, model: ModelConfig, buckets: Buckets, config: EngineConfig) -> MemoryPlan:
    try:
        return plan_memory(
            model,
            buckets,
            dtype=config.dtype,
            int8=config.quantization == "int8",
            asked=config.kv_cache_memory,
            free=free_memory(config.tensor_parallel_size),
            shards=config.tensor_parallel_size,
            platform=jax.default_backend(),
        )
    except PlanError as error:
        raise StartupError(f"{name}: {error}") from None


def _compile(model: BoundModel, buckets: Buckets, pages: int, config: EngineConfig, reporter: Reporter) -> ModelRunner:
    # In the order in which they are begun.
    shapes: tuple[Shape, ...] = (
        StateShape(pages, buckets.slots),
        *buckets.steps(),
        *buckets.heads(),
        SlotShape(buckets.slots),
    )
    began = time.perf_counter()
    with cache_hits() as hits, reporter.compiling([shape.name for shape in shapes]) as ready:
        runner = ModelRunner(
            model,
            buckets,
            pages=pages,
            max_logprobs=config.computed_logprobs,
            on_compiled=lambda program: ready(program_compiled(program)),
        )
    cached = min(len(hits), len(shapes))
    reporter.tell(AllCompiled(len(shapes), cached, time.perf_counter() - began))
    return runner


def system_fingerprint(config: EngineConfig, buckets: Buckets, kernels: Sequence[str]) -> str:
    """Names what the numbers come from: versions, platform, weights, own kernels, and a digest of shapes and options.

    The same weights under the same fingerprint give the same bits on one CPU; on others too, but for what XLA
    multiplies, whose order is the CPU's. On a GPU it chooses among products by timing them when it compiles.
    """
    options = (config.computed_logprobs, config.batched_tokens, config.enable_prefix_caching)
    cut = (config.tensor_parallel_size,) if config.tensor_parallel_size > 1 else ()
    shapes = (buckets, *options, *cut)
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
    platform = jax.default_backend()
    chip = "" if platform == "cpu" else "-" + re.sub(r"\W+", "-", jax.devices()[0].device_kind)
    return f"fp_jax{jax.__version__}_{platform}{chip}_{config.weights_as}_{'-'.join(kernels) or 'xla'}_{digest}"
