"""Finds the compiled kernels and makes them known to XLA."""

import ctypes
import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jaxlib.version

TARGET = "logprobd_linear"
ATTENTION_TARGET = "logprobd_attention"
NORM_TARGET = "logprobd_norm"
SWIGLU_TARGET = "logprobd_swiglu"
GEGLU_TARGET = "logprobd_geglu"
SOFT_CAP_TARGET = "logprobd_soft_cap"
ROTATE_TARGET = "logprobd_rotate"
LOGPROBS_TARGET = "logprobd_logprobs"
SCORE_TARGET = "logprobd_score"
INT8_TARGET = "logprobd_linear_int8"
SCORE_INT8_TARGET = "logprobd_score_int8"
TARGETS = (
    TARGET,
    ATTENTION_TARGET,
    NORM_TARGET,
    SWIGLU_TARGET,
    GEGLU_TARGET,
    SOFT_CAP_TARGET,
    ROTATE_TARGET,
    LOGPROBS_TARGET,
    SCORE_TARGET,
    INT8_TARGET,
    SCORE_INT8_TARGET,
)
# Instruction sets, the best first, each with the compiler's flags for it: a library is built for each.
INSTRUCTION_SETS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c", "-mpopcnt", "-mbmi"),
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi"),
    "neon": (),
}
# No -march=native: the right library is picked when it is loaded, so it can be built on another machine.
# No contraction: a multiply-add is fused where the source says so, and nowhere else.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off")
FOLDER = Path(__file__).parent
BUNDLED = FOLDER / "_build"
UNITS, HEADERS = sorted(FOLDER.glob("*.cc")), sorted(FOLDER.glob("*.h"))
# bfloat16's linear map has one result to the last bit on two paths: AVX512_BF16, and float32 multiply-adds.
PATHS = ("pairs", "floats")


@dataclass(frozen=True)
class CpuKernels:
    """The loaded library: what it was made from, its instruction set, and the paths of the linear kernel.

    Each path is also a target `TARGET_path`.
    """

    digest: str
    instruction_set: str
    paths: tuple[str, ...]


@functools.cache
def digest() -> str:
    """Of the sources and flags: a library is only ever loaded beside what it was made from."""
    text = repr(
        (FLAGS, sorted(INSTRUCTION_SETS.items()), [(path.name, path.read_bytes()) for path in (*UNITS, *HEADERS)])
    )
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def library_name(instruction_set: str) -> str:
    """File name of the library: it depends on jaxlib (its headers), the instruction set and the sources."""
    return f"kernels-jaxlib-{jaxlib.version.__version__}-{instruction_set}-{digest()}.so"


def cache_folder() -> Path:
    """Folder of the libraries that this user's processes built, shared by all installations and checkouts."""
    return Path(os.path.expanduser("~/.cache/logprobd/kernels"))  # unlike Path.expanduser it never raises


def library_path(instruction_set: str) -> Path:
    """Path of the library: inside the package where it was built in place, as in an image, else in the cache."""
    name = library_name(instruction_set)
    bundled = BUNDLED / name
    return bundled if bundled.exists() else cache_folder() / name


@functools.cache
def load() -> CpuKernels | None:
    """Registers the kernels of the best instruction set with XLA on the first call; None where there are none.

    That is where no library is built, loads, or is for this CPU. To be called before a program that holds the kernels
    is compiled or comes out of the persistent compilation cache.
    """
    for instruction_set in INSTRUCTION_SETS:
        try:
            library = ctypes.CDLL(str(library_path(instruction_set)))
        except OSError:
            continue
        if library.logprobd_runs_here():
            return _register(library, instruction_set)
    return None


def _register(library: ctypes.CDLL, instruction_set: str) -> CpuKernels:
    paths = PATHS if library.logprobd_has_pairs() else ("floats",)
    for name in (*TARGETS, *(f"{TARGET}_{path}" for path in paths)):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return CpuKernels(digest(), instruction_set, paths)


def require() -> CpuKernels:
    """The kernels. Raises RuntimeError where `load()` gives None."""
    kernels = load()
    if kernels is None:
        raise RuntimeError("the CPU kernels are not built for this CPU: leave the work to XLA")
    return kernels
