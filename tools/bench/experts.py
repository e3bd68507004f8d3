"""One stream of a mixture of experts against a dense model that reads as many bytes per token.

    python -m tools.bench.experts [--layers 6] [--tokens 96]

Writes both models of random Q4_0 weights, in the shape of Qwen3-30B-A3B with fewer layers and a smaller vocabulary, and
generates tokens in turn, in processes of their own. Needs 2.5 GB of disk.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from serve.llm import LLM

_V, _D, _HEADS, _KV_HEADS, _E = 32_000, 2048, 32, 4, 128
_EXPERTS, _CHOSEN, _SIZE = 128, 8, 768
_PROMPT = 16
_ROUNDS, _GENERATIONS = 3, 5


def _q4_0(source: np.random.Generator, rows: int, columns: int) -> NDArray[np.uint8]:
    """Random weights [rows, bytes] in blocks of 32: a float16 scale and 16 bytes of codes."""
    blocks = source.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
    scales = source.uniform(1e-4, 2e-4, (rows, columns // 32, 1)).astype(np.float16)
    blocks[:, :, :2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


class _Writer:
    """Writes one of the models."""

    def __init__(self, path: Path, layers: int, *, experts: bool) -> None:
        self._source, self._experts = np.random.default_rng(0), experts
        self._file = gguf.GGUFWriter(path, "qwen3moe" if experts else "qwen3")
        self._add_metadata(layers)
        self._add("token_embd", _V, _D)
        self._add("output", _V, _D)
        self._add_floats("output_norm", np.ones(_D))
        for layer in range(layers):
            self._add_layer(f"blk.{layer}")
        self._file.write_header_to_file()
        self._file.write_kv_data_to_file()
        self._file.write_tensors_to_file()
        self._file.close()

    def _add_metadata(self, layers: int) -> None:
        file = self._file
        file.add_context_length(4096)
        file.add_embedding_length(_D)
        file.add_block_count(layers)
        file.add_feed_forward_length(_CHOSEN * _SIZE)
        file.add_head_count(_HEADS)
        file.add_head_count_kv(_KV_HEADS)
        file.add_key_length(_E)
        file.add_value_length(_E)
        file.add_layer_norm_rms_eps(1e-6)
        if self._experts:
            file.add_expert_count(_EXPERTS)
            file.add_expert_used_count(_CHOSEN)
            file.add_expert_feed_forward_length(_SIZE)
        file.add_tokenizer_model("gpt2")
        file.add_tokenizer_pre("qwen2")
        file.add_token_list([*(f"w{i}" for i in range(_V - 3)), "a", "b", "ab"])
        file.add_token_types([gguf.TokenType.NORMAL] * _V)
        file.add_token_merges(["a b"])

    def _add(self, name: str, rows: int, columns: int, experts: int = 0) -> None:
        data = _q4_0(self._source, (experts or 1) * rows, columns)
        data = data.reshape(experts, rows, -1) if experts else data
        self._file.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def _add_floats(self, name: str, values: NDArray[np.float64]) -> None:
        self._file.add_tensor(f"{name}.weight", values.astype(np.float32))

    def _add_layer(self, layer: str) -> None:
        for name, size in (("attn_norm", _D), ("ffn_norm", _D), ("attn_q_norm", _E), ("attn_k_norm", _E)):
            self._add_floats(f"{layer}.{name}", np.ones(size))
        for name, rows in (("q", _HEADS * _E), ("k", _KV_HEADS * _E), ("v", _KV_HEADS * _E)):
            self._add(f"{layer}.attn_{name}", rows, _D)
        self._add(f"{layer}.attn_output", _D, _HEADS * _E)
        size, suffix, experts = (_SIZE, "_exps", _EXPERTS) if self._experts else (_CHOSEN * _SIZE, "", 0)
        for name, rows, columns in (("gate", size, _D), ("up", size, _D), ("down", _D, size)):
            self._add(f"{layer}.ffn_{name}{suffix}", rows, columns, experts)
        if self._experts:
            self._add_floats(f"{layer}.ffn_gate_inp", self._source.standard_normal((_EXPERTS, _D)) * 0.02)


def _rate(model: str, tokens: int) -> float:
    """Tokens per second of one stream, the median of some generations."""
    prompt, times = np.random.default_rng(0).integers(0, _V, _PROMPT).tolist(), []
    with LLM(model, max_model_len=512, max_num_seqs=1) as llm:
        for seed in range(_GENERATIONS):
            start = time.perf_counter()
            llm.generate([prompt], max_tokens=tokens, temperature=1.0, seed=seed, ignore_eos=True)
            times.append(time.perf_counter() - start)
    return tokens / statistics.median(times)


def main() -> None:
    """Print the rates of each round, or that of one model if this is the process that runs it."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.experts", description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(_rate(options.run, options.tokens))
        return
    with tempfile.TemporaryDirectory() as folder:
        models = {name: Path(folder) / f"{name}.gguf" for name in ("experts", "dense")}
        for name, path in models.items():
            _Writer(path, options.layers, experts=name == "experts")
        print("tokens/s: experts, dense, ratio")
        for _ in range(_ROUNDS):
            experts, dense = (_rate_in_process(path, options.tokens) for path in models.values())
            print(f"{experts:.1f} {dense:.1f} {experts / dense:.2f}", flush=True)


def _rate_in_process(model: Path, tokens: int) -> float:
    line = [sys.executable, "-m", "tools.bench.experts", "--run", str(model), "--tokens", str(tokens)]
    run = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return float(run.stdout.split()[-1])


if __name__ == "__main__":
    main()
