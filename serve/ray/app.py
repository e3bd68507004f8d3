"""`python -m serve.ray.app [MODEL] [flags]`: replicas of the server behind one address, on Ray Serve.

`build` makes the same application from a config file of Ray Serve, such as that of KubeRay's RayService.
"""

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import ray
    from ray import serve
    from ray._private import ray_constants
except ModuleNotFoundError:
    sys.exit("error: Ray is not installed: run `make ray`, or `pip install 'logprobd[ray]'`")

from serve.config.values import error_reason
from serve.ray.flow_control import PROXY_CALLBACK
from serve.ray.front import Front, PrefixRouter
from serve.ray.options import RayConfig, ray_flags
from serve.ray.replica import Replica
from serve.server.console import start_reporting
from serve.server.model_files import DEFAULT_MODEL, StartupError, api_name
from serve.server.server import listen, url_of
from serve.server.startup_events import server_started

_NAME = "logprobd"  # of the application
_ROOT = Path(__file__).resolve().parents[2]
_SPARE_REQUESTS = 64  # more than the engine takes, so that the engine rejects them itself with its 429
_MAX_CONNECTIONS = 1 << 14  # of a front: many of them may be clients that send their bodies slowly
_MAX_BLOCKS = 1 << 18  # capacity of the prefix index: 64 MB of prompts
_HEALTH_PERIOD = 2.0  # seconds between health checks of a replica
_IDLE_PERIOD = 0.1  # seconds between checks whether a replica to be stopped is idle
# Ray's own thread would take what a replica yields, however little the front has taken.
_ONE_THREAD = {"env_vars": {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}}
_LOGS = {"log_level": "WARNING", "enable_access_log": False}


def build(args: Mapping[str, Any]) -> serve.Application:
    """Build the application from a mapping of flags, without their hyphens, to values.

    Raises:
        ValueError: a mistake in `args`; the message names the flag.
    """
    return application(ray_flags().from_mapping(args))


def application(config: RayConfig) -> serve.Application:
    """Fronts that relay to replicas."""
    common: dict[str, Any] = {
        "health_check_period_s": _HEALTH_PERIOD,
        "graceful_shutdown_timeout_s": config.shutdown_timeout,
        "graceful_shutdown_wait_loop_s": _IDLE_PERIOD,
        "logging_config": _LOGS,
    }
    max_requests = config.max_num_queued_reqs + _SPARE_REQUESTS
    router = {"max_blocks": _MAX_BLOCKS, "margin": max(1, config.max_num_seqs // 2)}
    scaling = config.autoscaling
    replica = serve.deployment(
        Replica,
        name="Replica",
        ray_actor_options={**config.resources, "runtime_env": _ONE_THREAD},
        max_ongoing_requests=max_requests,
        request_router_config={"request_router_class": PrefixRouter, "request_router_kwargs": router},
        **({"num_replicas": config.num_replicas or 1} if scaling is None else {"autoscaling_config": scaling}),
        **common,
    )
    front = serve.deployment(
        serve.ingress()(Front),
        name="Front",
        ray_actor_options={"num_cpus": 0},  # it only relays bytes
        max_ongoing_requests=_MAX_CONNECTIONS,
        **common,
    )
    return front.bind(replica.bind(config.of_replica), config.of_front)


def main() -> int:
    """Serve, and return the exit code.

    0 after SIGTERM or Ctrl-C, 1 if start-up fails, 130 for Ctrl-C during start-up.
    """
    config = ray_flags().read()
    reporter = start_reporting(config)
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        # Checked first, since Ray's proxy starts late and does not report a port in use.
        with listen(config) as listener:
            url, port = url_of(config, listener), listener.getsockname()[1]
        _start_ray(config)
        try:
            _deploy(config, port)
            stop = threading.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.set())
            names = config.served_model_name or (api_name(config.model or DEFAULT_MODEL),)
            reporter.report(server_started(config, names, url, chats=True))  # only the replicas know if it chats
            stop.wait()
            serve.delete(_NAME)  # returns when running requests have ended
            return 0
        finally:
            if config.address is None:
                serve.shutdown()
            ray.shutdown()
    except (StartupError, KeyboardInterrupt) as error:
        return reporter.fail(error)


def _start_ray(config: RayConfig) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address, options = config.address, {}
    if address is None:
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{_ROOT}:{path}" if path else str(_ROOT)  # for imports in Ray's workers
        os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", PROXY_CALLBACK)
        address, options = "local", {"include_dashboard": False}  # do not join another Ray cluster of this machine
        if config.is_local:  # Ray's own ports, which run the code of any client, listen on 127.0.0.1, too
            os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
            ray_constants.ENABLE_RAY_CLUSTER = False  # read when Ray was imported
    try:
        ray.init(address=address, logging_level=logging.WARNING, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StartupError(f"--address {config.address}: {error_reason(error)}") from error


def _deploy(config: RayConfig, port: int) -> None:
    if serve.status().proxies:
        raise StartupError("Ray Serve is running there; deploy the serveConfigV2 of deploy/rayservice.yaml instead")
    serve.start(
        http_options={
            "host": config.host,
            "port": port,
            "root_path": config.root_path,
            "keep_alive_timeout_s": config.timeout_keep_alive,
            "ssl_keyfile": config.ssl_keyfile and str(config.ssl_keyfile),
            "ssl_certfile": config.ssl_certfile and str(config.ssl_certfile),
        },
        logging_config=_LOGS,
    )
    try:
        serve.run(application(config), name=_NAME, route_prefix="/")
    except RuntimeError as error:
        raise StartupError(_reason(error)) from error


def _reason(error: RuntimeError) -> str:
    """Why a replica failed to start: the last line of its traceback, or else Ray's message."""
    application = serve.status().applications.get(_NAME)
    replica = application and application.deployments.get("Replica")
    lines = re.findall(r"^[\w.]+Error: (.+)$", replica.message, re.MULTILINE) if replica else []
    return lines[-1] if lines else str(error)


if __name__ == "__main__":
    sys.exit(main())
