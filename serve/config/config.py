"""What the command line says: EngineConfig of a model and its engine, ServeConfig of a server around it."""

import argparse
import ipaddress
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serve.config.api_keys import api_key
from serve.config.options import between, option, strings
from serve.config.sizes import MemoryAmount, parse_memory

DEFAULT_MAX_LOGPROBS = 20

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]

_MAX_LOGPROBS_LIMIT = 1024  # a program with a larger top-k would be slow for every request

# Headings of --help. What a command has of its own comes before these.
_MODEL = "model"
_NUMBERS = "numbers"
_ENGINE = "batches and memory"
_PLACE = "address and access"
_API = "what requests may say, and get"
_PROCESS = "logs and process"
GROUPS = (_MODEL, _NUMBERS, _ENGINE, _PLACE, _API, _PROCESS)

_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")  # as in a Host header


def _max_logprobs(text: str) -> int:
    return -1 if text == "-1" else between(1, _MAX_LOGPROBS_LIMIT)(text)


def _memory(text: str) -> MemoryAmount:
    try:
        return parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _bytes(text: str) -> int:
    amount = _memory(text).size
    if isinstance(amount, float):
        raise argparse.ArgumentTypeError(f"{text!r} is a share; give bytes, such as 64MiB")
    return amount


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Which model, and how it runs."""

    model: str | None = option(
        _MODEL, "hub id, local directory or .gguf file; nothing: SmolLM2-135M-Instruct", metavar="MODEL"
    )
    tokenizer: Path | None = option(_MODEL, "local directory or .gguf file; default: the model's own", Path)
    revision: str | None = option(_MODEL, "branch, tag or commit of a hub id", metavar="NAME")
    dtype: str = option(
        _MODEL,
        "of weights and cache; auto: float32 for a model that is stored so, else bfloat16",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
    )
    quantization: str | None = option(
        _MODEL,
        "of matrices: int8 with a scale for 32 weights, GGUF's Q8_0 taken as it is; default: none",
        choices=("int8",),
    )
    chat_template: str | None = option(
        _MODEL, "a Jinja file, or the template itself, instead of the model's", metavar="FILE"
    )
    # Said by those whose requests choose tokens, and by those to whom requests come from elsewhere.
    generation_config: str = "vllm"
    override_generation_config: str = "{}"
    seed: int | None = None
    max_num_queued_reqs: int = 1024
    max_num_queued_tokens: int | None = None
    # A model that has none is then refused.
    needs_chat_template: bool = False

    max_logprobs: int = option(
        _NUMBERS,
        "most alternatives per token; -1: 20, but prompt_logprobs may be any number, or -1 for all tokens",
        _max_logprobs,
        default=DEFAULT_MAX_LOGPROBS,
        metavar="N",
    )

    max_model_len: int | None = option(
        _ENGINE, "tokens of prompt and output; default: the model's", between(2, 1 << 24)
    )
    max_num_seqs: int = option(_ENGINE, "requests that run at once", between(1, 1024), default=16)
    max_num_batched_tokens: int | None = option(
        _ENGINE,
        "prompt and decode tokens of one step; default: 256 and one for each of --max-num-seqs",
        between(17, 1 << 20),
    )
    kv_cache_memory: MemoryAmount | None = option(
        _ENGINE,
        "of the page cache: bytes, such as 800M or 2GiB, or a share of what the weights leave free, such as 0.5; "
        "default: 1GiB, or what one request of full length needs",
        _memory,
        metavar="BYTES",
    )
    enable_prefix_caching: bool = option(_ENGINE, "keep full pages for prompts that begin alike", None, default=True)
    tensor_parallel_size: int = option(_ENGINE, "devices over which the model is cut", between(1, 1024), default=1)
    compilation_cache_dir: Path = option(
        _PROCESS, "kept executables", Path, default=Path("~/.cache/logprobd/xla"), metavar="DIR"
    )
    log_format: str = option(
        _PROCESS,
        "of start-up and logs on stderr; auto: a screen on a terminal, else plain lines",
        choices=("auto", "plain", "json"),
        default="auto",
    )
    log_level: str = option(
        _PROCESS,
        "of our own logs: debug (which tells of each program, too), info, warning, error",
        choices=("debug", "info", "warning", "error"),
        default="info",
        metavar="LEVEL",
    )

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


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig(EngineConfig):
    """How tokens are chosen where a request does not say."""

    generation_config: str = option(
        _MODEL, "defaults of requests: auto (the model's file), vllm (none), a path", default="auto", metavar="PATH"
    )
    override_generation_config: str = option(
        _MODEL, "JSON object that stands over that file", default="{}", metavar="JSON"
    )
    seed: int | None = option(
        _NUMBERS, "of what requests without a seed draw; default: another each start", between(0, (1 << 63) - 1)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig(SamplingConfig):
    """Options of one server."""

    model: str | None = option(
        _MODEL,
        "hub id, local directory or .gguf file; nothing: SmolLM2-135M-Instruct",
        positional=True,
        metavar="MODEL",
    )

    max_num_queued_reqs: int = option(_ENGINE, "unfinished requests before 429", between(1, 1 << 20), default=1024)
    max_num_queued_tokens: int | None = option(
        _ENGINE, "their prompt tokens before 429; default: no limit", between(1, 1 << 40)
    )
    queue_timeout: float = option(
        _ENGINE,
        "seconds that a request may wait before 503; default: no limit",
        between(0.001, 86400.0),
        default=math.inf,
        metavar="SECONDS",
    )
    request_timeout: float = option(
        _ENGINE,
        "seconds that a request may take before 504; its own `timeout` may say less; default: no limit",
        between(0.001, 86400.0),
        default=math.inf,
        metavar="SECONDS",
    )
    prefix_cache_per_key: bool = option(
        _ENGINE, "requests of different API keys share no cached prompts", None, default=False
    )
    watchdog_timeout: int = option(
        _ENGINE,
        "seconds after which a step that does not end ends the process; 0: never",
        between(0, 86400),
        default=300,
        metavar="SECONDS",
    )

    host: str = option(_PLACE, "address to listen on", default="127.0.0.1", metavar="ADDRESS")
    port: int = option(_PLACE, "port to listen on; 0 picks a free one", between(0, 65535), default=8000, metavar="N")
    uds: Path | None = option(_PLACE, "listen on this Unix socket instead of host and port", Path, metavar="PATH")
    ssl_keyfile: Path | None = option(_PLACE, "serve HTTPS with this key", Path, metavar="FILE")
    ssl_certfile: Path | None = option(_PLACE, "and this certificate", Path, metavar="FILE")
    ssl_ca_certs: Path | None = option(
        _PLACE, "take only clients whose certificate is signed by one of these", Path, metavar="FILE"
    )
    root_path: str = option(_PLACE, "path under which a proxy serves this", default="", metavar="PATH")
    api_key: tuple[str, ...] = option(
        _PLACE,
        "a key that clients must send; may be given again; default: $LOGPROBD_API_KEY and $VLLM_API_KEY",
        api_key,
        default=(),
        many=True,
        metavar="KEY",
    )
    api_key_file: Path | None = option(
        _PLACE, "more keys, one a line: what a command line says, others on the machine can see", Path, metavar="FILE"
    )
    allowed_hosts: tuple[str, ...] | None = option(
        _PLACE,
        "names that the Host header may have, as a JSON list; default: any, but where the host is 127.0.0.1 and there "
        "is no key those of this machine",
        strings,
        metavar="JSON",
    )
    allowed_origins: tuple[str, ...] = option(
        _PLACE,
        "of pages that may ask (CORS), as a JSON list; default: none but our own",
        strings,
        default=(),
        metavar="JSON",
    )
    allowed_methods: tuple[str, ...] = option(
        _PLACE, "for CORS, as a JSON list", strings, default=("*",), metavar="JSON"
    )
    allowed_headers: tuple[str, ...] = option(
        _PLACE, "for CORS, as a JSON list", strings, default=("*",), metavar="JSON"
    )
    allow_credentials: bool = option(_PLACE, "for CORS", None, default=False)

    served_model_name: tuple[str, ...] = option(
        _API, "name in the API; may be given again", default=(), many=True, metavar="NAME"
    )
    logprobs_mode: LogprobsMode = option(
        _API,
        "numbers of generated tokens: raw_logprobs; processed_logprobs: after penalties, masks, temperature, filters",
        choices=("raw_logprobs", "processed_logprobs"),
        default="raw_logprobs",
        metavar="MODE",
    )
    return_tokens_as_token_ids: bool = option(_API, "write tokens as token_id:123", None, default=False)
    trust_request_chat_template: bool = option(
        _API, "take templates from requests, and render each in a process of its own", None, default=False
    )
    max_body_bytes: int = option(
        _API, "of a request, such as 64MiB, before 413", _bytes, default=16 << 20, metavar="BYTES"
    )
    h11_max_incomplete_event_size: int = option(
        _API,
        "bytes of a request's line and headers before 431",
        between(1 << 10, 1 << 24),
        default=64 << 10,
        metavar="BYTES",
    )
    client_timeout: int = option(
        _API,
        "seconds that a client may take to send a request, and to read what waits for it",
        between(1, 86400),
        default=60,
        metavar="SECONDS",
    )
    timeout_keep_alive: int = option(
        _API, "seconds that an idle connection stays open", between(1, 86400), default=75, metavar="SECONDS"
    )
    max_unread_tokens: int = option(
        _API, "tokens of a stream that may wait for its reader before it is cut", between(1, 1 << 24), default=4096
    )
    response_role: str = option(_API, "role of replies", default="assistant", metavar="NAME")
    enable_force_include_usage: bool = option(_API, "end every stream with its usage", None, default=False)
    disable_fastapi_docs: bool = option(_API, "no /docs and no /openapi.json", None, default=False)

    vllm_metrics: bool = option(_PROCESS, "every number of /metrics under vLLM's name, too", None, default=False)
    disable_uvicorn_access_log: bool = option(_PROCESS, "no line for each answer", None, default=False)
    enable_log_requests: bool = option(_PROCESS, "log each request: its id, prompt and fields", None, default=False)
    max_log_len: int | None = option(_PROCESS, "characters of a prompt in that log; default: all", between(0, 1 << 30))
    uvicorn_log_level: str = option(
        _PROCESS,
        "of the HTTP server: critical, error, warning, info, debug, trace",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
        default="warning",
        metavar="LEVEL",
    )
    shutdown_timeout: int = option(
        _PROCESS, "seconds that running requests get at the end", between(0, 3600), default=30, metavar="SECONDS"
    )

    @property
    def is_local(self) -> bool:
        """True if only clients on this machine can connect."""
        if self.uds is not None:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    @property
    def accepted_hosts(self) -> tuple[str, ...]:
        """Values of the Host header that are accepted; empty: any.

        On a loopback address without API keys, only names of this machine are accepted by default: otherwise a web page
        could reach the server through a DNS name that it resolves to 127.0.0.1.
        """
        if self.allowed_hosts is not None:
            return () if "*" in self.allowed_hosts else self.allowed_hosts
        restrict = self.is_local and self.uds is None and not self.api_key
        return (*_LOOPBACK_HOSTS, self.host) if restrict else ()
