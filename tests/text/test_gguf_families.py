"""Each family's tokenizer, rebuilt from GGUF metadata as converters write it, against ids of the original.

`make_golden.py` says where they come from. The default model's tokenizer has its own test in `test_tokenizer.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from serve.text.detokenizer import Echo
from serve.text.gguf_keys import tokenizer_keys
from serve.text.gguf_tokenizer import NORMAL, UNKNOWN, UNUSED, USER_DEFINED, tokenizer_from_gguf

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden_families.json").read_text("utf-8"))
BYTE = 6
RUN = -1e9  # score of Llama 2's runs of spaces


def metadata_of(family: dict[str, Any]) -> dict[str, Any]:
    size = max(family["tokens"].values()) + 1
    tokens, types, scores = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size, [0.0] * size
    is_sentencepiece = family["model"] == "llama"
    for token, index in family["tokens"].items():
        is_byte = is_sentencepiece and token.startswith("<0x")
        kind = UNKNOWN if token == "<unk>" else family["types"].get(token, BYTE if is_byte else NORMAL)
        tokens[index] = token.replace("▁", " ") if kind == USER_DEFINED else token
        types[index], scores[index] = kind, -float(index) if token.strip("▁") else RUN
    keys = {
        "tokenizer.ggml.model": family["model"],
        "tokenizer.ggml.pre": family["pre"] or "default",
        "tokenizer.ggml.bos_token_id": family["tokens"].get("<s>"),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.merges": family["merges"],
        "tokenizer.ggml.unknown_token_id": family["tokens"].get("<unk>"),
        "tokenizer.ggml.add_space_prefix": "<bos>" not in family["tokens"],  # Gemma has none
        "general.architecture": family["architecture"],
    }
    return {name: value for name, value in keys.items() if value is not None}


@pytest.mark.parametrize("name", GOLDEN)
def test_token_ids_equal_the_original(name: str) -> None:
    family = GOLDEN[name]
    tokenizer = tokenizer_from_gguf(metadata_of(family))
    encoded = {text: tokenizer.encode(text, add_special_tokens=False) for text in family["texts"]}
    assert encoded == family["texts"]


@pytest.mark.parametrize("name", GOLDEN)
def test_keys_of_a_tokenizer_give_the_same_ids(name: str) -> None:
    family = GOLDEN[name]
    metadata = metadata_of(family)
    keys = tokenizer_keys(tokenizer_from_gguf(metadata), len(metadata["tokenizer.ggml.tokens"]) + 3)
    assert keys["tokenizer.ggml.tokens"][-1] == f"[PAD{len(keys['tokenizer.ggml.tokens']) - 1}]"
    others = ("tokenizer.ggml.pre", "tokenizer.ggml.add_space_prefix", "general.architecture")
    tokenizer = tokenizer_from_gguf(keys | {name: metadata[name] for name in others})
    assert {text: tokenizer.encode(text, add_special_tokens=False) for text in family["texts"]} == family["texts"]


def test_offsets_of_a_text_with_special_tokens() -> None:
    tokenizer = tokenizer_from_gguf(metadata_of(GOLDEN["llama2"]))
    assert tokenizer.tokenize("<s>Hello world", add_special_tokens=True) == ([1, 1, 15043, 3186], [0, 0, 3, 8])
    assert tokenizer.tokenize("  Hello", add_special_tokens=False)[1] == [0, 1]  # the second mark is the second space


def test_an_echo_of_ids_has_no_space_before_its_first_word() -> None:
    tokenizer = tokenizer_from_gguf(metadata_of(GOLDEN["llama2"]))
    assert Echo.decode(tokenizer, [15043, 3186]) == Echo("Hello world", [0, 5])
    assert Echo.decode(tokenizer, [1, 15043]) == Echo("<s> Hello", [0, 3])
    gemma = tokenizer_from_gguf(metadata_of(GOLDEN["gemma3"]))
    there = gemma.encode(" there", add_special_tokens=False)
    assert Echo.decode(gemma, there) == Echo(" there", [0])


@pytest.mark.parametrize(
    ("architecture", "name", "strips"),
    [
        ("phi3", "NuExtract", True),  # a fine-tuned model
        ("llama", "Phi-3-mini-4k-instruct", True),
        ("llama", "Phi 3.5 Mini Instruct", True),
        ("llama", "Llama 3", False),
        ("llama", None, False),
    ],
)
def test_added_tokens_of_phi_3_strip_white_space(architecture: str, name: str | None, strips: bool) -> None:
    names = {"general.architecture": architecture, "general.name": name}
    tokenizer = tokenizer_from_gguf(metadata_of(GOLDEN["phi3"]) | names)
    text = "<|user|>\nHello<|end|>\n<|assistant|>\n"
    right = [32010, 15043, 32007, 32001]
    assert (tokenizer.encode(text, add_special_tokens=False) == right) is strips


def test_chat_of_mistral_v3_has_one_space_after_special_tokens() -> None:
    tokenizer = tokenizer_from_gguf(metadata_of(GOLDEN["mistral_v3"]))
    text = "<s>[INST] Hi[/INST] there</s>"
    assert tokenizer.tokenize(text, add_special_tokens=False) == ([1, 3, 16127, 4, 1504, 2], [0, 3, 9, 12, 19, 25])
    assert tokenizer.decode([16127, 1504], skip_special_tokens=False) == "Hi there"
