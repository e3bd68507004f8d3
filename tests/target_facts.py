"""`python -m tests.target_facts`: a tiny model compiled for every target, as JSON: target -> program -> what was found.

A process of its own: the compilers must be known before JAX is used.
"""

import json
import re
import sys
from typing import Any

from compiled import hlo
from compiled.chips import DEFAULT_TARGETS, mesh_of, use_compilers
from compiled.load import abstract_model
from compiled.shapes import Buckets
from compiled.targets import Refusal, Report, reports
from model.config_hf import config_from_hf
from tests.model.tiny import tiny_configs

BUCKETS = Buckets(decode_rows=(4,), prefill_chunks=(16,), score_rows=16, pages_per_row=2, vocabulary_rows=8)
V = 1100
PAGES = 9
# Two layers would be alike: one shows as much.
CONFIG = tiny_configs()["llama"] | {"vocab_size": V, "head_dim": 64, "num_hidden_layers": 1}
_TARGET = re.compile(r'custom_call_target="([^"]+)"')


def facts(found: Report | Refusal) -> dict[str, Any]:
    """What a test wants to know of a program."""
    if isinstance(found, Refusal):
        return {"refused": found.reason}
    text = hlo.hlo_text(found.program)
    moved = hlo.collectives(hlo.operations(text))
    return {
        "bytes": [found.argument_bytes, found.result_bytes, found.temp_bytes],
        "flops": found.flops,
        "moved": found.moved_bytes,
        "calls": sorted(set(_TARGET.findall(text))),
        "attention": "ragged_paged_attention" in text or "logprobd_attention" in text,
        "collectives": len(moved),
        "widest axis moved": max((hlo.widest_axis(each.shape) for each in moved), default=0),
        "donated": len(hlo.donations(text)),
        "copies of pages": len(re.findall(rf"\[{PAGES},[\d,]+\]\S* copy\(", text)),
    }


def main() -> int:
    """Prints the facts."""
    use_compilers()
    told: dict[str, Any] = {}
    for target in DEFAULT_TARGETS:
        model = abstract_model(config_from_hf(CONFIG), "bfloat16", mesh_of(target))
        told[target] = {}
        for found in reports(model, BUCKETS, pages=PAGES):
            name = found.name if isinstance(found, Refusal) else found.program.name
            told[target][name] = facts(found)
    json.dump(told, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
