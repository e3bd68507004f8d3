"""The files of a model, opened and checked against the options before anything is loaded."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from model.config import ConfigError
from model.formats import FLOATS
from model.weights.checkpoint import Checkpoint, ModelLoadError
from model.weights.gguf import GgufCheckpoint
from model.weights.source import ModelSource, default_model_path, resolve_model
from model.weights.weight_table import open_checkpoint
from serve.config.engine_config import MAX_LOGPROBS_LIMIT, EngineConfig
from serve.config.generation_config import DefaultsError, GenerationDefaults, defaults_of
from serve.text.chat_template import ChatTemplateError, render_chat
from serve.text.decisions.prompts import DecisionSettings, SettingsError, read_settings
from serve.text.gguf_tokenizer import gguf_eos_token_ids, tokenizer_from_gguf
from serve.text.tokenizer import Tokenizer, TokenizerError, eos_token_ids_of, load_tokenizer

DEFAULT_MODEL = "SmolLM2-135M-Instruct"  # its name in the API


class StartupError(Exception):
    """The options do not fit the model or the machine; the message is for the user."""


# All errors of models and options whose messages are for the user.
STARTUP_ERRORS = (ModelLoadError, ConfigError, TokenizerError, DefaultsError, SettingsError, StartupError)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    source: ModelSource
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    decisions: DecisionSettings
    max_model_len: int
    config: EngineConfig  # dtype and max_logprobs resolved


@contextmanager
def open_model(config: EngineConfig, on_prepare: Callable[[str], None]) -> Iterator[ModelFiles]:
    """Open a model, downloading it if necessary; the checkpoint is closed at the end of the context.

    `on_prepare` gets each line about a download.

    Raises:
        STARTUP_ERRORS: the files are damaged, not supported, or do not fit the options.
    """
    chat_template = read_template(config)
    if config.model:
        source = resolve_model(config.model, config.revision, on_prepare)
    else:
        source = ModelSource(DEFAULT_MODEL, default_model_path(on_prepare))
    defaults = defaults_of(config.generation_config, config.override_generation_config, source.path)
    decisions = read_settings(source.path) if source.path.is_dir() else DecisionSettings()
    with closing(open_checkpoint(source)) as checkpoint:
        if config.tokenizer is not None:
            tokenizer = local_tokenizer(config.tokenizer.expanduser())
        elif isinstance(checkpoint, GgufCheckpoint):
            tokenizer = tokenizer_from_gguf(checkpoint.metadata)
        else:
            tokenizer = load_tokenizer(source.path)
        tokenizer.eos_token_ids |= _eos_token_ids(config, source, checkpoint)
        limit = checkpoint.config.max_position_embeddings
        max_model_len = config.max_model_len or limit
        if max_model_len > limit:
            raise StartupError(f"--max-model-len {max_model_len} exceeds the model's limit of {limit}")
        check_tokenizer(source.name, tokenizer, checkpoint.config.vocab_size)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        if config.needs_chat_template and tokenizer.chat_template is None:
            raise StartupError(f"{source.name} has no chat template: give one with --chat-template")
        check_template(source.name, tokenizer)
        max_logprobs = resolve_max_logprobs(config, checkpoint.config.vocab_size)
        config = replace(config, dtype=resolve_dtype(config, checkpoint), max_logprobs=max_logprobs)
        yield ModelFiles(source, checkpoint, tokenizer, defaults, decisions, max_model_len, config)


def _eos_token_ids(config: EngineConfig, source: ModelSource, checkpoint: Checkpoint) -> set[int]:
    """EOS ids of the model's own files, whatever --tokenizer is, and of --generation-config."""
    if isinstance(checkpoint, GgufCheckpoint):
        ids = gguf_eos_token_ids(checkpoint.metadata)
    else:
        ids = eos_token_ids_of(source.path)
    path = config.generation_config
    return ids if path in ("auto", "vllm") else ids | eos_token_ids_of(Path(path).expanduser())


def api_name(model: str) -> str:
    """The name in the API of a model as the user wrote it: the folder's or file's name for a path, else a hub id."""
    path = os.path.expanduser(model)
    return os.path.basename(os.path.abspath(path)) if os.path.exists(path) else model


def local_tokenizer(path: Path) -> Tokenizer:
    if path.suffix != ".gguf":
        return load_tokenizer(path)
    with closing(open_checkpoint(ModelSource(path.stem, path))) as checkpoint:
        assert isinstance(checkpoint, GgufCheckpoint)
        return tokenizer_from_gguf(checkpoint.metadata)


def check_tokenizer(name: str, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises StartupError if the tokenizer does not belong to a model with `vocab_size` tokens."""
    if tokenizer.vocab_size > vocab_size:
        raise StartupError(f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}")
    for token_id in tokenizer.eos_token_ids:
        if not 0 <= token_id < vocab_size:
            raise StartupError(f"{name}: eos_token_id {token_id} is outside the model's {vocab_size} tokens")


def check_template(name: str, tokenizer: Tokenizer) -> None:
    """Raises StartupError if the tokenizer has a chat template that cannot render a user's "Hi"."""
    if tokenizer.chat_template is None:
        return
    messages, tokens = [{"role": "user", "content": "Hi"}], tokenizer.special_tokens
    try:
        render_chat(tokenizer.chat_template, messages, special_tokens=tokens, add_generation_prompt=True)
    except ChatTemplateError as error:
        raise StartupError(f"{name}: the chat template fails: {error}") from None


def read_template(config: EngineConfig) -> str | None:
    """The text of --chat-template, a template or the name of a file; raises StartupError if that cannot be read."""
    option = config.chat_template
    if option is None or "{" in option:
        return option
    try:
        return Path(option).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--chat-template {option}: cannot be read as a text file") from error


def resolve_dtype(config: EngineConfig, checkpoint: Checkpoint) -> str:
    """The dtype of activations: --dtype, or for "auto" float32 if weights are quantized or all stored as float32."""
    if config.dtype != "auto":
        return config.dtype
    matrices = [info for info in checkpoint.names().values() if len(info.shape) > 1]
    is_quantized = any(info.stored_as not in FLOATS for info in matrices)
    if config.quantization != "auto":
        is_quantized = config.quantization != "none"
    return "float32" if is_quantized or {info.stored_as for info in matrices} == {"F32"} else "bfloat16"


def resolve_max_logprobs(config: EngineConfig, vocab_size: int) -> int:
    """--max-logprobs, with -1 for the vocabulary's size or more; raises StartupError for one that is too large."""
    if config.max_logprobs <= MAX_LOGPROBS_LIMIT:
        return config.max_logprobs
    if config.max_logprobs < vocab_size:
        limit = f"must be at most {MAX_LOGPROBS_LIMIT}, or -1 for the full vocabulary of {vocab_size}"
        raise StartupError(f"--max-logprobs {config.max_logprobs}: {limit}")
    return -1
