"""EngineConfig: the options of a model and its engine, which all commands and `LLM` share.

Each flag is declared here or in a subclass, once, and read where it is used. It has vLLM's name if vLLM has it.
"""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict

from serve.config.options import LOGPROBS, MODEL, PROCESS, SCHEDULING, option, switch
from serve.config.values import Between, MemoryAmount, OneOf, parse_memory

DEFAULT_MAX_LOGPROBS = 20
_FORMATS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "mxfp4")
QUANTIZATIONS = ("auto", "none", "int8", *_FORMATS)
# Options of EngineConfig that only some commands have as flags.
SAMPLING_DEFAULTS = ("generation_config", "override_generation_config", "seed")
QUEUE_LIMITS = ("max_num_queued_reqs", "max_num_queued_tokens")

MAX_LOGPROBS_LIMIT = 1024  # a program with a larger top-k would be slow for every request


def _max_logprobs(text: str) -> int:
    return -1 if text == "-1" else Between(1, 1 << 24)(text)  # more than the limit: the vocabulary's size


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The model and how it runs. Raises ValueError for contradicting options."""

    needs_chat_template: ClassVar[bool] = False  # refuse a model without a chat template

    model: str | None = option(
        MODEL,
        "hub id (org/name, org/name:Q4_K_M or org/name/file.gguf), local folder or .gguf file; default: "
        "SmolLM2-135M-Instruct",
        metavar="MODEL",
    )
    tokenizer: Path | None = option(MODEL, "local folder or .gguf file; default: the model's own", Path, metavar="PATH")
    revision: str | None = option(MODEL, "branch, tag or commit of a hub id", metavar="NAME")
    dtype: str = option(
        MODEL,
        "dtype of activations, and of weights that are not quantized; auto: float32 for quantized weights and models "
        "stored as float32, else bfloat16",
        OneOf(("auto", "bfloat16", "float32")),
        default="auto",
    )
    quantization: str = option(
        MODEL,
        "weight quantization; auto: block formats of a GGUF file as they are; none: all weights in --dtype; else the "
        "format to which all matrices are rounded, int8 is q8_0",
        OneOf(QUANTIZATIONS),
        default="auto",
    )
    chat_template: str | None = option(MODEL, "Jinja file or template text; overrides the model's", metavar="FILE")
    generation_config: str = option(
        MODEL, "sampling defaults: auto (the model's file), vllm (none) or a path", default="auto", metavar="PATH"
    )
    override_generation_config: str = option(
        MODEL,
        "JSON object of sampling defaults; takes precedence over --generation-config",
        default="{}",
        metavar="JSON",
    )

    max_logprobs: int = option(
        LOGPROBS,
        "maximum number of alternatives per token, up to 1024; -1 or the vocabulary's size: 20 for generated tokens, "
        "the full vocabulary for prompt tokens",
        _max_logprobs,
        default=DEFAULT_MAX_LOGPROBS,
        metavar="N",
    )
    seed: int | None = option(
        LOGPROBS, "seed for requests without one; default: random at each start", Between(0, (1 << 63) - 1)
    )

    max_model_len: int | None = option(
        SCHEDULING, "maximum tokens of prompt and output; default: the model's", Between(2, 1 << 24)
    )
    max_num_seqs: int = option(SCHEDULING, "maximum number of running requests", Between(1, 1024), default=16)
    max_num_batched_tokens: int | None = option(
        SCHEDULING, "prompt and decode tokens per step; default: 256 + --max-num-seqs", Between(17, 1 << 20)
    )
    kv_cache_dtype: str = option(
        SCHEDULING,
        "dtype of keys and values in the KV cache; auto: as --dtype",
        OneOf(("auto", "bfloat16", "float32")),
        default="auto",
    )
    kv_cache_memory: MemoryAmount | None = option(
        SCHEDULING,
        "KV cache size in bytes, such as 800M or 2GiB, or as a share of the memory that the weights leave free, such "
        "as 0.5; default: 1GiB, or more if one request of maximum length needs it",
        parse_memory,
    )
    enable_prefix_caching: bool = switch(
        SCHEDULING, "reuse the KV cache of prompts that start with the same tokens", default=True
    )
    grammar_fast_forward: bool = switch(
        SCHEDULING,
        "append the tokenizer's own tokens, without sampling, where a grammar fixes the text: fewer steps, but outputs "
        "have another distribution",
    )
    max_num_queued_reqs: int = option(
        SCHEDULING, "maximum number of unfinished requests; more get 429", Between(1, 1 << 20), default=1024
    )
    max_num_queued_tokens: int | None = option(
        SCHEDULING,
        "maximum number of prompt tokens of all unfinished requests; more get 429; default: no limit",
        Between(1, 1 << 40),
    )
    tensor_parallel_size: int = option(
        SCHEDULING, "number of devices to shard the model across", Between(1, 1024), default=1
    )
    compilation_cache_dir: Path = option(
        PROCESS, "cache of compiled programs", Path, default=Path("~/.cache/logprobd/xla"), metavar="DIR"
    )
    log_format: str = option(
        PROCESS,
        "start-up messages and logs on stderr; auto: a live display on a terminal, else plain lines",
        OneOf(("auto", "plain", "json")),
        default="auto",
    )
    log_level: str = option(
        PROCESS,
        "log level; debug also logs each compiled program",
        OneOf(("debug", "info", "warning", "error")),
        default="info",
    )

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs + 16:
            raise ValueError(
                f"argument --max-num-batched-tokens: {self.max_num_batched_tokens} leaves no room for 16 prompt tokens "
                f"and one decode token for each of --max-num-seqs {self.max_num_seqs}"
            )

    @property
    def computed_logprobs(self) -> int:
        """K: number of alternatives that every step computes."""
        return self.max_logprobs if 0 < self.max_logprobs <= MAX_LOGPROBS_LIMIT else DEFAULT_MAX_LOGPROBS

    @property
    def weights_as(self) -> str:
        """Storage of weight matrices, unless they are as in the file, and the dtype of activations."""
        return self.dtype if self.quantization == "auto" else f"{self.stored_quantization}-{self.dtype}"

    @property
    def stored_quantization(self) -> str:
        """`quantization` as `model.weights` names it."""
        if self.quantization in ("auto", "none"):
            return self.quantization
        return "Q8_0" if self.quantization == "int8" else self.quantization.upper()

    @property
    def kv_dtype(self) -> str:
        """Dtype of cached keys and values."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    @property
    def batched_tokens(self) -> int:
        return self.max_num_batched_tokens or 256 + self.max_num_seqs


class EngineKeywords(TypedDict, total=False):
    """Keyword arguments of `LLM`: options of `logprobd serve` that concern the model and the engine."""

    tokenizer: str | PathLike[str] | None
    revision: str | None
    dtype: Literal["auto", "bfloat16", "float32"]
    quantization: Literal[
        "auto", "none", "int8", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "mxfp4"
    ]
    chat_template: str | None
    generation_config: str
    override_generation_config: str | dict[str, Any]
    seed: int | None
    max_logprobs: int
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int | None
    kv_cache_dtype: Literal["auto", "bfloat16", "float32"]
    kv_cache_memory: int | float | str | None
    enable_prefix_caching: bool
    grammar_fast_forward: bool
    tensor_parallel_size: int
    compilation_cache_dir: str | PathLike[str]
