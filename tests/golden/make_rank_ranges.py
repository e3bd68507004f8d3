# mypy: disable-error-code="import-not-found"
"""Remakes rank_ranges.json: how far each golden rank may move when logits closer than TIE count as equal.

    python -m tests.golden.make_rank_ranges MODEL.gguf HF_DIRECTORY

from the repository's root, with torch, transformers and gguf installed; the models are those whose sha256 the golden
files name. Those files tell only five alternatives of a token, so its neighbours in rank are computed again. Deep in
the vocabulary they matter: torch itself, summing in another order, gives a token of rank 4459 rank 4458.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).parent
TIE = 1e-3  # nats
ROUNDING = 5e-5  # of the golden log-probs: float32 sums in another order, and six decimals


def main() -> None:
    """Writes {golden file's stem: [prompt: [token from the second on: [lowest rank, highest rank]]]}."""
    gguf, folder = Path(sys.argv[1]), sys.argv[2]
    models = {
        "smollm2-q4_1-gguf-f32": {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name},
        "smollm2-prompt-logprobs": {"pretrained_model_name_or_path": folder},
    }
    ranges = {}
    for name, where in models.items():
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="eager").eval()
        prompts = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))["prompts"]
        with torch.no_grad():
            ranges[name] = [ranges_of(model, prompt) for prompt in prompts]
    (FOLDER / "rank_ranges.json").write_text(json.dumps(ranges, separators=(",", ":")) + "\n")


def ranges_of(model: Any, prompt: dict[str, Any]) -> list[list[int]]:
    ids = torch.tensor(prompt["prompt_token_ids"])
    logits = model(ids[None]).logits[0, :-1]
    own = logits.gather(1, ids[1:, None])
    logprobs = torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0].tolist()
    lowest = 1 + (logits > own + TIE).sum(1)
    highest = (logits >= own - TIE).sum(1)  # itself included
    ranges: list[list[int]] = torch.stack([lowest, highest], 1).tolist()
    for golden, logprob, (low, high) in zip(prompt["prompt_logprobs"][1:], logprobs, ranges, strict=True):
        if abs(golden["logprob"] - logprob) > ROUNDING or not low <= golden["rank"] <= high:
            raise ValueError(f"not the golden model: {golden} is {logprob}, rank {low} to {high}, here")
    return ranges


if __name__ == "__main__":
    main()
