"""RayConfig: the flags of `python -m serve.ray.app`, which are those of a server and the replicas' own."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from serve.config.config import ServeConfig
from serve.config.flags import server_flags
from serve.config.options import CommandLine, option
from serve.config.values import Between, OneOf

_GROUP = "Replicas"  # heading of --help
_REPLICAS = Between(1, 1 << 16)
# Flags about connections, which Ray Serve's proxy accepts.
_UNSUPPORTED = ("uds", "ssl_ca_certs", "client_timeout", "h11_max_incomplete_event_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig(ServeConfig):
    address: str | None = option(
        _GROUP, "address of a Ray cluster, or auto; default: start Ray on this machine", metavar="ADDRESS"
    )
    num_replicas: int | None = option(
        _GROUP, "number of engines, each with its own weights and cache; default: 1", _REPLICAS
    )
    min_replicas: int | None = option(
        _GROUP, "lower bound for autoscaling; requires --max-replicas; default: 1", _REPLICAS
    )
    max_replicas: int | None = option(
        _GROUP, "scale with the load up to this number of replicas, instead of --num-replicas", _REPLICAS
    )
    target_ongoing_requests: float | None = option(
        _GROUP, "requests per replica that autoscaling aims for", Between(0.001, 1e6)
    )
    device: str = option(
        _GROUP,
        "kind of device to reserve from Ray; a replica takes --tensor-parallel-size of them",
        OneOf(("cpu", "cuda", "tpu")),
        default="cpu",
    )
    num_cpus_per_replica: float = option(
        _GROUP, "CPUs to reserve from Ray for each replica", Between(0.001, 1e6), default=1.0
    )

    def __post_init__(self) -> None:
        ServeConfig.__post_init__(self)
        if self.max_replicas is None:
            for name in ("min_replicas", "target_ongoing_requests"):
                if getattr(self, name) is not None:
                    raise ValueError(f"argument --{name.replace('_', '-')}: requires --max-replicas")
        elif self.num_replicas is not None:
            raise ValueError("argument --num-replicas: cannot be combined with --max-replicas")
        elif (self.min_replicas or 1) > self.max_replicas:
            message = f"{self.min_replicas} is above --max-replicas {self.max_replicas}"
            raise ValueError(f"argument --min-replicas: {message}")
        for field in dataclasses.fields(self):
            if field.name in _UNSUPPORTED and getattr(self, field.name) != field.default:
                flag = f"--{field.name.replace('_', '-')}"
                raise ValueError(f"argument {flag}: not supported with Ray Serve, whose proxy accepts connections")

    @property
    def autoscaling(self) -> dict[str, Any] | None:
        """Ray's autoscaling_config; None for a fixed number of replicas."""
        if self.max_replicas is None:
            return None
        bounds = {"min_replicas": self.min_replicas or 1, "max_replicas": self.max_replicas}
        target = self.target_ongoing_requests
        return bounds if target is None else bounds | {"target_ongoing_requests": target}

    @property
    def of_front(self) -> Self:
        """The part of a front, which does not know the tokens of a request."""
        return self._without_limits("tokens_per_minute")

    @property
    def of_replica(self) -> Self:
        """The part of a replica: requests are counted by the front."""
        return self._without_limits("requests_per_minute", "max_bodies")

    def _without_limits(self, *names: str) -> Self:
        none = dict.fromkeys(names)
        keys = (key if isinstance(key, str) else key.model_copy(update=none) for key in self.api_key)
        return dataclasses.replace(self, api_key=tuple(keys))

    @property
    def resources(self) -> dict[str, Any]:
        """Ray's ray_actor_options of a replica."""
        resources: dict[str, Any] = {"num_cpus": self.num_cpus_per_replica}
        if self.device == "cuda":
            resources["num_gpus"] = self.tensor_parallel_size
        elif self.device == "tpu":
            resources["resources"] = {"TPU": self.tensor_parallel_size}
        return resources


def ray_flags(environ: Mapping[str, str] = os.environ) -> CommandLine[RayConfig]:
    """The flags of replicas, on a command line or in a config file of Ray Serve."""
    description = "Replicas of a server behind one address, on Ray Serve."
    return server_flags(RayConfig, environ, prog="python -m serve.ray.app", description=description)
