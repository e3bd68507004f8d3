"""From a ServeConfig to an app that answers: what every way to serve has in common."""

import ipaddress
import math
from dataclasses import dataclass

from starlette.applications import Starlette

from serve.api.access_log import AccessLog
from serve.api.app import AppConfig, create_app
from serve.api.metrics import Metrics
from serve.api.readiness import Readiness
from serve.config.config import ServeConfig
from serve.engine.engine import Engine
from serve.server.report import Reporter
from serve.server.startup import Loaded, load

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")  # as a Host header has them


@dataclass(frozen=True, slots=True)
class Served:
    """A running engine and the app around it."""

    names: tuple[str, ...]  # of the model, in the API
    chats: bool  # whether there is a chat template
    engine: Engine
    app: Starlette
    readiness: Readiness  # the app's
    metrics: Metrics


def assemble(config: ServeConfig, reporter: Reporter) -> Served:
    """Starts the engine and makes the app around it.

    Raises:
        STARTUP_ERRORS: the model cannot be served.
    """
    loaded = load(config, reporter)
    names = config.served_model_name or (loaded.name,)
    metrics = Metrics(names[0], max_model_len=loaded.limits.max_model_len, vllm_names=config.vllm_metrics)
    engine = loaded.start_engine(metrics)
    metrics.watch(lambda: engine.gauges, loaded.cache_labels())
    readiness = Readiness()
    app = create_app(
        engine,
        loaded.tokenizer,
        app_config(config, names, loaded),
        metrics,
        readiness=readiness,
        on_answer=None if config.disable_uvicorn_access_log else AccessLog(),
    )
    chats = loaded.chat_template is not None or loaded.tokenizer.chat_template is not None
    return Served(names, chats, engine, app, readiness, metrics)


def app_config(config: ServeConfig, names: tuple[str, ...], loaded: Loaded) -> AppConfig:
    """How the API of a model presents itself."""
    return AppConfig(
        served_model_names=names,
        api_keys=config.api_key,
        system_fingerprint=loaded.fingerprint,
        chat_template=loaded.chat_template,
        trust_request_chat_template=config.trust_request_chat_template,
        response_role=config.response_role,
        defaults=loaded.defaults,
        logprobs_mode=config.logprobs_mode,
        return_tokens_as_token_ids=config.return_tokens_as_token_ids,
        force_include_usage=config.enable_force_include_usage,
        allowed_hosts=allowed_hosts(config),
        allowed_origins=config.allowed_origins,
        allowed_methods=config.allowed_methods,
        allowed_headers=config.allowed_headers,
        allow_credentials=config.allow_credentials,
        logs_requests=config.enable_log_requests,
        max_log_len=config.max_log_len,
        documented=not config.disable_fastapi_docs,
        max_body_bytes=config.max_body_bytes,
        client_timeout=config.client_timeout,
        queue_timeout=config.queue_timeout or math.inf,
        request_timeout=config.request_timeout or math.inf,
        max_unread_tokens=config.max_unread_tokens,
        prefix_cache_per_key=config.prefix_cache_per_key,
    )


def allowed_hosts(config: ServeConfig) -> tuple[str, ...]:
    """Where only this machine can ask, and nobody needs a key, a page's name must not be made to mean this machine."""
    if config.allowed_hosts is not None:
        return () if "*" in config.allowed_hosts else config.allowed_hosts
    loops = config.uds is None and is_loopback(config.host)
    return (*_LOOPBACK, config.host) if loops and not config.api_key else ()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
