"""Finds the compiled kernels and makes them known to XLA."""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jaxlib.version

TARGET = "logprobd_linear"
ATTENTION_TARGET = "logprobd_attention"
NORM_TARGET = "logprobd_norm"
SWIGLU_TARGET = "logprobd_swiglu"
ROTATE_TARGET = "logprobd_rotate"
NUMBERS_TARGET = "logprobd_numbers"
SCORE_TARGET = "logprobd_score"
INT8_TARGET = "logprobd_linear_int8"
SCORE_INT8_TARGET = "logprobd_score_int8"
TARGETS = (
    TARGET,
    ATTENTION_TARGET,
    NORM_TARGET,
    SWIGLU_TARGET,
    ROTATE_TARGET,
    NUMBERS_TARGET,
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
# bfloat16's linear map has one result to the last bit on two paths: AVX512_BF16, and float32 multiply-adds.
PATHS = ("pairs", "floats")


@dataclass(frozen=True)
class CpuKernels:
    """The loaded library: its instruction set, and the paths of the linear kernel, each also a target `TARGET_path`."""

    instruction_set: str
    paths: tuple[str, ...]


def library_path(instruction_set: str) -> Path:
    """Where the library of this jaxlib lies: its interface belongs to one version of the headers."""
    return Path(__file__).with_name("_build") / f"kernels-jaxlib-{jaxlib.version.__version__}-{instruction_set}.so"


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
    return CpuKernels(instruction_set, paths)


def require() -> CpuKernels:
    """The kernels. Raises RuntimeError where `load()` gives None."""
    kernels = load()
    if kernels is None:
        raise RuntimeError("the CPU kernels are not built for this CPU: leave the work to XLA")
    return kernels
