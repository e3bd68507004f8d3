"""Products of many rows with the matrices of a model, as shares of the float32 multiply-add peak."""

import ctypes
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from model.formats import FLOATS, BlockFormat
from model.kernels.cpu.build import build_library, instruction_sets
from model.kernels.cpu.library import FOLDER, INSTRUCTION_SETS
from model.kernels.dispatch import Kernels, load_kernels
from model.linear import matmul
from model.packed import pack
from model.weights.loader import storage_of
from model.weights.source import ModelSource, default_model_path, resolve_model
from model.weights.weight_table import check_headers, open_checkpoint
from serve.config.engine_config import EngineConfig
from serve.server.model_files import resolve_dtype

ROWS = 512
_SOURCE = Path(__file__).with_name("multiply_adds.cc")
_SECONDS = 0.05  # of a measurement of the peak
_ROUNDS = 7


@dataclass(frozen=True, slots=True)
class Product:
    """A product of ROWS rows with the largest matrix of a layer in a format."""

    format: str
    shape: tuple[int, int]
    rate: float  # FLOP/s
    peak: float  # FLOP/s of multiply-adds in registers, on the same cores at about the same time


def measured_products(config: EngineConfig) -> list[Product]:
    """The products of a model; empty without CPU kernels or a compiler."""
    kernels = load_kernels()
    if kernels.cpu is None or jax.default_backend() != "cpu":
        return []
    dtype, shapes = _matrices(config, kernels)
    try:
        peak = multiply_add_peak()
    except RuntimeError:
        return []
    return [_measured(block_format, shape, dtype, kernels, peak) for block_format, shape in shapes.items()]


def multiply_add_peak() -> Callable[[], float]:
    """Return a function that measures the FLOP/s of float32 multiply-adds in the registers of all cores.

    Raises:
        RuntimeError: there is no compiler, or no instruction set of ours runs here.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in instruction_sets(platform.machine()):
            path, flags = Path(folder) / f"{name}.so", (*INSTRUCTION_SETS[name], f"-I{FOLDER}")
            build_library([_SOURCE], path, flags)
            library = ctypes.CDLL(str(path))
            if library.runs_here():
                break
        else:
            raise RuntimeError(f"no peak is known for {platform.machine()}")
    library.multiply_adds.argtypes = (ctypes.c_int64, ctypes.c_float)
    library.multiply_adds.restype = ctypes.c_float
    cores, operations = len(os.sched_getaffinity(0)), library.operations_per_round()

    def seconds(rounds: int) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(cores) as threads:
            [*threads.map(lambda _: library.multiply_adds(rounds, 1e-3), range(cores))]
        return time.perf_counter() - start

    rounds = 1 << 16
    rounds = max(rounds, round(rounds * _SECONDS / min(seconds(rounds) for _ in range(3))))
    return lambda: cores * rounds * operations / seconds(rounds)


def _matrices(config: EngineConfig, kernels: Kernels) -> tuple[str, dict[BlockFormat, tuple[int, int]]]:
    """The dtype of activations, and the shape of the largest matrix of a layer in each format."""
    source = resolve_model(config.model, None) if config.model else ModelSource("default", default_model_path())
    shapes: dict[BlockFormat, tuple[int, int]] = {}
    with closing(open_checkpoint(source)) as checkpoint:
        dtype = resolve_dtype(config, checkpoint)
        storage = storage_of(dtype, config.stored_quantization, kernels)
        for target in check_headers(checkpoint):
            for block_format in storage.formats(target, checkpoint.names()) if "layers" in target.path else ():
                n, k = target.shape
                shapes[block_format] = max(
                    shapes.get(block_format, (0, 0)), (n, k), key=lambda shape: shape[0] * shape[1]
                )
    return dtype, shapes


def _measured(
    block_format: BlockFormat, shape: tuple[int, int], dtype: str, kernels: Kernels, peak: Callable[[], float]
) -> Product:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((ROWS, shape[1]), np.float32), dtype)
    weight = pack(shape, block_format, [_random_rows(block_format, *shape)])
    product: Callable[..., Any] = jax.jit(lambda x, weight: matmul(x, weight, kernels))
    product(x, weight).block_until_ready()
    rates, peaks = [], []
    for _ in range(_ROUNDS):
        peaks.append(peak())
        start = time.perf_counter()
        product(x, weight).block_until_ready()
        rates.append(2 * ROWS * shape[0] * shape[1] / (time.perf_counter() - start))
    return Product(block_format.name, shape, max(rates), max(peaks))


def _random_rows(block_format: BlockFormat, n: int, k: int) -> NDArray[np.uint8]:
    """Rows of random blocks with small scales."""
    random, depth = np.random.default_rng(0), block_format.depth(k)
    if block_format.is_float:
        values = random.standard_normal((n, depth * block_format.block), np.float32)
        return values.astype(FLOATS[block_format.name]).view(np.uint8)
    blocks = random.integers(0, 256, (n, depth, block_format.block_bytes), np.uint8)
    for start in block_format.float16_at:
        blocks[..., start : start + 2] = np.array([2.0**-8], np.float16).view(np.uint8)
    if block_format.scale_bytes == 1:
        blocks[..., 0] = 120  # of MXFP4: 2^-7
    return blocks.reshape(n, -1)
