"""`python -m tests.support.sharded_logprobs`: log-probs of small models on 1, 2, 4 and 8 devices, as JSON.

It is a program of its own because the number of CPU devices must be set before JAX is used.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from compiled.runner import ModelRunner
from compiled.shapes import Buckets
from compiled.state import (
    FROM_SLOT,
    PAGE_COPIES,
    DecodeInput,
    SamplingArrays,
    ScoreInput,
    SlotPenalties,
    StepInput,
    greedy_sampling,
    no_requested_ids,
)
from compiled.step import cache_index
from model.kv_cache import PAGE_SIZE
from model.sharding import tensor_mesh
from model.weights.loader import load_model
from model.weights.source import ModelSource
from model.weights.weight_table import open_checkpoint
from serve.engine.batch import page_copies
from tests.support.tiny import random_weights, tiny_configs, write_checkpoint
from tools.hlo import operations

PROMPT = [5, 17, 99, 3, 8, 9, 44]
BUCKETS = Buckets(decode_rows=(4,), prefill_chunks=(16,), score_rows=16, pages_per_row=2, full_vocab_rows=8)
V = 1100  # not a multiple of the number of devices
_ONE_LAYER = {"num_hidden_layers": 1}  # all layers are sharded alike
# Name -> family, changes of config.json, dtype, quantization, numbers of devices. To save time, only one case uses all
# numbers.
CASES: dict[str, tuple[str, dict[str, Any], str, str, tuple[int, ...]]] = {
    "9 heads, 3 of keys": ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3}, "float32", "auto", (2, 4, 8)),
    "14 heads, 2 of keys, biases": (
        "qwen2",
        {"num_attention_heads": 14, "num_key_value_heads": 2, **_ONE_LAYER},
        "float32",
        "auto",
        (8,),
    ),
    "norms over all heads": ("olmo2", _ONE_LAYER, "float32", "auto", (4,)),
    "norms of each head, tied": ("gemma3", {}, "float32", "auto", (4,)),
    "soft caps": ("gemma2", _ONE_LAYER, "float32", "auto", (4,)),
    "q, k, v in one tensor, bfloat16": ("phi3", _ONE_LAYER, "bfloat16", "auto", (4,)),
    "sinks, biases of experts": ("gpt_oss", {"hidden_size": 64, **_ONE_LAYER}, "float32", "auto", (4,)),
    "Q8_0, bfloat16": ("llama", {"head_dim": 32, **_ONE_LAYER}, "bfloat16", "Q8_0", (2,)),
    "Q4_0": ("llama", {"head_dim": 32, **_ONE_LAYER}, "float32", "Q4_0", (2,)),
    "Q4_K": (
        "llama",
        {"hidden_size": 256, "head_dim": 128, "intermediate_size": 768, **_ONE_LAYER},  # 3 blocks for 2 devices
        "float32",
        "Q4_K",
        (2,),
    ),
}

CASES |= {
    name: (
        "qwen3moe",
        {"hidden_size": 96, "head_dim": 32, "moe_intermediate_size": 96, "mlp_only_layers": [], **_ONE_LAYER},
        dtype,
        quantization,
        (2,),
    )
    for name, dtype, quantization in (("experts", "float32", "auto"),)
}

_COPIED = 5  # page that the prompt is computed in; rows use copies


def numbers(runner: ModelRunner, *, companions: int = 0) -> dict[str, Any]:
    """Return log-probs of PROMPT and of the next greedy token, with up to 3 other rows in the batch."""
    runner.reset()
    count = len(PROMPT) - 1
    tokens, positions = np.zeros((1, 16), np.int32), np.full((1, 16), -1, np.int32)
    tokens[0, :count], positions[0, :count] = PROMPT[:-1], np.arange(count)
    runner.prefill(StepInput(tokens, positions, np.array([[_COPIED, 0]], np.int32)))
    runner.copy_pages(page_copies([(_COPIED, page) for page in range(1, 2 + companions)]))
    indices, targets, requested = np.zeros(16, np.int32), np.zeros(16, np.int32), no_requested_ids(16)
    indices[:count], targets[:count] = [cache_index(1, i) for i in range(count)], PROMPT[1:]
    requested[:, :2] = [7, V - 1]
    scored = runner.read(runner.score(ScoreInput(indices, targets, requested)))
    results = {
        "prompt": scored.logprob[:count].tolist(),
        "top": scored.top_logprobs[:count].tolist(),
        "named": scored.requested_logprobs[:count, :2].tolist(),
        "ranks": [
            scored.rank[:count].tolist(),
            scored.top_ids[:count].tolist(),
            scored.requested_ranks[:count, :2].tolist(),
        ],
        "whole": runner.full_vocab_logprobs(indices[:8])[:count].tolist(),
    }
    greedy = runner.read(decode(runner, greedy_sampling(4, V), 0, companions))
    if greedy.experts is not None:
        pages = runner.read(runner.read_experts(np.ones(PAGE_COPIES, np.int32)))
        results["ranks"].append([*pages[0, : count + 1].tolist(), greedy.experts[0].tolist()])
    results |= {"greedy": greedy.logprobs.logprob[:1].tolist(), "greedy token": int(greedy.tokens[0])}
    return results


def decode(runner: ModelRunner, sampling: SamplingArrays, step: int, companions: int = 0) -> Any:
    """Decode token number `step` of the first row."""
    rows = np.arange(4) <= companions
    last = np.where(rows, PROMPT[-1] if step == 0 else FROM_SLOT, 0).astype(np.int32)
    positions = np.where(rows, len(PROMPT) - 1 + step, -1).astype(np.int32)
    tables = np.where(rows[:, None], np.stack([np.arange(1, 5), np.zeros(4)], axis=1), 0).astype(np.int32)
    slots = np.where(rows, np.arange(4), BUCKETS.slots - 1).astype(np.int32)
    return runner.decode(DecodeInput(last, positions, tables, slots, no_requested_ids(4)), sampling)


def choices(runner: ModelRunner) -> dict[str, Any]:
    """Sample tokens with all filters, bias, penalties and a mask; return them with their log-probs."""
    runner.reset()
    numbers(runner)
    sampling = greedy_sampling(4, V)
    sampling.temperature[0], sampling.top_p[0], sampling.top_k[0], sampling.min_p[0] = 1.2, 0.8, 700, 1e-4
    sampling.seed[0], sampling.processed[0], sampling.penalized[0] = (1, 2), True, True
    sampling.repetition_penalty[0], sampling.frequency_penalty[0], sampling.presence_penalty[0] = 1.3, 0.2, 0.1
    sampling.mask[0, ::3] = 0x5555AAAA
    bias = np.linspace(-1, 1, V, dtype=np.float32)
    runner.set_penalties(0, SlotPenalties(bias, np.zeros(V, np.int32), np.arange(V) % 5 == 0))
    tokens, logprobs = [], []
    for step in range(12):
        sampling.step[0] = step
        output = runner.read(decode(runner, sampling, step))
        tokens.append(int(output.tokens[0]))
        logprobs += output.logprobs.logprob[:1].tolist() + output.logprobs.top_logprobs[0].tolist()
        logprobs += output.allowed_logmass[:1].tolist()
    return {"drawn": tokens, "drawn logprobs": logprobs}


def main() -> int:
    """Print case -> devices -> log-probs, and the HLO of a model's programs on four devices."""
    jax.config.update("jax_num_cpu_devices", 8)
    results: dict[str, Any] = {"V": V, "page": PAGE_SIZE}
    for case, (family, changes, dtype, quantization, counts) in CASES.items():
        config = tiny_configs()[family] | {"vocab_size": V} | changes
        results[case] = {}
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), config, random_weights(config, seed=3))
            for devices in (1, *counts):
                mesh = None if devices == 1 else tensor_mesh(jax.devices()[:devices])
                checkpoint = open_checkpoint(ModelSource("tiny", Path(folder)))
                try:
                    model = load_model(checkpoint, dtype, quantization=quantization, mesh=mesh)
                finally:
                    checkpoint.close()
                runner = ModelRunner(model, BUCKETS, pages=9, max_logprobs=5)
                alone = numbers(runner)
                results[case][devices] = alone | choices(runner)
                results[case][devices]["changed by company"] = numbers(runner, companions=3) != alone
                if devices == 4 and "hlo" not in results:
                    results["hlo"] = {one.name: operations.hlo_text(one) for one in runner.programs.values()}
    json.dump(results, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
