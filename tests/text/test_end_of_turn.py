"""Ids that end a turn: the union of all sources, and tokens by their names."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from serve.config.flags import parse_args
from serve.server.model_files import open_model
from serve.text.end_of_turn import end_of_turn_ids
from serve.text.gguf_tokenizer import tokenizer_from_gguf
from serve.text.tokenizer import byte_characters, load_tokenizer
from tests.support.tiny_checkpoints import TinyModel

_CONFIGS = Path(__file__).parents[1] / "model" / "golden" / "configs.json"
EOS: list[dict[str, Any]] = json.loads(_CONFIGS.read_text("utf-8"))["eos"]
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def folder_of(folder: Path, special: list[str], ordinary: Sequence[str] = (), *, size: int = 256, **files: Any) -> Path:
    """A folder with a tokenizer of `size` bytes and these added tokens, of which the last special one is its EOS."""
    folder.mkdir(exist_ok=True)
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(byte_characters()[:size])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([*(AddedToken(token, special=True) for token in special), *map(AddedToken, ordinary)])
    backend.save(str(folder / "tokenizer.json"))
    files["tokenizer_config"] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[-1]}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def gguf(tokens: dict[str, int], **keys: int) -> dict[str, Any]:
    """Metadata of a vocabulary of bytes and these tokens with their types."""
    metadata = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": [*byte_characters(), *tokens, "!!"],
        "token_type": [*[NORMAL] * 256, *tokens.values(), NORMAL],
        "merges": ["! !"],
        "add_bos_token": False,
        **{f"{name}_token_id": index for name, index in keys.items()},
    }
    return {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}


def test_eos_ids_are_the_union_of_config_generation_config_and_tokenizer(tmp_path: Path) -> None:
    for case in EOS:
        files = {"config": case["config"], "generation_config": case["generation"]}
        tokenizer = load_tokenizer(folder_of(tmp_path, ["<end>"], **files))
        assert tokenizer.eos_token_ids == {*case["ids"][0], *case["ids"][1], 256}, case


def test_smollm2_with_another_eos_in_both_files_ends_at_its_end_of_turn(tmp_path: Path) -> None:
    other = {"eos_token_id": 0}
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = load_tokenizer(folder_of(tmp_path, tokens, size=0, config=other, generation_config=other))
    assert tokenizer.eos_token_ids == {0, 2}


def test_gguf_of_llama3_without_an_eot_id_ends_at_its_end_of_turn() -> None:
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
    tokenizer = tokenizer_from_gguf(gguf(dict.fromkeys(names, CONTROL), bos=256, eos=257))
    assert tokenizer.eos_token_ids == {257, 258, 259}


def test_gguf_ids_of_eos_eot_and_eom_end_a_turn_whatever_their_names() -> None:
    tokens = dict.fromkeys(("<a>", "<b>", "<c>", "<d>"), CONTROL)
    assert tokenizer_from_gguf(gguf(tokens, eos=256, eot=257, eom=259)).eos_token_ids == {256, 257, 259}


def test_gguf_ends_of_turns_are_control_tokens_whatever_their_type() -> None:
    tokens = {"<end_of_turn>": NORMAL, "<|im_end|>": USER_DEFINED, "</s>": USER_DEFINED, "<b>": USER_DEFINED}
    tokenizer = tokenizer_from_gguf(gguf(tokens))
    assert tokenizer.eos_token_ids == {256, 257}
    ids = tokenizer.encode("a<end_of_turn></s>", add_special_tokens=False)
    assert ids == [ord("a"), 256, 258]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a</s>"  # HTML


def test_ordinary_tokens_of_a_folder_end_nothing(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path, ["<end>"], ["</s>", "<|im_end|>"]))
    assert tokenizer.eos_token_ids == {256}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("<|start|> <|end|>", "<|end|>"),
        ("<|return|> <|call|> <|end|>", "<|return|> <|call|>"),  # OpenAI's harmony
        ("<|flush|> <|calls|> <|end|>", "<|flush|> <|calls|>"),
        ("<|call|> <|end|>", "<|call|> <|end|>"),
        ("</s> <eos> <turn|> <|tool_response>", "<eos> <turn|> <|tool_response>"),
        ("<unk> <s> </s> <pad>", "</s>"),
        ("<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    ],
)
def test_end_of_turn_ids_of_known_vocabularies(names: str, expected: str) -> None:
    special = {name: index for index, name in enumerate(names.split())}
    assert end_of_turn_ids(special) == {special[name] for name in expected.split()}


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_ids_of_the_model_count_beside_those_of_another_tokenizer(tmp_path: Path, kind: str) -> None:
    other = folder_of(tmp_path / "tokenizer", ["<end>"], size=8, config={"eos_token_id": 5})
    generation = tmp_path / "other.json"
    generation.write_text('{"eos_token_id": 6}')
    model = TinyModel().write_hf(tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    if kind == "gguf":
        model = TinyModel().write_gguf(tmp_path / "model.gguf", ids={"eos": 3, "eom": 4})
    flags = [str(model), "--tokenizer", str(other), "--generation-config", str(generation)]
    with open_model(parse_args(flags), print) as files:
        assert files.tokenizer.eos_token_ids == {3, 4, 5, 6, 8}
