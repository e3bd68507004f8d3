"""Log-probs of each family's tiny GGUF file in float32 against those of llama.cpp.

    python -m tools.accuracy.llama_cpp LLAMA_SERVER [CASE ...]

LLAMA_SERVER is the path of the program `llama-server`. It has float32 caches and no flash attention here, as its other
forms round. Gemma differs by about 1e-3, since llama.cpp computes GELU from a table of float16.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from model.weights.source import ModelSource
from model.weights.weight_table import open_checkpoint
from serve.llm import LLM
from tests.model.test_family_gguf import CASES, expressible, write_gguf
from tests.support.tiny import random_weights, write_checkpoint

_TOKENS = 40
_LENGTH = 128  # of the context: both choose the angles of `longrope` by it
_PORT = 8991
_START_SECONDS = 30
# What llama.cpp assumes or ignores, in place of what the case has.
_CHANGES: dict[str, dict[str, Any]] = {
    "exaone4": {"num_hidden_layers": 64, "layer_types": None, "sliding_window_pattern": 4},  # the only one with windows
    "gpt_oss": {"rope_scaling": None},  # YaRN's `truncate` is not in the file
    "olmoe": {"num_key_value_heads": 6},  # as many as heads
    "phi3": {"sliding_window": None},
}


def write_twin(folder: Path, case: str) -> Path:
    """The GGUF file of a case, with a tokenizer."""
    hf = expressible(case) | _CHANGES.get(case, {})
    weights = random_weights(hf, 1)
    write_checkpoint(folder, hf, weights)
    with closing(open_checkpoint(ModelSource("hf", folder))) as checkpoint:
        config = checkpoint.config
    tokens = [f"w{i}" for i in range(config.vocab_size - 3)]
    return write_gguf(folder / "model.gguf", hf, weights, config, tokens=[*tokens, "a", "b", "ab"])


@contextmanager
def llama_server(program: str, model: Path) -> Iterator[httpx2.Client]:
    """A client of a running llama-server."""
    options = f"-c {_LENGTH} -np 1 -t 2 -fa off -ctk f32 -ctv f32 --no-warmup --host 127.0.0.1 --port {_PORT}"
    process = subprocess.Popen(
        [program, "-m", str(model), *options.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{_PORT}", timeout=60) as client:
            _wait(process, client)
            yield client
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen[bytes], client: httpx2.Client) -> None:
    for _ in range(_START_SECONDS * 10):
        if process.poll() is not None:
            raise SystemExit(f"llama-server ended with exit code {process.returncode}")
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx2.ConnectError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"llama-server did not start in {_START_SECONDS} s")


def their_logprobs(client: httpx2.Client, ids: Sequence[int], vocab_size: int) -> list[float]:
    """Log-probs of all tokens but the first, each from a request of its own."""
    logprobs = []
    for end in range(1, len(ids)):
        body = {"prompt": ids[:end], "n_predict": 1, "n_probs": vocab_size, "temperature": 0, "cache_prompt": False}
        (row,) = client.post("/completion", json=body).raise_for_status().json()["completion_probabilities"]
        logprobs.append(next(item["logprob"] for item in row["top_logprobs"] if item["id"] == ids[end]))
    return logprobs


def our_logprobs(model: Path, ids: list[int]) -> list[float]:
    """Log-probs of all tokens but the first."""
    with LLM(str(model), dtype="float32", max_model_len=_LENGTH, max_num_seqs=1) as llm:
        return [float(value) for value in llm.score([ids])[0].logprobs[1:]]


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(prog="python -m tools.accuracy.llama_cpp", description=__doc__.partition("\n")[0])
    parser.add_argument("program", metavar="LLAMA_SERVER")
    parser.add_argument("case", nargs="*", default=CASES)
    options = parser.parse_args()
    print(f"{'case':16}{'mean':>9}{'max':>9}")
    for case in options.case:
        with tempfile.TemporaryDirectory() as folder:
            model = write_twin(Path(folder), case)
            size = expressible(case)["vocab_size"]
            ids = np.random.default_rng(0).integers(0, size, _TOKENS).tolist()
            with llama_server(options.program, model) as client:
                theirs = their_logprobs(client, ids, size)
            errors = np.abs(np.array(our_logprobs(model, ids)) - theirs)
        print(f"{case:16}{errors.mean():9.1e}{errors.max():9.1e}", flush=True)


if __name__ == "__main__":
    main()
