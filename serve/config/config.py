"""ServeConfig: the options of a server, in addition to those of its model and engine."""

import ipaddress
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from serve.config.engine_config import EngineConfig
from serve.config.options import API, NETWORK, PROCESS, SCHEDULING, option, switch
from serve.config.values import Between, OneOf, api_key, parse_bytes, root_path, strings

if TYPE_CHECKING:
    from serve.config.api_keys import ApiKey  # pydantic is not needed to print --help

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
# Formats of serve.tools.formats, which takes time to import.
CALL_PARSERS = (
    *("auto", "functiongemma", "gemma4", "granite", "granite_20b", "harmony", "hermes", "lfm2", "llama3"),
    *("mistral", "mistral_v3", "olmo3", "phi4_mini", "pythonic", "qwen3_coder", "smollm3"),
)
REASONING_PARSERS = ("auto", "none", "gemma4", "harmony", "mistral", "seed_oss", "think")

_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")  # as in a Host header


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig(EngineConfig):
    queue_timeout: float = option(
        SCHEDULING,
        "maximum time in the queue, else 503; default: no limit",
        Between(0.001, 86400.0, "SECONDS"),
        default=math.inf,
    )
    request_timeout: float = option(
        SCHEDULING,
        "maximum duration of a request, else 504; its `timeout` field can lower it; default: no limit",
        Between(0.001, 86400.0, "SECONDS"),
        default=math.inf,
    )
    prefix_cache_per_key: bool = switch(SCHEDULING, "share no cached prompts between API keys")
    watchdog_timeout: int = option(
        SCHEDULING, "exit if a step takes longer than this; 0: never", Between(0, 86400, "SECONDS"), default=300
    )

    host: str = option(NETWORK, "address to listen on", default="127.0.0.1", metavar="ADDRESS")
    port: int = option(NETWORK, "port to listen on; 0: any free port", Between(0, 65535), default=8000)
    uds: Path | None = option(NETWORK, "Unix socket to listen on, instead of host and port", Path, metavar="PATH")
    ssl_keyfile: Path | None = option(NETWORK, "private key; serves HTTPS", Path)
    ssl_certfile: Path | None = option(NETWORK, "certificate for --ssl-keyfile", Path)
    ssl_ca_certs: Path | None = option(
        NETWORK, "CA certificates; clients must present a certificate signed by one of them", Path
    )
    root_path: str = option(
        NETWORK, "URL path under which a proxy exposes this server", root_path, default="", metavar="PATH"
    )
    api_key: "tuple[str | ApiKey, ...]" = option(
        NETWORK,
        "key that clients must send; repeatable; default: $LOGPROBD_API_KEY and $VLLM_API_KEY",
        api_key,
        default=(),
        repeatable=True,
        metavar="KEY",
    )
    flag_keys: tuple[str, ...] = ()  # those of `api_key` that stay when --api-key-file is read again
    api_key_file: Path | None = option(
        NETWORK,
        "file of API keys, one per line or with names, roles and limits; unlike --api-key, other users of the machine "
        "cannot see them",
        Path,
    )
    allowed_hosts: tuple[str, ...] | None = option(
        NETWORK,
        "JSON list of accepted Host headers; default: any; on 127.0.0.1 without API keys: this machine's names",
        strings,
    )
    allowed_origins: tuple[str, ...] = option(
        NETWORK, "CORS: origins of pages that may call the API, as a JSON list", strings, default=()
    )
    allowed_methods: tuple[str, ...] = option(NETWORK, "CORS: allowed methods, as a JSON list", strings, default=("*",))
    allowed_headers: tuple[str, ...] = option(NETWORK, "CORS: allowed headers, as a JSON list", strings, default=("*",))
    allow_credentials: bool = switch(NETWORK, "CORS: allow credentials")
    client_timeout: float = option(
        NETWORK,
        "maximum time for a client to send a request, and to read data that is ready",
        Between(1, 86400, "SECONDS"),
        default=60,
    )
    timeout_keep_alive: int = option(
        NETWORK, "time until an idle connection is closed", Between(1, 86400, "SECONDS"), default=75
    )

    served_model_name: tuple[str, ...] = option(
        API, "model name in the API; repeatable", default=(), repeatable=True, metavar="NAME"
    )
    logprobs_mode: LogprobsMode = option(
        API,
        "log-probs of generated tokens: raw, or after penalties, masks, temperature and filters",
        OneOf(("raw_logprobs", "processed_logprobs")),
        default="raw_logprobs",
    )
    return_tokens_as_token_ids: bool = switch(API, "write tokens as token_id:123")
    trust_request_chat_template: bool = switch(
        API, "accept chat templates in requests; each is rendered in a separate process"
    )
    decision_scoring: Literal["labels", "sequences", "permutations"] = option(
        API,
        "how the options of decisions are read, unless a request says so",
        OneOf(("labels", "sequences", "permutations")),
        default="labels",
    )
    max_body_bytes: int = option(
        API, "maximum size of a request, such as 64MiB, else 413", parse_bytes, default=16 << 20
    )
    h11_max_incomplete_event_size: int = option(
        API,
        "maximum size of a request's line and headers, else 431",
        Between(1 << 10, 1 << 24, "BYTES"),
        default=64 << 10,
    )
    max_unread_tokens: int = option(
        API,
        "maximum number of streamed tokens that a client has not read; then the stream is aborted",
        Between(1, 1 << 24),
        default=4096,
    )
    max_unsent_bytes: int | None = option(
        API,
        "maximum memory of answers that are generated and not yet sent, half of it for one API key; default: 1GiB, or "
        "more if an answer of full length needs it",
        parse_bytes,
    )
    response_store: Path | None = option(
        API,
        "SQLite file in which /v1/responses stores responses, for `previous_response_id`; default: none are stored",
        Path,
    )
    response_store_bytes: int = option(
        API,
        "maximum size of all stored responses, such as 4GiB; the oldest are deleted",
        parse_bytes,
        default=1 << 30,
    )
    response_store_ttl: int = option(
        API, "time until a stored response is deleted", Between(1, 1 << 31, "SECONDS"), default=30 * 86400
    )
    tool_call_parser: str = option(
        API,
        "format of the model's tool calls, such as hermes or llama3; default: found in its chat template",
        OneOf(CALL_PARSERS),
        default="auto",
        metavar="NAME",
    )
    reasoning_parser: str = option(
        API,
        "marks of the model's reasoning, such as think, or none; default: found in its chat template",
        OneOf(REASONING_PARSERS),
        default="auto",
        metavar="NAME",
    )
    response_role: str = option(API, "role of generated messages", default="assistant", metavar="NAME")
    enable_force_include_usage: bool = switch(API, "send the token usage with every chunk of a stream")
    disable_fastapi_docs: bool = switch(API, "do not serve /docs and /openapi.json")

    vllm_metrics: bool = switch(PROCESS, "export metrics under vLLM's names, too")
    disable_uvicorn_access_log: bool = switch(PROCESS, "disable the access log")
    enable_log_requests: bool = switch(PROCESS, "log the id, prompt and fields of requests")
    max_log_len: int | None = option(
        PROCESS, "maximum number of characters of a logged prompt; default: no limit", Between(0, 1 << 30)
    )
    otlp_traces_endpoint: str | None = option(
        PROCESS, "OTLP/HTTP URL for traces, such as http://localhost:4318/v1/traces", metavar="URL"
    )
    uvicorn_log_level: str = option(
        PROCESS,
        "log level of the HTTP server",
        OneOf(("critical", "error", "warning", "info", "debug", "trace")),
        default="warning",
    )
    shutdown_timeout: int = option(
        PROCESS, "maximum time for running requests to finish at shutdown", Between(0, 3600, "SECONDS"), default=30
    )

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)  # super() does not work in dataclasses with slots before Python 3.14
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("argument --ssl-keyfile: requires --ssl-certfile, and vice versa")
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise ValueError("argument --ssl-ca-certs: requires --ssl-certfile")
        if self.prefix_cache_per_key and not self.api_key:
            raise ValueError("argument --prefix-cache-per-key: requires an API key")

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
        """Accepted values of the Host header; empty: any.

        On a loopback address without API keys, only names of this machine are accepted by default: otherwise a web page
        could reach the server through a DNS name that it resolves to 127.0.0.1.
        """
        if self.allowed_hosts is not None:
            return () if "*" in self.allowed_hosts else self.allowed_hosts
        restricted = self.is_local and self.uds is None and not self.api_key
        return (*_LOOPBACK_HOSTS, self.host) if restricted else ()
