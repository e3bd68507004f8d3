"""assemble: a ServeConfig becomes a running engine and its app, for the server and for a replica of Ray Serve."""

from dataclasses import dataclass

from starlette.applications import Starlette

from model.kv_cache import PAGE_SIZE
from serve.api.access_log import AccessLog
from serve.api.app import create_app
from serve.api.context import ServedModel
from serve.api.metrics import Metrics
from serve.api.middleware import Readiness
from serve.config.config import ServeConfig
from serve.engine.engine import Engine
from serve.server.console import Reporter
from serve.server.startup import load


@dataclass(frozen=True, slots=True)
class Served:
    """A running engine and its app."""

    names: tuple[str, ...]  # model ids in the API
    chats: bool  # True if the model has a chat template
    engine: Engine
    app: Starlette
    readiness: Readiness
    metrics: Metrics


def assemble(config: ServeConfig, reporter: Reporter) -> Served:
    """Load the model, start its engine and build the app.

    Raises:
        STARTUP_ERRORS: the model cannot be served.
    """
    loaded = load(config, reporter)
    names = config.served_model_name or (loaded.name,)
    metrics = Metrics(names[0], max_model_len=loaded.limits.max_model_len, vllm_names=config.vllm_metrics)
    engine = loaded.start_engine(metrics)
    cache = {
        "block_size": str(PAGE_SIZE),
        "num_gpu_blocks": str(loaded.runner.pages - 1),
        "cache_dtype": loaded.config.dtype,
        "enable_prefix_caching": str(config.enable_prefix_caching),
    }
    metrics.watch(lambda: engine.gauges, cache)
    readiness = Readiness()
    app = create_app(
        engine,
        loaded.tokenizer,
        ServedModel(names, loaded.fingerprint, loaded.chat_template, loaded.defaults),
        config,
        metrics,
        readiness=readiness,
        on_answer=None if config.disable_uvicorn_access_log else AccessLog(),
    )
    chats = loaded.chat_template is not None or loaded.tokenizer.chat_template is not None
    return Served(names, chats, engine, app, readiness, metrics)
