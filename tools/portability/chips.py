"""Absent accelerators: their limits, and models to compile for them."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from model.config import ModelConfig
from model.kernels.dispatch import load_kernels
from model.sharding import partition_spec, tensor_mesh
from model.transformer import BoundModel, abstract_weights, bind
from serve.config.values import error_reason


class TargetError(ValueError):
    """A target is unknown, or its compiler is not installed."""


@dataclass(frozen=True, slots=True)
class Chip:
    """Limits of one chip."""

    memory: int  # bytes
    bandwidth: float  # bytes/s of that memory
    peak: float  # dense bfloat16 flops/s
    links: float  # bytes/s to other chips, both directions together


# Sources: NVIDIA, data sheets "A100 Tensor Core GPU" and "H100 Tensor Core GPU", columns of SXM with 80 GB; Google
# Cloud TPU documentation, specifications on the pages "TPU v5e", "TPU v5p" and "TPU v6e" (November 2026).
CHIPS = {
    "a100": Chip(80 * 10**9, 2.039e12, 312e12, 600e9),
    "h100": Chip(80 * 10**9, 3.35e12, 989e12, 900e9),
    "v5e": Chip(16 * 2**30, 800e9, 197e12, 400e9),
    "v5p": Chip(95 * 2**30, 2765e9, 459e12, 1200e9),
    "v6e": Chip(32 * 2**30, 1600e9, 918e12, 800e9),
}
DEFAULT_TARGETS = ("cpu", "h100", "v5e:1x1", "v5e:2x2", "v5p:1x1x1", "v6e:1x1")

_HINT = " (`make portability` installs the compilers)"
# Otherwise libtpu queries a metadata server for its chips, and only one process can load it.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# XLA's description of a GPU: limits of its compute capability (CUDA C++ Programming Guide, "Compute Capabilities") and
# sizes from its data sheet.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 {sizes}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""
_GPUS = {
    "a100": _GPU.format(
        name="NVIDIA A100-SXM4-80GB",
        sizes="shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 core_count: 108 fpus_per_core: 64 "
        "memory_bandwidth: 2039000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: 84987740160 "
        "cuda_compute_capability { major: 8 }",
    ),
    "h100": _GPU.format(
        name="NVIDIA H100 80GB HBM3",
        sizes="shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128 "
        "memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048 "
        "cuda_compute_capability { major: 9 }",
    ),
}


def use_compilers() -> None:
    """Make the compilers importable; the process itself stays on the CPU. Must run before JAX is used.

    `make portability` installs libtpu and jax-cuda13-plugin into `targets` next to this Python. In site-packages, every
    JAX process would try to start them.
    """
    os.environ.update(_TPU_ENVIRONMENT)
    sys.path.append(str(Path(sys.prefix) / "targets"))
    jax.config.update("jax_platforms", "cpu")


def mesh_of(target: str) -> Mesh | None:
    """Return the devices of a target: "cpu" (None), "h100", "h100:8", or a TPU slice such as "v5e:2x2".

    Raises:
        TargetError: the target is unknown, or its compiler is not installed.
    """
    if target == "cpu":
        return None
    name, _, shape = target.partition(":")
    if name not in CHIPS:
        raise TargetError(f"{target}: unknown target; known: cpu, {', '.join(CHIPS)}, and slices such as v5e:2x2")
    try:
        return tensor_mesh(_devices(name, shape))
    except Exception as error:  # plug-ins raise any type
        hint = "" if any((Path(path) / "libtpu").is_dir() for path in sys.path) else _HINT
        raise TargetError(f"{target}: {error_reason(error)}{hint}") from error


def _devices(name: str, shape: str) -> Sequence[jax.Device]:
    if name in _GPUS:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=name.upper(), topology=f"1x1x{shape or 1}", target_config=_GPUS[name]
        )
    else:
        one = "1x1x1" if name == "v5p" else "1x1"
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape or one}")
    devices: Sequence[jax.Device] = topology.devices
    return devices


def chip_of(target: str) -> Chip | None:
    """Return the limits of a target's chip; None for a CPU, whose limits `make bench` measures."""
    return CHIPS.get(target.partition(":")[0])


def abstract_model(config: ModelConfig, dtype_name: str, mesh: Mesh | None = None) -> BoundModel:
    """Return a model without weights, to compile programs for; the mesh's devices need not exist on this machine."""
    dtype, specs = jnp.dtype(dtype_name), config.weights()
    weights = abstract_weights(config, dtype, mesh.size if mesh else 1)
    if mesh is not None:
        for path, weight in weights.items():
            spec = partition_spec(specs[path])
            shape = tuple(size * (mesh.size if axis else 1) for size, axis in zip(weight.shape, spec, strict=True))
            weights[path] = weight.update(shape=shape, sharding=NamedSharding(mesh, spec))
    return bind(config, dtype, weights, load_kernels(), mesh)
