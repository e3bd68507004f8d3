"""`logprobd quantize`: from a folder and from a file, with and without texts, and errors that leave no file."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from model.weights.gguf import GgufCheckpoint
from model.weights.gguf_writer import TYPES
from serve.cli import quantize
from serve.cli.main import main
from serve.text.gguf_tokenizer import tokenizer_from_gguf
from tests.support.http_client import VOCAB_SIZE, byte_tokenizer
from tests.support.scoring import write_lines
from tests.support.tiny import random_weights, tiny_configs, write_checkpoint

CONFIG = tiny_configs()["llama_tied"] | {"vocab_size": VOCAB_SIZE + 4, "hidden_size": 64, "intermediate_size": 256}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model with the byte tokenizer."""
    folder = tmp_path / "Tiny-1B"
    folder.mkdir()
    config = CONFIG | {"head_dim": 16, "num_attention_heads": 4}
    write_checkpoint(folder, config, random_weights(config, 1))
    tokenizer = byte_tokenizer(add_bos=True, pre="qwen2")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.state()), "utf-8")
    special = {"bos_token": "<begin>", "eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(special | {"chat_template": tokenizer.chat_template}), "utf-8"
    )
    return folder


def test_types_of_the_command_are_those_of_the_writer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    assert f"--type {'|'.join(TYPES)}" in capsys.readouterr().out


def test_a_folder_with_its_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_lines(tmp_path / "texts.jsonl", ["Hello, world!", {"text": "1 2 3"}])
    plain, weighted, again = (tmp_path / f"{name}.gguf" for name in ("plain", "weighted", "again"))
    assert main(["quantize", str(folder), str(plain), "--type", "q4_k"]) == 0
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{plain}: ")
    assert line.endswith("tensors: 11 Q5_0, 5 F32, 2 Q8_0, 1 Q4_K, 1 Q6_K")
    assert main(["quantize", "--type=q4_k", str(folder), str(weighted), "--importance-texts", str(texts)]) == 0
    assert main(["quantize", str(weighted), str(again), "--type", "q8_0"]) == 0
    with closing(GgufCheckpoint(weighted)) as checkpoint:
        tokenizer, expected = tokenizer_from_gguf(checkpoint.metadata), byte_tokenizer(add_bos=True, pre="qwen2")
        text = "<begin>naïve 123\n\n\\xff<end>"
        for flag in (False, True):
            assert tokenizer.encode(text, add_special_tokens=flag) == expected.encode(text, add_special_tokens=flag)
        assert tokenizer.special_tokens == {"bos_token": "<begin>", "eos_token": "<end>"}
        assert tokenizer.chat_template == expected.chat_template
        assert checkpoint.metadata["general.name"] == "Tiny-1B"
        metadata = checkpoint.metadata
    with closing(GgufCheckpoint(again)) as checkpoint:
        assert checkpoint.metadata == metadata | {"general.file_type": 7}
    rows = [GGUFReader(path).get_tensor(0).data for path in (plain, weighted)]
    assert not np.array_equal(*rows)  # the texts matter


def test_errors_leave_no_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, texts = tmp_path / "m.gguf", tmp_path / "texts.jsonl"
    texts.write_text("\n", "utf-8")
    (tmp_path / "there.gguf").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    cases = (
        ([str(tmp_path / "empty"), str(output)], "contains no config.json"),
        ([str(folder), str(tmp_path / "there.gguf")], "there.gguf: exists; use --overwrite"),
        ([str(folder), str(output), "--importance-texts", str(texts)], "texts.jsonl: has no texts"),
        ([str(folder), str(tmp_path / "nowhere" / "m.gguf")], "No such file or directory"),
    )
    for words, message in cases:
        assert main(["quantize", *words, "--type", "q8_0"]) == 1
        assert message in capsys.readouterr().err
        assert not [*tmp_path.glob("*.partial")]
    monkeypatch.setattr("model.weights.gguf_writer.quantize", interrupt)
    assert main(["quantize", str(folder), str(output), "--type", "q8_0"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not [*tmp_path.glob("m.gguf*")]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_tokenizer_without_a_known_pre_tokenizer_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantize, "_PRE_TOKENIZERS", ("smollm", "gpt-2"))
    assert main(["quantize", str(folder), str(tmp_path / "m.gguf"), "--type", "q8_0"]) == 1
    assert "no tokenizer of GGUF files gives the ids of its tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "o.gguf"], "the following arguments are required: --type"),
        (["m", "o.bin", "--type", "q8_0"], "argument --output: o.bin does not end in .gguf"),
        (["m", "o.gguf", "--type", "q4"], "did you mean"),
        (["m", "o.gguf", "--type", "q8_0", "--limit", "3"], "argument --limit: requires --importance-texts"),
    ],
)
def test_mistakes_in_the_flags(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", *words])
    assert message in capsys.readouterr().err
