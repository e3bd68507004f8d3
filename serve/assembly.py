"""From a ServeConfig to an app that answers: what every way to serve has in common."""

from dataclasses import dataclass

from starlette.applications import Starlette

from serve.app import AppConfig, create_app
from serve.config import ServeConfig
from serve.engine.engine import Engine
from serve.metrics import Metrics
from serve.report import Reporter
from serve.startup import load


@dataclass(frozen=True, slots=True)
class Served:
    """A running engine and the app around it."""

    names: tuple[str, ...]  # of the model, in the API
    chats: bool  # whether there is a chat template
    engine: Engine
    app: Starlette


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
    app_config = AppConfig(
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
        allowed_origins=config.allowed_origins,
        allowed_methods=config.allowed_methods,
        allowed_headers=config.allowed_headers,
        allow_credentials=config.allow_credentials,
        logs_requests=config.enable_log_requests,
        max_log_len=config.max_log_len,
        documented=not config.disable_fastapi_docs,
    )
    chats = loaded.chat_template is not None or loaded.tokenizer.chat_template is not None
    return Served(names, chats, engine, create_app(engine, loaded.tokenizer, app_config, metrics))
