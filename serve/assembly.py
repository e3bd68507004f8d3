"""From a ServeConfig to an app that answers: what every way to serve has in common."""

from pathlib import Path

from rich.console import Console
from starlette.applications import Starlette

from model.config import ConfigError
from model.weights.errors import ModelLoadError
from serve.app import AppConfig, create_app
from serve.config import ServeConfig
from serve.openai.defaults import DefaultsError
from serve.startup import Served, StartupError, start
from serve.text.tokenizer import TokenizerError

# What is wrong with a model or the options, in words for whoever started us.
STARTUP_ERRORS = (ModelLoadError, ConfigError, TokenizerError, DefaultsError, StartupError)


def assemble(config: ServeConfig, console: Console) -> tuple[Served, Starlette]:
    """Starts the engine and makes the app around it.

    Raises:
        STARTUP_ERRORS: the model cannot be served.
    """
    chat_template = _chat_template(config.chat_template)
    served = start(config, console, chat_template)
    app_config = AppConfig(
        served_model_names=config.served_model_name or (served.name,),
        api_keys=config.api_key,
        system_fingerprint=served.fingerprint,
        chat_template=chat_template,
        trust_request_chat_template=config.trust_request_chat_template,
        response_role=config.response_role,
        defaults=served.defaults,
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
    return served, create_app(served.engine, served.tokenizer, app_config, served.metrics)


def _chat_template(option: str | None) -> str | None:
    """The template that --chat-template names or is."""
    if option is None or "{" in option:
        return option
    try:
        return Path(option).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--chat-template {option}: cannot be read as a text file") from error
