"""`python -m tools.portability.target_facts`: compile tiny models for absent chips; JSON of case -> program -> facts.

It is a program of its own because the compilers must be known before JAX is used.
"""

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compiled.shapes import Buckets
from model.config_hf import config_from_hf
from model.formats import FORMATS
from model.kernels.dispatch import load_kernels
from model.packed import pack
from model.transformer import BoundModel, abstract_weights, bind
from tests.support.tiny import tiny_configs
from tools.hlo import operations
from tools.portability.__main__ import Rejection, Report, reports
from tools.portability.chips import DEFAULT_TARGETS, abstract_model, mesh_of, use_compilers

BUCKETS = Buckets(decode_rows=(4,), prefill_chunks=(16,), score_rows=16, pages_per_row=2, full_vocab_rows=8, segment=8)
V = 1100
PAGES = 4097  # with fewer, XLA chooses another layout of pages
# One layer is enough: all are compiled alike.
SIZES = {"vocab_size": V, "head_dim": 64, "num_hidden_layers": 1}
_FORWARD = ("decode_4", "prefill_16")
_WIDE = {"hidden_size": 1024, "vocab_size": 65536}
_LIKE_V5E = ("v5p:1x1x1", "v6e:1x1")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')


@dataclass(frozen=True)
class Case:
    """A model for a target."""

    target: str
    changes: dict[str, Any] = field(default_factory=dict)  # of config.json
    dtype: str = "bfloat16"
    kv_dtype: str = ""  # of cached keys and values; empty: dtype
    quantization: str = ""  # a block format
    only: tuple[str, ...] = ()  # programs; empty: all


# Every target, most with every program, then special cases: sizes that are no multiple of lanes, large heads, float32
# weights or cache, block formats, an older GPU, several GPUs.
CASES: dict[str, Case] = {
    **{target: Case(target, only=_FORWARD if target in _LIKE_V5E else ()) for target in DEFAULT_TARGETS},
    "odd sizes": Case("v5e:1x1", {"hidden_size": 576}, only=("prefill_16", "score_16")),
    "odd sizes, four chips": Case("v5e:2x2", {"hidden_size": 896}, only=("prefill_16", "score_16")),
    "float32": Case("v5e:1x1", dtype="float32", only=("decode_4",)),
    "float32, bfloat16 cache": Case("v5e:1x1", dtype="float32", kv_dtype="bfloat16", only=("prefill_16", "score_16")),
    "float32, bfloat16 cache, h100": Case("h100", dtype="float32", kv_dtype="bfloat16", only=_FORWARD),
    "float32 cache": Case("v5e:1x1", kv_dtype="float32", only=("decode_4",)),
    "large heads": Case("v6e:1x1", {"head_dim": 256}, only=("decode_4",)),
    "large heads, a100": Case("a100", {"head_dim": 256}, only=_FORWARD),
    "Q8_0": Case("v5e:1x1", _WIDE, quantization="Q8_0", only=("score_16",)),
    "Q8_0, h100": Case("h100", _WIDE, quantization="Q8_0", only=("score_16",)),
    "Q4_K": Case("v5e:1x1", _WIDE, dtype="float32", quantization="Q4_K", only=("score_16",)),
    "Q4_K, h100": Case("h100", _WIDE, dtype="float32", quantization="Q4_K", only=("score_16",)),
    "two gpus": Case("h100:2", only=("decode_4", "score_16")),
}


def model_of(case: Case) -> BoundModel:
    """Return an abstract model."""
    config = config_from_hf(tiny_configs()["llama"] | SIZES | case.changes)
    mesh = mesh_of(case.target)
    if not case.quantization:
        model = abstract_model(config, case.dtype, mesh)
        return replace(model, kv_dtype=jnp.dtype(case.kv_dtype or case.dtype))
    dtype = jnp.dtype(case.dtype)
    weights = abstract_weights(config, dtype).items()
    packed = {path: _packed(leaf, case.quantization) if leaf.ndim == 2 else leaf for path, leaf in weights}
    return bind(config, dtype, packed, load_kernels(), mesh)


def _packed(leaf: Any, name: str) -> Any:
    n, k = leaf.shape
    like = pack((32, k), FORMATS[name], [np.zeros((32, FORMATS[name].nbytes(1, k)), np.uint8)])
    blocks = -(-n // 32)
    packed = jax.tree.map(lambda array: leaf.update(shape=(blocks, *array.shape[1:]), dtype=array.dtype), like)
    return replace(packed, n=n)


def facts(found: Report | Rejection) -> dict[str, Any]:
    """Return the facts about a program that tests check."""
    if isinstance(found, Rejection):
        return {"rejected": found.reason}
    text = operations.hlo_text(found.program)
    listed = operations.operations(text)
    moved = operations.collectives(listed)
    return {
        "bytes": [found.argument_bytes, found.result_bytes, found.temp_bytes],
        "flops": found.flops,
        "moved": found.moved_bytes,
        "calls": sorted(set(_TARGET.findall(text))),
        "attention": "ragged_paged_attention" in text or "logprobd_attention" in text,
        "collectives": len(moved),
        "axes moved": sorted({operations.widest_axis(each.shape) for each in moved}),
        "donated": len(operations.donations(text)),
        "copies of pages": sum(
            each.opcode in ("copy", "copy-start", "transpose") and f"[{PAGES}," in each.shape for each in listed
        ),
    }


def main() -> int:
    """Print the facts."""
    use_compilers()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        json.dump(dict(zip(CASES, pool.map(facts_of, CASES.values()), strict=True)), sys.stdout)
    return 0


def facts_of(case: Case) -> dict[str, Any]:
    """Return program -> facts."""
    found = reports(model_of(case), BUCKETS, pages=PAGES, only=case.only)
    return {each.name if isinstance(each, Rejection) else each.program.name: facts(each) for each in found}


if __name__ == "__main__":
    sys.exit(main())
