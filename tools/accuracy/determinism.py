"""`python -m tools.accuracy.determinism [MODEL ...]`: how much a log-prob depends on how it is computed.

For each model (default: the default model) and each kind of matrix product: a request alone against the same one in a
batch, in other chunks, from the prefix cache, and generated against scored as a prompt. 0 means bit-identical.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from compiled.runner import ModelRunner
from compiled.shapes import make_buckets
from model.kernels.dispatch import Kernels, load_kernels
from model.weights.source import default_model_path
from serve.engine.core import EngineCore
from serve.engine.request import PromptScoring, Request, SamplingParams
from serve.engine.request_state import RequestState
from tests.support.runners import make_runner

_PROMPT, _OUTPUT = 300, 40  # tokens
_CONTEXT = 1024
_ROWS = 16
# Name, weights and dtype of cached keys and values.
_KINDS = (
    ("float32", "float32", None),
    ("float32, bfloat16 cache", "float32", "bfloat16"),
    ("bfloat16", "bfloat16", None),
    ("Q8_0", "Q8_0 float32", None),
    ("Q8_0, bfloat16", "Q8_0 bfloat16", None),
    ("Q4_K", "Q4_K float32", None),
)
_BATCHED = 256 + _ROWS

type Logprobs = NDArray[np.float32]


class Measurement:
    """Log-probs of one request, computed by one runner in several ways."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._random = np.random.default_rng(5)
        self._prompt = self._ids(_PROMPT)

    def differences(self) -> dict[str, float]:
        """Return way -> maximum difference, nats, to the request alone, uncached, in chunks of 256."""
        alone, tokens = self._run()
        found = {f"{rows} rows": _distance(alone, self._run(companions=rows - 1)[0]) for rows in (2, 4, 8, 16)}
        for chunk in (16, 64):
            found[f"chunks of {chunk}"] = _distance(alone, self._run(batched=chunk + _ROWS)[0])
        core = self._core(_BATCHED)
        self._answer(core, self._prompt, _OUTPUT)
        found["cached, not scored before"] = _distance(alone, self._answer(core, self._prompt, _OUTPUT)[0])
        again, _ = self._answer(self._core(_BATCHED), self._prompt + tokens, 0)
        found["generated, scored again"] = _distance(alone, again)
        return found

    def _run(self, *, companions: int = 0, batched: int = _BATCHED) -> tuple[Logprobs, list[int]]:
        core = self._core(batched)
        for i in range(companions):
            other = Request(f"{i}", self._ids(20), SamplingParams(_CONTEXT - 100, temperature=0.0))
            core.add(RequestState(other))
        return self._answer(core, self._prompt, _OUTPUT)

    def _answer(self, core: EngineCore, prompt: list[int], tokens: int) -> tuple[Logprobs, list[int]]:
        """Return log-probs of prompt and output of a scored request, and its output ids."""
        request = RequestState(Request("mine", prompt, SamplingParams(tokens, temperature=0.0, prompt=PromptScoring())))
        core.add(request)
        parts: list[Logprobs] = []
        while True:
            for owner, event in core.step():
                if owner is request:
                    parts += [] if event.prompt_logprobs is None else [event.prompt_logprobs.logprob]
                    parts.append(event.logprobs.logprob)
                    if event.finish_reason is not None:
                        return np.concatenate(parts), request.output_token_ids

    def _core(self, batched: int) -> EngineCore:
        return EngineCore(self._runner, max_model_len=_CONTEXT, max_num_batched_tokens=batched)

    def _ids(self, count: int) -> list[int]:
        ids: list[int] = self._random.integers(20, self._runner.vocab_size, count).tolist()
        return ids


def _distance(a: Logprobs, b: Logprobs) -> float:
    n = min(len(a), len(b))
    return float(np.abs(a[:n] - b[:n]).max())


def _runner(path: Path, weights: str, kv_dtype: str | None, kernels: Kernels) -> ModelRunner:
    buckets = make_buckets(max_num_seqs=_ROWS, max_model_len=_CONTEXT, max_num_batched_tokens=_BATCHED)
    pages = _ROWS * buckets.pages_per_row + 1
    return make_runner(path, weights, buckets, pages=pages, kernels=kernels, kv_dtype=kv_dtype)


def main() -> None:
    """Print a table for each model."""
    kernels = load_kernels()
    for path in [Path(name) for name in sys.argv[1:]] or [default_model_path()]:
        columns = {}
        for name, weights, kv_dtype in _KINDS:
            columns[f"{name}, XLA"] = Measurement(_runner(path, weights, kv_dtype, Kernels())).differences()
            if kernels.cpu is not None:
                columns[f"{name}, kernels"] = Measurement(_runner(path, weights, kv_dtype, kernels)).differences()
        table = Table("against alone, uncached, chunks of 256", *columns, title=path.stem)
        for way in columns["float32, XLA"]:
            table.add_row(
                way, *(f"{differences[way]:.1e}" if differences[way] else "0" for differences in columns.values())
            )
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
