"""RayConfig: the flags of `python -m serve.ray.app`, which are those of a server and the replicas' own."""

import contextlib
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.config.config import ServeConfig
from serve.config.flags import read_server, server_flags
from serve.config.options import CommandLine, between, option

_GROUP = "Replicas"  # heading of --help
_MAX_REPLICAS = 1 << 16
# Flags about connections, which Ray Serve's proxy accepts.
_UNSUPPORTED = ("uds", "ssl_ca_certs", "client_timeout", "h11_max_incomplete_event_size", "max_unread_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig(ServeConfig):
    """Options of a server with replicas."""

    address: str | None = option(
        _GROUP, "address of a Ray cluster, or auto; default: start Ray on this machine", metavar="ADDRESS"
    )
    num_replicas: int | None = option(
        _GROUP, "number of engines, each with its own weights and cache; default: 1", between(1, _MAX_REPLICAS)
    )
    min_replicas: int | None = option(
        _GROUP, "lower bound for autoscaling; requires --max-replicas; default: 1", between(1, _MAX_REPLICAS)
    )
    max_replicas: int | None = option(
        _GROUP,
        "scale with the load up to this number of replicas, instead of --num-replicas",
        between(1, _MAX_REPLICAS),
    )
    target_ongoing_requests: float | None = option(
        _GROUP, "requests per replica that autoscaling aims for", between(0.001, 1e6)
    )
    device: str = option(
        _GROUP,
        "kind of device to reserve from Ray; a replica takes --tensor-parallel-size of them",
        choices=("cpu", "cuda", "tpu"),
        default="cpu",
    )
    num_cpus_per_replica: float = option(
        _GROUP, "CPUs to reserve from Ray for each replica", between(0.001, 1e6), default=1.0
    )

    @property
    def autoscaling(self) -> dict[str, Any] | None:
        """Ray's autoscaling_config; None for a fixed number of replicas."""
        if self.max_replicas is None:
            return None
        bounds = {"min_replicas": self.min_replicas or 1, "max_replicas": self.max_replicas}
        target = self.target_ongoing_requests
        return bounds if target is None else bounds | {"target_ongoing_requests": target}

    @property
    def resources(self) -> dict[str, Any]:
        """Ray's ray_actor_options of a replica."""
        resources: dict[str, Any] = {"num_cpus": self.num_cpus_per_replica}
        if self.device == "cuda":
            resources["num_gpus"] = self.tensor_parallel_size
        elif self.device == "tpu":
            resources["resources"] = {"TPU": self.tensor_parallel_size}
        return resources


def parse_ray_args(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> RayConfig:
    """Read the command line; a mistake ends the process with code 2 and a line that names the flag."""
    line = _command_line()
    config = read_server(line, arguments, environ)
    _check(line, config)
    return config


def config_of(args: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> RayConfig:
    """Read a mapping of flags to values, as in a config file of Ray Serve.

    Raises:
        ValueError: a mistake; the message names the flag.
    """
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return parse_ray_args(_command_line().words_of(args), environ)
    except SystemExit:
        message = output.getvalue().strip().rpartition("error: ")[2]
        raise ValueError(message or "args: --help is not an option here") from None


def _command_line() -> CommandLine[RayConfig]:
    return server_flags(
        RayConfig, prog="python -m serve.ray.app", description="Replicas of a server behind one address, on Ray Serve."
    )


def _check(line: CommandLine[RayConfig], config: RayConfig) -> None:
    """End the process if flags contradict each other or are not supported on Ray."""
    if config.max_replicas is None:
        for name in ("min_replicas", "target_ongoing_requests"):
            if getattr(config, name) is not None:
                line.parser.error(f"argument --{name.replace('_', '-')}: requires --max-replicas")
    elif config.num_replicas is not None:
        line.parser.error("argument --num-replicas: cannot be combined with --max-replicas")
    elif (config.min_replicas or 1) > config.max_replicas:
        line.parser.error(
            f"argument --min-replicas: {config.min_replicas} is above --max-replicas {config.max_replicas}"
        )
    defaults = {field.name: field.default for field in dataclasses.fields(RayConfig)}
    for name in _UNSUPPORTED:
        if getattr(config, name) != defaults[name]:
            line.parser.error(
                f"argument --{name.replace('_', '-')}: not supported with Ray Serve, whose proxy accepts connections"
            )
