"""`python -m serve.ray.app [MODEL] [flags]`: replicas of the server behind one address, on Ray Serve.

`build` makes the same application from a config file of Ray Serve, which KubeRay's RayService holds, too.
"""

import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import ray
    from ray import serve
except ModuleNotFoundError:
    sys.exit("error: Ray is not installed: run `make ray`, or `pip install 'ray[serve]'`")

from serve.config.config import ServeConfig
from serve.ray.front import Front
from serve.ray.options import RayOptions, options_of, parse_ray_args
from serve.ray.replica import Replica
from serve.ray.router import PrefixRouter
from serve.server.console import start_reporting
from serve.server.startup_events import Serving, failed, interrupted

_NAME = "logprobd"  # of the application
_ROOT = Path(__file__).resolve().parents[2]
_SPARE_REQUESTS = 64  # beyond those that an engine takes, so that the engine itself refuses, with its 429
_REMEMBERED_BLOCKS = 1 << 18  # 64 MB of prompts
# Seconds: between looks whether a replica lives, and whether one that shall end is idle.
_HEALTH_PERIOD, _IDLE_PERIOD = 2.0, 0.1
_LOGS = {"log_level": "WARNING", "enable_access_log": False}


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application, from a mapping of flags to values: those of the command line, without the hyphens.

    Raises:
        ValueError: a mistake in `args`; the message names the flag.
    """
    return application(*options_of(args))


def application(options: RayOptions, config: ServeConfig) -> serve.Application:
    """Fronts that relay to replicas."""
    common: dict[str, Any] = {
        "health_check_period_s": _HEALTH_PERIOD,
        "graceful_shutdown_timeout_s": config.shutdown_timeout,
        "graceful_shutdown_wait_loop_s": _IDLE_PERIOD,
        "logging_config": _LOGS,
    }
    most = config.max_num_queued_reqs + _SPARE_REQUESTS
    router = {"max_blocks": _REMEMBERED_BLOCKS, "margin": max(1, config.max_num_seqs // 2)}
    scaling = options.autoscaling
    replica = serve.deployment(
        Replica,
        name="Replica",
        ray_actor_options=options.resources(config.tensor_parallel_size),
        max_ongoing_requests=most,
        request_router_config={"request_router_class": PrefixRouter, "request_router_kwargs": router},
        **({"num_replicas": options.num_replicas} if scaling is None else {"autoscaling_config": scaling}),
        **common,
    )
    front = serve.deployment(
        serve.ingress()(Front),
        name="Front",
        ray_actor_options={"num_cpus": 0},  # it only passes bytes on
        max_ongoing_requests=most * (options.max_replicas or options.num_replicas),
        **common,
    )
    return front.bind(replica.bind(config), config.api_key, config.max_body_bytes)


def main() -> int:
    """Returns the exit code: 0 after SIGTERM or Ctrl-C, 1 where the model cannot be served."""
    options, config = parse_ray_args()
    reporter = start_reporting(config)
    try:
        port = _free_port(config)
    except OSError as error:
        reporter.report(failed(f"cannot listen on {config.host} port {config.port}: {error.strerror}"))
        return 1
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        _start_ray(options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        reporter.report(failed(f"--address {options.address}: {said}"))
        return 1
    try:
        if serve.status().proxies:
            reporter.report(
                failed("Ray Serve runs there already; give it deploy/rayservice.yaml's serveConfigV2 instead")
            )
            return 1
        _start_serve(config, port)
        try:
            serve.run(application(options, config), name=_NAME, route_prefix="/")
        except RuntimeError as error:
            reporter.report(failed(_why(error)))
            return 1
        except KeyboardInterrupt:
            reporter.report(interrupted())
            return 130
        end = _signalled()
        scheme = "http" if config.ssl_certfile is None else "https"
        reporter.report(
            Serving(
                models=config.served_model_name or (config.model or "the default model",),
                url=f"{scheme}://{config.host}:{port}",
                keyed=bool(config.api_key),
                chats=True,  # that the replicas know, and not we
                documented=not config.disable_fastapi_docs,
            )
        )
        end.wait()
        serve.delete(_NAME)  # returns when running requests have ended
        return 0
    finally:
        if options.address is None:
            serve.shutdown()
        ray.shutdown()


def _start_ray(options: RayOptions) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if options.address is not None:
        ray.init(address=options.address, logging_level=logging.WARNING)
        return
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{_ROOT}:{path}" if path else str(_ROOT)  # Ray's workers import us
    # "local": whatever other Ray there is on this machine stays as it is.
    ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)


def _start_serve(config: ServeConfig, port: int) -> None:
    serve.start(
        http_options={
            "host": config.host,
            "port": port,
            "root_path": config.root_path,
            "ssl_keyfile": config.ssl_keyfile and str(config.ssl_keyfile),
            "ssl_certfile": config.ssl_certfile and str(config.ssl_certfile),
        },
        logging_config=_LOGS,
    )


def _signalled() -> threading.Event:
    """Set at SIGTERM or SIGINT."""
    event = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: event.set())
    return event


def _why(error: RuntimeError) -> str:
    """What a replica said when it could not start: the last line of its traceback; Ray's words where there is none."""
    application = serve.status().applications.get(_NAME)
    replica = application and application.deployments.get("Replica")
    lines = re.findall(r"^[\w.]+Error: (.+)$", replica.message, re.MULTILINE) if replica else []
    return lines[-1] if lines else str(error)


def _free_port(config: ServeConfig) -> int:
    """The port to listen on.

    Raises:
        OSError: it is taken. Said now: Ray's proxy would be long in coming, and not say it to us.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((config.host, config.port))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(main())
