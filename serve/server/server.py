"""`logprobd serve`: starts the engine and serves HTTP in the foreground."""

import logging
import resource
import socket
import ssl
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from serve.config.config import ServeConfig
from serve.server.assembly import Served, assemble
from serve.server.console import Reporter, start_reporting
from serve.server.lifecycle import HttpServer, install_signal_handlers, run
from serve.server.loading import LoadingServer
from serve.server.model_files import STARTUP_ERRORS, StartupError
from serve.server.startup_events import Serving, failed, interrupted

logger = logging.getLogger(__name__)

_BACKLOG = 2048  # connections that wait to be accepted


def main(config: ServeConfig, make: Callable[[ServeConfig, Reporter], Served] = assemble) -> int:
    """Serve what `make` returns, and return the exit code.

    0 after SIGTERM or Ctrl-C, 1 if start-up fails or the engine is lost, 130 for Ctrl-C during start-up.
    """
    reporter = start_reporting(config)
    with ExitStack() as stack:
        try:
            _check_certificate(config)
            listener = stack.enter_context(_bind(config))
            with LoadingServer(listener, config, reporter):
                served = make(config, reporter)
        except STARTUP_ERRORS as error:
            reporter.report(failed(str(error)))
            return 1
        except KeyboardInterrupt:
            reporter.report(interrupted())
            return 130
        stack.callback(served.engine.stop)
        server = HttpServer(served, config)
        install_signal_handlers(server)
        _raise_file_limit()
        if not config.api_key and not config.is_local:
            logger.warning("%s is reachable from other machines and no --api-key is set", config.host)
        reporter.report(_serving(config, served, listener))
        run(server, listener)
    return server.exit_code


def _serving(config: ServeConfig, served: Served, listener: socket.socket) -> Serving:
    return Serving(
        models=served.names,
        url=_url(config, listener),
        keyed=bool(config.api_key),
        chats=served.chats,
        documented=not config.disable_fastapi_docs,
    )


def _raise_file_limit() -> None:
    """Allow as many connections as the system permits. The default limit is low, for programs that use select()."""
    _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))


def _url(config: ServeConfig, listener: socket.socket) -> str:
    if config.uds is not None:
        return f"unix:{config.uds}"
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"{'http' if config.ssl_certfile is None else 'https'}://{host}:{port}"


def _check_certificate(config: ServeConfig) -> None:
    """Raises StartupError for files that cannot be used for TLS."""
    if config.ssl_certfile is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # An empty password fails for an encrypted key; without one, OpenSSL would prompt on the terminal.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=lambda: "")
    except OSError as error:  # includes ssl.SSLError
        raise StartupError(f"--ssl-certfile {config.ssl_certfile}: {error.strerror or error}") from error
    try:
        if config.ssl_ca_certs is not None:
            context.load_verify_locations(config.ssl_ca_certs)
    except OSError as error:
        raise StartupError(f"--ssl-ca-certs {config.ssl_ca_certs}: {error.strerror or error}") from error


def _bind(config: ServeConfig) -> socket.socket:
    """The listening socket. An address in use is reported before the model is loaded."""
    if config.uds is not None:
        return _bind_file(config.uds)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise StartupError(f"cannot listen on {config.host} port {config.port}: {error.strerror}") from error
    return listener


def _bind_file(path: Path) -> socket.socket:
    """A listening Unix socket, which replaces the stale file of a server that has ended."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise StartupError(f"--uds {path}: another server listens on it")
            path.unlink()
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise StartupError(f"--uds {path}: {error.strerror or error}") from error
    return listener
