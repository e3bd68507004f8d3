"""Time and peak memory of loading a model, next to the speed of the disk and of memory.

`python -m tools.bench.loading [--gb 4] [--format BF16 ...] [--folder DIR]` writes a model of random values in each
format, loads it in processes of their own, cold and from the page cache, and prints a table.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from model.formats import FORMATS
from model.kernels.dispatch import load_kernels
from model.weights.loader import load_model
from model.weights.rows import quantized
from model.weights.source import resolve_model
from model.weights.weight_table import open_checkpoint

_V, _D, _F, _HEADS = 32_000, 3072, 8192, 24
_READ_BYTES = 16 << 20
_POOL_ROWS = 512  # of random values, which all matrices repeat
_ROUNDS = 3


def main() -> int:
    """Measure all formats, or one file if this is the process that loads it."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.loading", description=__doc__)
    parser.add_argument("--gb", type=float, default=4, help="size of the files, GB")
    parser.add_argument("--format", action="append", help="BF16 (safetensors), or a format of GGUF files")
    parser.add_argument("--folder", type=Path, help="folder for the files; default: a temporary one")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(_load(options.load)))
        return 0
    print(f"memory copy {_copy_rate() / 1e9:.1f} GB/s on one core")
    print("| format | GB | disk GB/s | cached GB/s | load cold s | GB/s | load cached s | GB/s | peak |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.format or ("BF16", "Q8_0", "Q4_0", "Q4_K"):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            files = write_model(Path(folder), name, int(options.gb * 1e9))
            print(_row(name, Path(folder), files), flush=True)
    return 0


def _row(name: str, folder: Path, files: list[Path]) -> str:
    size = sum(file.stat().st_size for file in files)
    disk, cold, warm = 0.0, [], []
    for _ in range(_ROUNDS):
        _drop(files)
        disk = max(disk, size / _read(files))
        _drop(files)
        cold.append(_measure(folder))
        warm.append(_measure(folder))
    cached = size / min(_read(files) for _ in range(_ROUNDS))
    seconds = [min(run["seconds"] for run in runs) for runs in (cold, warm)]
    peak = max(run["peak"] / run["size"] for run in warm)
    rates = [f"{value:.1f} | {size / value / 1e9:.2f}" for value in seconds]
    speeds = f"{size / 1e9:.2f} | {disk / 1e9:.2f} | {cached / 1e9:.2f}"
    return f"| {name} | {speeds} | {rates[0]} | {rates[1]} | {peak:.2f} x |"


def _measure(folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "tools.bench.loading", "--load", str(folder)]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def _load(model: str) -> dict[str, float]:
    """Load a model; return seconds, the final size, and the peak of memory above that of the process before."""
    kernels = load_kernels()
    jax.device_put(1.0).block_until_ready()
    before, start = _memory("VmRSS"), time.perf_counter()
    with closing(open_checkpoint(resolve_model(model, None))) as checkpoint:
        loaded = load_model(checkpoint, "float32", kernels=kernels)
    jax.block_until_ready(loaded.leaves)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "size": sum(leaf.nbytes for leaf in loaded.leaves),
        "peak": _memory("VmHWM") - before,
    }


def _memory(name: str) -> int:
    found = re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text("ascii"))
    assert found is not None
    return 1024 * int(found[1])


def _copy_rate() -> float:
    source, target = np.ones(1 << 29, np.uint8), np.ones(1 << 29, np.uint8)
    return source.nbytes / min(_seconds(lambda: np.copyto(target, source)) for _ in range(_ROUNDS))


def _read(files: list[Path]) -> float:
    """Seconds to read all files into one buffer."""
    buffer = bytearray(_READ_BYTES)

    def read() -> None:
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return _seconds(read)


def _drop(files: list[Path]) -> None:
    """Write files out and drop them from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def write_model(folder: Path, name: str, size: int) -> list[Path]:
    """Write a model of the Llama family of about `size` bytes; return its files."""
    layer_values = 4 * _D * _D + 3 * _D * _F
    bytes_per_value = FORMATS[name].block_bytes / FORMATS[name].block
    layers = max(1, round((size / bytes_per_value - _V * _D) / layer_values))
    return _write_safetensors(folder, layers) if name == "BF16" else [_write_gguf(folder / "m.gguf", layers, name)]


def _shapes(layers: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes by the names of GGUF files: first the outer tensors, then those of each layer."""
    yield {"token_embd": (_V, _D), "output_norm": (_D,)}
    for i in range(layers):
        attention = {f"blk.{i}.attn_{part}": (_D, _D) for part in ("q", "k", "v", "output")}
        mlp = {f"blk.{i}.ffn_gate": (_F, _D), f"blk.{i}.ffn_up": (_F, _D), f"blk.{i}.ffn_down": (_D, _F)}
        yield attention | mlp | {f"blk.{i}.attn_norm": (_D,), f"blk.{i}.ffn_norm": (_D,)}


_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _hf_name(name: str) -> str:
    *layer, last = name.removeprefix("blk.").split(".")
    return f"{'model.layers.' + layer[0] + '.' if layer else ''}{_HF_NAMES[last]}.weight"


def _write_safetensors(folder: Path, layers: int) -> list[Path]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": _V,
        "hidden_size": _D,
        "intermediate_size": _F,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    pool = _random(1 << 26).astype(ml_dtypes.bfloat16)
    weight_map: dict[str, str] = {}
    for index, shapes in enumerate(_shapes(layers)):
        file = f"model-{index:05}.safetensors"
        tensors = {_hf_name(name): np.resize(pool, shape) for name, shape in shapes.items()}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sorted(folder.glob("*.safetensors"))


def _write_gguf(path: Path, layers: int, name: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(_D)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(_F)
    writer.add_head_count(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"t{i}" for i in range(_V)])
    pools = {k: quantized(_random(_POOL_ROWS * k).reshape(-1, k), FORMATS[name]) for k in (_D, _F)}
    tensors: dict[tuple[int, ...], NDArray[Any]] = {}
    for shapes in _shapes(layers):
        for tensor, shape in shapes.items():
            if len(shape) == 1:
                writer.add_tensor(f"{tensor}.weight", np.ones(shape, np.float32))
                continue
            if shape not in tensors:
                tensors[shape] = np.resize(pools[shape[1]], (shape[0], pools[shape[1]].shape[1]))
            writer.add_tensor(f"{tensor}.weight", tensors[shape], raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _random(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(7).standard_normal(count, np.float32)


if __name__ == "__main__":
    sys.exit(main())
