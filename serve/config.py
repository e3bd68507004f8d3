"""ServeConfig: what the command line says."""

from dataclasses import dataclass
from pathlib import Path

from serve.memory import MemoryAmount
from serve.openai.schema import LogprobsMode

DEFAULT_MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Options of one server."""

    model: str | None  # hub id, directory or .gguf file; None is the default model
    tokenizer: Path | None  # directory or .gguf file; None: the model's own
    host: str
    port: int
    uds: Path | None  # a Unix socket instead of host and port
    ssl_keyfile: Path | None
    ssl_certfile: Path | None
    root_path: str  # under which a proxy serves this
    allowed_origins: tuple[str, ...]
    allowed_methods: tuple[str, ...]
    allowed_headers: tuple[str, ...]
    allow_credentials: bool
    api_key: tuple[str, ...]
    served_model_name: tuple[str, ...]  # empty: the model as named
    dtype: str  # "bfloat16", "float32", or "auto" until the model is known
    quantization: str | None  # "int8"
    revision: str | None
    max_model_len: int | None  # None: the model's own
    tensor_parallel_size: int  # devices over which the model is cut
    max_num_seqs: int
    max_num_batched_tokens: int | None  # None: 256 and a row for each of max_num_seqs
    kv_cache_memory: MemoryAmount | None  # None: 1 GiB, or one request of full length
    enable_prefix_caching: bool
    max_logprobs: int  # -1: prompts may be scored on the whole vocabulary
    max_num_queued_reqs: int
    max_num_queued_tokens: int | None  # prompt tokens of unfinished requests; None: no limit
    seed: int | None  # of requests without one; None draws anew at every start
    logprobs_mode: LogprobsMode
    return_tokens_as_token_ids: bool
    generation_config: str  # "auto", "vllm", a folder or a file
    override_generation_config: str  # a JSON object
    chat_template: str | None  # a file, or the template itself
    trust_request_chat_template: bool
    response_role: str
    enable_force_include_usage: bool
    disable_fastapi_docs: bool
    vllm_metrics: bool
    enable_log_requests: bool
    max_log_len: int | None  # characters of a prompt in the log
    uvicorn_log_level: str
    compilation_cache_dir: Path
    shutdown_timeout: int  # seconds

    @property
    def computed_logprobs(self) -> int:
        """K: alternatives that every step computes."""
        return DEFAULT_MAX_LOGPROBS if self.max_logprobs == -1 else self.max_logprobs

    @property
    def weights_as(self) -> str:
        """What the numbers of a matrix are: the quantization, or else the dtype."""
        return self.quantization or self.dtype

    @property
    def batched_tokens(self) -> int:
        """Prompt and decode tokens of one step at most."""
        return self.max_num_batched_tokens or 256 + self.max_num_seqs
