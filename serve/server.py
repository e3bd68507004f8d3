"""`python -m serve [MODEL] [flags]`: starts the engine and serves HTTP in the foreground."""

import asyncio
import signal
import socket
import ssl
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from serve.assembly import Served, assemble
from serve.config import ServeConfig
from serve.flags import parse_args
from serve.report import start_reporting
from serve.report_events import Failed, Interrupted, Serving
from serve.startup import STARTUP_ERRORS, StartupError


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 0 after SIGTERM or Ctrl-C, 1 where it cannot serve, 130 for Ctrl-C before it does."""
    config = parse_args(arguments)
    reporter = start_reporting(config)
    with ExitStack() as stack:
        try:
            _check_certificate(config)
            # Before minutes of loading: an address in use is better said now.
            listener = stack.enter_context(_bind(config))
            served = assemble(config, reporter)
        except STARTUP_ERRORS as error:
            reporter.tell(Failed(str(error)))
            return 1
        except KeyboardInterrupt:
            reporter.tell(Interrupted())
            return 130
        stack.callback(served.engine.stop)
        server = _server(served.app, config)
        reporter.tell(_serving(config, served, listener))
        asyncio.run(server.serve(sockets=[listener]), loop_factory=server.config.get_loop_factory())
    return 0


def _serving(config: ServeConfig, served: Served, listener: socket.socket) -> Serving:
    return Serving(
        models=served.names,
        url=_address(config, listener),
        keyed=bool(config.api_key),
        chats=served.chats,
        documented=not config.disable_fastapi_docs,
    )


def _server(app: ASGIApp, config: ServeConfig) -> uvicorn.Server:
    """A server that ends at SIGTERM or SIGINT, from now on, once running requests have finished."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,  # what it logs goes the way of all logs
            log_level=config.uvicorn_log_level,
            access_log=False,
            timeout_graceful_shutdown=config.shutdown_timeout,
            root_path=config.root_path,
            ssl_keyfile=config.ssl_keyfile,
            ssl_certfile=config.ssl_certfile,
        )
    )

    def end(*_: object) -> None:
        server.should_exit = True

    # uvicorn takes the signals over while it runs. Ours are for one that comes before, and for uvicorn's raising it
    # again afterwards, which would make the exit code that of a killed process.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    return server


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
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise StartupError(f"--ssl-certfile {config.ssl_certfile}: {error.strerror or error}") from error


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
