"""`python -m serve [MODEL] [flags]`: starts the engine and serves HTTP in the foreground."""

import logging
import resource
import socket
import ssl
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from serve.config.config import ServeConfig
from serve.server.assembly import Served, assemble
from serve.server.http_protocol import HttpConfig
from serve.server.lifecycle import HttpServer, end_early, run
from serve.server.report import Reporter, start_reporting
from serve.server.startup import STARTUP_ERRORS, StartupError
from serve.server.startup_events import Failed, Interrupted, Serving

logger = logging.getLogger(__name__)


def main(config: ServeConfig, make: Callable[[ServeConfig, Reporter], Served] = assemble) -> int:
    """Starts what `make` makes and serves it; returns the exit code.

    0 after SIGTERM or Ctrl-C, 1 where it cannot serve or the engine is lost, 130 for Ctrl-C before it serves.
    """
    reporter = start_reporting(config)
    with ExitStack() as stack:
        try:
            _check_certificate(config)
            # Before minutes of loading: an address in use is better said now.
            listener = stack.enter_context(_bind(config))
            served = make(config, reporter)
        except STARTUP_ERRORS as error:
            reporter.tell(Failed(str(error)))
            return 1
        except KeyboardInterrupt:
            reporter.tell(Interrupted())
            return 130
        stack.callback(served.engine.stop)
        server = _server(served, config)
        end_early(server)
        _raise_file_limit()
        if not config.api_key and not config.is_local:
            logger.warning("everybody who reaches %s can use this server: there is no --api-key", config.host)
        reporter.tell(_serving(config, served, listener))
        run(server, listener)
    return server.exit_code


def _serving(config: ServeConfig, served: Served, listener: socket.socket) -> Serving:
    return Serving(
        models=served.names,
        url=_address(config, listener),
        keyed=bool(config.api_key),
        chats=served.chats,
        documented=not config.disable_fastapi_docs,
    )


def _server(served: Served, config: ServeConfig) -> HttpServer:
    http = HttpConfig(
        served.app,
        client_timeout=config.client_timeout,
        on_refused=served.metrics.on_refused_connection,
        log_config=None,  # what it logs goes the way of all logs
        log_level=config.uvicorn_log_level,
        access_log=False,
        h11_max_incomplete_event_size=config.h11_max_incomplete_event_size,
        root_path=config.root_path,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_ca_certs=config.ssl_ca_certs and str(config.ssl_ca_certs),
        ssl_cert_reqs=ssl.CERT_REQUIRED if config.ssl_ca_certs else ssl.CERT_NONE,
    )
    return HttpServer(
        http,
        served.engine,
        served.readiness,
        drain_seconds=config.shutdown_timeout,
        watchdog_seconds=config.watchdog_timeout,
    )


def _raise_file_limit() -> None:
    """As many connections as the system lets us have: the usual limit is lower, for programs that use select()."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _address(config: ServeConfig, listener: socket.socket) -> str:
    if config.uds is not None:
        return f"unix:{config.uds}"
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'http' if config.ssl_certfile is None else 'https'}://{shown}:{port}"


def _check_certificate(config: ServeConfig) -> None:
    """Raises StartupError for files that uvicorn could not use, which it would say only after all is loaded."""
    if config.ssl_certfile is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # A password could be asked for on a terminal only, and a server may have none.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=lambda: "")
    except OSError as error:  # ssl.SSLError is one
        raise StartupError(f"--ssl-certfile {config.ssl_certfile}: {error.strerror or error}") from error
    try:
        if config.ssl_ca_certs is not None:
            context.load_verify_locations(config.ssl_ca_certs)
    except OSError as error:
        raise StartupError(f"--ssl-ca-certs {config.ssl_ca_certs}: {error.strerror or error}") from error


def _bind(config: ServeConfig) -> socket.socket:
    if config.uds is not None:
        return _bind_file(config.uds)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(2048)  # now: the port is ours, and early clients wait instead of being refused
    except OSError as error:
        listener.close()
        raise StartupError(f"cannot listen on {config.host} port {config.port}: {error.strerror}") from error
    return listener


def _bind_file(path: Path) -> socket.socket:
    """A Unix socket; one that a server has left behind is replaced."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise StartupError(f"--uds {path}: a server listens there")
            path.unlink()
        listener.bind(str(path))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise StartupError(f"--uds {path}: {error.strerror or error}") from error
    return listener
