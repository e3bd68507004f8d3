"""Finds the compiled kernels and registers them with XLA."""

import ctypes
import functools
import hashlib
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import jax
import jaxlib.version

from model.layout import COLUMN_BLOCK, PAGE_SIZE
from model.private_files import is_private


class Target(StrEnum):
    """Names of the kernels in the library and in compiled programs."""

    LINEAR = "logprobd_linear"
    EXPERTS = "logprobd_experts"
    ROUTE = "logprobd_route"
    COMBINE = "logprobd_combine"
    ATTENTION = "logprobd_attention"
    NORM = "logprobd_norm"
    SWIGLU = "logprobd_swiglu"
    GEGLU = "logprobd_geglu"
    CLAMPED_SWIGLU = "logprobd_clamped_swiglu"
    SOFT_CAP = "logprobd_soft_cap"
    ROTATE = "logprobd_rotate"
    LOGPROBS = "logprobd_logprobs"
    SCORE = "logprobd_score"


# Instruction sets, the best first, and their compiler flags: a library is built for each.
INSTRUCTION_SETS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c", "-mpopcnt", "-mbmi"),
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi"),
    "neon": (),
}
# No -march=native: libraries may be built on another machine, and load_library() picks one by the CPU.
# No contraction: only explicit multiply-adds are fused.
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off"),
    f"-DLOGPROBD_PAGE_SIZE={PAGE_SIZE}",
    f"-DLOGPROBD_COLUMN_BLOCK={COLUMN_BLOCK}",
)
FOLDER = Path(__file__).parent
BUNDLED = FOLDER / "_build"
UNITS, HEADERS = sorted(FOLDER.glob("*.cc")), sorted(FOLDER.glob("*.h"))
# Paths of bfloat16's linear map, equal to the last bit: AVX512_BF16, and float32 multiply-adds.
PATHS = ("pairs", "floats")


@dataclass(frozen=True)
class CpuKernels:
    """The loaded and registered library."""

    digest: str  # of its sources and flags
    instruction_set: str
    paths: tuple[str, ...]  # of the linear kernel; each is also a target, logprobd_linear_PATH


@functools.cache
def digest() -> str:
    """Digest of sources and flags, part of the library's name: only a library of these sources is loaded."""
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
    """Path of the library: inside the package if it was built in place, as in an image, else in the cache."""
    name = library_name(instruction_set)
    bundled = BUNDLED / name
    return bundled if is_trusted(bundled) else cache_folder() / name


def is_trusted(library: Path) -> bool:
    """Whether a library exists that no other user but root could have written."""
    return is_private(library) and is_private(library.parent.resolve())


def load_library() -> CpuKernels | None:
    """Load the library of the best instruction set and register its kernels with XLA; None if there is no library.

    A library that other users could have written is not loaded: it would run in this process. For use before a
    program that calls the kernels is compiled or read from the persistent compilation cache. Calls after the first
    change nothing.
    """
    for instruction_set in INSTRUCTION_SETS:
        path = library_path(instruction_set)
        if not is_trusted(path):
            continue
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        if library.logprobd_runs_here():
            return _register(library, instruction_set)
    return None


def _register(library: ctypes.CDLL, instruction_set: str) -> CpuKernels:
    paths = PATHS if library.logprobd_has_pairs() else ("floats",)
    for name in (*Target, *(f"{Target.LINEAR}_{path}" for path in paths)):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return CpuKernels(digest(), instruction_set, paths)
