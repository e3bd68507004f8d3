"""`logprobd serve`: builds the engine and its app, and serves HTTP in the foreground."""

import errno
import faulthandler
import logging
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from model.kv_cache import PAGE_SIZE
from serve.api.access_log import log_answer
from serve.api.app import create_app
from serve.api.context import ServedModel
from serve.api.keys import ApiKeys
from serve.api.metrics import Metrics
from serve.api.middleware import Readiness
from serve.config.config import ServeConfig
from serve.server.console import Reporter, start_reporting
from serve.server.lifecycle import HttpServer, Served, run
from serve.server.loading import LoadingServer
from serve.server.log_stream import open_log_stream
from serve.server.model_files import STARTUP_ERRORS, StartupError
from serve.server.self_test import run_self_test
from serve.server.signals import Reload, load_certificates, log_stacks
from serve.server.startup import load
from serve.server.startup_events import server_started
from serve.server.traces import open_tracer

logger = logging.getLogger(__name__)

_BACKLOG = 2048  # connections that wait to be accepted


def assemble(config: ServeConfig, reporter: Reporter) -> Served:
    """Load the model, start its engine and build the app.

    Raises:
        STARTUP_ERRORS: the model cannot be served.
    """
    tracer = open_tracer(config)
    loaded = load(config, reporter)
    run_self_test(loaded)
    names = config.served_model_name or (loaded.name,)
    metrics = Metrics(names[0], max_model_len=loaded.limits.max_model_len, vllm_names=config.vllm_metrics)
    engine = loaded.start_engine(metrics)
    cache = {
        "block_size": str(PAGE_SIZE),
        "num_gpu_blocks": str(loaded.runner.pages - 1),
        "cache_dtype": loaded.config.kv_dtype,
        "enable_prefix_caching": str(config.enable_prefix_caching),
    }
    metrics.watch(lambda: engine.gauges, cache)
    readiness, keys = Readiness(), ApiKeys(config.api_key)
    facts = (loaded.fingerprint, loaded.defaults, loaded.decisions, loaded.bits_per_weight)
    model = ServedModel(names, loaded.tokenizer, *facts)
    on_answer = None if config.disable_uvicorn_access_log else log_answer
    try:
        app = create_app(
            engine,
            model,
            config,
            metrics,
            readiness=readiness,
            api_keys=keys,
            on_answer=on_answer,
            tracer=tracer,
        )
    except ValueError as error:
        engine.stop()
        raise StartupError(str(error)) from None
    return Served(names, loaded.tokenizer.chat_template is not None, engine, app, readiness, keys, metrics, tracer)


def main(config: ServeConfig, make: Callable[[ServeConfig, Reporter], Served] = assemble) -> int:
    """Serve what `make` returns, and return the exit code.

    0 after SIGTERM or Ctrl-C, 1 if start-up fails or the engine is lost, 130 for Ctrl-C during start-up.
    """
    faulthandler.enable(2)  # standard error: a fatal signal leaves a traceback
    reporter = start_reporting(config, open_log_stream(sys.stderr))
    reload = Reload(config)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, log_stacks)
    if reload.has_files:
        signal.signal(signal.SIGHUP, reload.request)
    with ExitStack() as stack:
        try:
            load_certificates(config, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            listener = stack.enter_context(listen(config))
            with LoadingServer(listener, config, reporter):
                served = make(config, reporter)
        except (*STARTUP_ERRORS, KeyboardInterrupt) as error:
            return reporter.fail(error)
        stack.callback(served.engine.stop)
        if served.tracer is not None:
            stack.callback(served.tracer.close)
        server = HttpServer(served, config, reload)
        shutdown = [signal.SIGTERM, signal.SIGINT, *([] if reload.has_files else [signal.SIGHUP])]
        for number in shutdown:  # before uvicorn does, and after it has restored these handlers
            signal.signal(number, server.handle_exit)
        _raise_file_limit()
        if not config.api_key and not config.is_local:
            logger.warning("%s is reachable from other machines and no --api-key is set", config.host)
        reporter.report(server_started(config, served.names, url_of(config, listener), chats=served.chats))
        run(server, listener)
    return server.exit_code


def url_of(config: ServeConfig, listener: socket.socket) -> str:
    """The URL of a listening socket, or "unix:" and its path."""
    if config.uds is not None:
        return f"unix:{config.uds}"
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"{'http' if config.ssl_certfile is None else 'https'}://{host}:{port}"


def listen(config: ServeConfig) -> socket.socket:
    """A listening socket. A Unix socket replaces the stale file of a server that has ended.

    Raises:
        StartupError: the address is invalid or in use, which is reported before the model is loaded.
    """
    ip_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(ip_family if config.uds is None else socket.AF_UNIX)
    try:
        if config.uds is None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((config.host, config.port))
        else:
            _remove_stale(config.uds)
            listener.bind(str(config.uds))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        address = f"cannot listen on {config.host} port {config.port}" if config.uds is None else f"--uds {config.uds}"
        raise StartupError(f"{address}: {error.strerror or error}") from error
    return listener


def _remove_stale(path: Path) -> None:
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise OSError(errno.EADDRINUSE, "another server listens on it")
        path.unlink()


def _raise_file_limit() -> None:
    """Allow as many connections as the system permits. The default limit is low, for programs that use select()."""
    _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))
