"""What is said of replicas: the flags of `python -m serve.ray.app` beside those of `python -m serve`."""

import argparse
import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serve.config.config import ServeConfig
from serve.config.flags import command_line, parse_args
from serve.config.options import between

_MOST_REPLICAS = 1 << 16
# What Ray Serve's proxy, through which everything comes, cannot do or does its own way.
_UNSUPPORTED = ("uds", "ssl_ca_certs", "client_timeout", "h11_max_incomplete_event_size", "max_unread_tokens")

type Device = Literal["cpu", "cuda", "tpu"]


@dataclass(frozen=True, slots=True)
class RayOptions:
    """How many replicas there are, and what each takes."""

    address: str | None  # of a cluster; None: one of this machine
    num_replicas: int
    min_replicas: int | None  # with max_replicas: as many as the load wants, instead of num_replicas
    max_replicas: int | None
    target_ongoing_requests: float | None  # of a replica, which the number of replicas follows
    device: Device
    num_cpus_per_replica: float

    @property
    def autoscaling(self) -> dict[str, Any] | None:
        """Ray's autoscaling_config; None for a fixed number."""
        if self.max_replicas is None:
            return None
        chosen = {"min_replicas": self.min_replicas or 1, "max_replicas": self.max_replicas}
        target = self.target_ongoing_requests
        return chosen if target is None else chosen | {"target_ongoing_requests": target}

    def resources(self, devices: int) -> dict[str, Any]:
        """Ray's ray_actor_options of a replica that runs on so many devices."""
        taken: dict[str, Any] = {"num_cpus": self.num_cpus_per_replica}
        if self.device == "cuda":
            taken["num_gpus"] = devices
        elif self.device == "tpu":
            taken["resources"] = {"TPU": devices}
        return taken


def parse_ray_args(
    arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ
) -> tuple[RayOptions, ServeConfig]:
    """Reads the command line; a mistake ends the process with code 2 and a line that names the flag."""
    parser = _parser()
    values, rest = parser.parse_known_args(arguments)
    if "-h" in rest or "--help" in rest:
        parser.print_help()
        print("\nand the flags of a server:\n")
    config = parse_args(rest, environ)
    _check(parser, values, config)
    if values.num_replicas is None:
        values.num_replicas = 1
    return RayOptions(**vars(values)), config


def options_of(args: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> tuple[RayOptions, ServeConfig]:
    """The same from a mapping of flags to values, as a config file of Ray Serve has it.

    Raises:
        ValueError: a mistake in it; the message names the flag.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse_ray_args(command_line().words_of(args), environ)
    except SystemExit:
        raise ValueError(said.getvalue().strip().rpartition("error: ")[2] or "args: --help is no option here") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve.ray.app",
        usage="%(prog)s [model] [flags]",
        description="Replicas of a server behind one address, on Ray Serve.",
        add_help=False,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--address", help="of a Ray cluster, or auto; default: Ray is started on this machine")
    flag(
        "--num-replicas",
        type=between(1, _MOST_REPLICAS),
        help="engines, each with its own weights and cache; default: 1",
    )
    flag(
        "--min-replicas",
        type=between(1, _MOST_REPLICAS),
        help="with --max-replicas, instead of --num-replicas: as the load wants",
    )
    flag("--max-replicas", type=between(1, _MOST_REPLICAS), help="the most that the load may have started")
    flag("--target-ongoing-requests", type=_above_zero, help="of a replica, which the number of replicas follows")
    flag(
        "--device",
        choices=("cpu", "cuda", "tpu"),
        default="cpu",
        help="a replica reserves --tensor-parallel-size of these from Ray; default: %(default)s",
    )
    flag(
        "--num-cpus-per-replica", type=_above_zero, default=1.0, help="CPUs that it reserves, too; default: %(default)s"
    )
    return parser


def _check(parser: argparse.ArgumentParser, values: argparse.Namespace, config: ServeConfig) -> None:
    scales = values.max_replicas is not None
    for name in ("min_replicas", "target_ongoing_requests"):
        if getattr(values, name) is not None and not scales:
            parser.error(f"argument --{name.replace('_', '-')}: it goes with --max-replicas")
    if scales and values.num_replicas is not None:
        parser.error("argument --num-replicas: it does not go with --max-replicas")
    if scales and (values.min_replicas or 1) > values.max_replicas:
        parser.error(f"argument --min-replicas: {values.min_replicas} is above --max-replicas {values.max_replicas}")
    usual = {each.name: each.default for each in dataclasses.fields(ServeConfig)}
    for name in _UNSUPPORTED:
        if getattr(config, name) != usual[name]:
            parser.error(f"argument --{name.replace('_', '-')}: not with Ray Serve, whose proxy takes the connections")


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
