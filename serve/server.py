"""`python -m serve [MODEL] [flags]`: starts the engine and serves HTTP in the foreground."""

import asyncio
import logging
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from rich.console import Console
from starlette.types import ASGIApp

from serve.assembly import assemble
from serve.config import ServeConfig
from serve.flags import parse_args
from serve.startup import STARTUP_ERRORS, StartupError


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 0 after SIGTERM or Ctrl-C, 1 where the model cannot be served."""
    config = parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    console = Console(stderr=True, highlight=False)
    try:
        listener = _bind(config)  # first: an address in use is better said before minutes of loading
        served = assemble(config, console)
    except STARTUP_ERRORS as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    server = _server(served.app, config)
    # Not wrapped: whoever starts us reads the address from this line.
    console.print(f"serving  {', '.join(served.names)} at {_address(config, listener)} (API under /v1)", soft_wrap=True)
    try:
        asyncio.run(server.serve(sockets=[listener]), loop_factory=server.config.get_loop_factory())
    finally:
        served.engine.stop()
    return 0


def _server(app: ASGIApp, config: ServeConfig) -> uvicorn.Server:
    """A server that ends at SIGTERM or SIGINT, from now on, once running requests have finished."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
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
    return f"{'http' if config.ssl_certfile is None else 'https'}://{host}:{port}"


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
