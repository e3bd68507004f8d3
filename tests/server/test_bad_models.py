"""Damaged and unsupported model files: one line of error and exit code 1, before anything is loaded or compiled."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.support.server_process import ROOT
from tests.support.tiny import random_weights, tiny_configs, write_checkpoint
from tests.support.tiny_checkpoints import VOCAB, TinyModel

# Runs `logprobd serve` once for each argument list, in one process: importing takes most of the time.
RUNS = """
import contextlib, io, json, sys
from serve.cli.main import main
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as error:
        code = main(arguments)
    print(json.dumps([code, error.getvalue()]))
"""


def directory(folder: Path, **config: Any) -> Path:
    """A tiny model with a tokenizer, with values of its config.json replaced by `config`."""
    TinyModel().write_hf(folder)
    changed = TinyModel().hf_config() | config
    values = {name: value for name, value in changed.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    write_tokenizer(folder, VOCAB)
    return folder


def write_tokenizer(folder: Path, size: int, template: str | None = None) -> None:
    letters = [*map(chr, range(97, 123)), *map(chr, range(65, 91))]
    tokenizer = Tokenizer(models.BPE(vocab={letters[i]: i for i in range(size)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | (
        {} if template is None else {"chat_template": template}
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def truncated(folder: Path) -> Path:
    file = directory(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


def truncated_header(folder: Path) -> Path:
    file = directory(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    return folder


def other_tokenizer(folder: Path) -> Path:
    write_tokenizer(directory(folder), VOCAB + 2)
    return folder


def templated(template: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_tokenizer(directory(folder), VOCAB, template)
        return folder

    return make


def gguf(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        folder.mkdir()
        (folder / "a.gguf").write_bytes(content)
        return folder / "a.gguf"

    return make


def changed(**config: Any) -> Callable[[Path], Path]:
    return lambda folder: directory(folder, **config)


def pickled(folder: Path) -> Path:
    directory(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def with_code(folder: Path) -> Path:
    """A directory that refers to its own code, as with trust_remote_code."""
    directory(folder, auto_map={"AutoModelForCausalLM": "evil.Model"}, architectures=["EvilForCausalLM"])
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()")
    return folder


def with_file(name: str, text: str) -> Callable[[Path], Path]:
    """Return a function that makes a model with another file."""

    def make(folder: Path) -> Path:
        directory(folder)
        (folder / name).write_text(text)
        return folder

    return make


def damaged_experts(folder: Path) -> Path:
    """A mixture of experts without one matrix, whose router has a row too few."""
    folder.mkdir()
    config = tiny_configs()["mixtral"] | {"vocab_size": VOCAB}
    weights = random_weights(config, seed=1)
    block = "model.layers.1.block_sparse_moe"
    del weights[f"{block}.experts.2.w1.weight"]
    weights[f"{block}.gate.weight"] = weights[f"{block}.gate.weight"][1:]
    write_checkpoint(folder, config, weights)
    write_tokenizer(folder, VOCAB)
    return folder


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated safetensors": (truncated, "model.safetensors: not a complete safetensors file"),
    "truncated header": (truncated_header, "model.safetensors: not a complete safetensors file"),
    "wrong magic": (gguf(b"GGML" + bytes(60)), "a.gguf: not a GGUF file"),
    "impossible tensor count": (gguf(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0)), "a.gguf: truncated"),
    "impossible value count": (gguf(b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60)), "a.gguf: truncated"),
    "missing size": (changed(hidden_size=None), "config.json: hidden_size is missing"),
    "missing layers": (changed(num_hidden_layers=None), "config.json: num_hidden_layers is missing"),
    "contradictory heads": (changed(num_key_value_heads=3), "is not a multiple of num_kv_heads 3"),
    "contradictory sizes": (
        changed(intermediate_size=97),
        "mlp.gate_proj.weight: has shape [96, 64], must be [97, 64]",
    ),
    "more layers than weights": (changed(num_hidden_layers=3), "model.layers.2.input_layernorm.weight: missing"),
    "absurd layers": (changed(num_hidden_layers=10**6), "num_hidden_layers must be from 1 to 1000"),
    "unknown architecture": (
        changed(architectures=["MambaForCausalLM"]),
        "architecture ['MambaForCausalLM'] is not known; known: ApertusForCausalLM, ",
    ),
    "decision model": (changed(architectures=["JevForDecision"], model_type="jev"), "architecture ['JevForDecision']"),
    "decision model without architecture": (
        changed(architectures=None, model_type="jev"),
        "model_type 'jev' is not known",
    ),
    "decision template for several questions": (
        with_file("decision_template.jinja", "{{ state }}{{ questions }}"),
        "decision_template.jinja: the variable `questions` is not supported",
    ),
    "decision head": (
        with_file("judge_config.json", "{}"),
        "judge_config.json: decision heads that read hidden states",
    ),
    "decision adapter": (
        with_file("decision.json", '{"adapter": "lora"}'),
        "decision.json: `adapter`: adapters are not",
    ),
    "another model's tokenizer": (other_tokenizer, f"the tokenizer has {VOCAB + 2} tokens, the model {VOCAB}"),
    "template that raises": (
        templated("{{ raise_exception('Only systems may speak.') }}"),
        "the chat template fails: Only systems may speak.",
    ),
    "invalid template": (templated("{% for m in messages %}"), "the chat template fails: "),
    "pickled weights": (pickled, "contains no *.safetensors and no .gguf file; pickled weights are not supported"),
    "missing expert": (damaged_experts, "block_sparse_moe.experts.2.w1.weight: missing"),
    "router of another width": (damaged_experts, "block_sparse_moe.gate.weight: has shape ["),
    "short list of layers": (changed(layer_types=["full_attention"]), "layer_types must be 2"),
    "own code": (with_code, "architecture ['EvilForCausalLM'] is not known"),
}


def test_damaged_models_end_with_a_message(tmp_path: Path) -> None:
    models_ = {name: make(tmp_path / f"{i}") for i, (name, (make, _)) in enumerate(CASES.items())}
    options = ["--port", "0", "--compilation-cache-dir", str(tmp_path / "xla")]
    arguments = json.dumps([[str(path), *options] for path in models_.values()])
    run = subprocess.run(
        [sys.executable, "-c", RUNS, arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    outcomes = dict(zip(CASES, map(json.loads, run.stdout.splitlines()), strict=True))
    for name, (code, error) in outcomes.items():
        assert code == 1, (name, error)
        assert CASES[name][1] in error, (name, error)
        assert any(line.startswith("error: ") for line in error.splitlines()), (name, error)
        assert "Traceback" not in error
    assert not list(tmp_path.glob("**/ran"))  # nothing of a model directory was executed


@pytest.mark.slow
def test_model_whose_logprobs_are_nan_is_not_served(tmp_path: Path) -> None:
    model = TinyModel()
    model.tensors["model.norm.weight"][:] = 3e38  # finite; the logits overflow
    folder = directory(tmp_path / "model")
    model.write_hf(folder)
    flags = ["--max-num-seqs", "1", "--max-num-batched-tokens", "17", "--max-model-len", "64", "--port", "0"]
    arguments = json.dumps([[str(folder), *flags, "--compilation-cache-dir", str(tmp_path / "xla")]])
    run = subprocess.run([sys.executable, "-c", RUNS, arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    code, error = json.loads(run.stdout)
    assert code == 1
    assert error.splitlines()[-1] == (
        "error: model: the self-test failed: the engine failed: "
        "the model computed a log-probability that is not a number"
    )


def test_valid_model_passes_all_checks(tmp_path: Path) -> None:
    """The cases above do not fail for a common reason: a valid model gets as far as an impossible flag."""
    path = templated("{% for m in messages %}{{ m.content }}{% endfor %}")(tmp_path / "good")
    bare, flags = directory(tmp_path / "bare"), ["--kv-cache-memory", "1"]
    arguments = json.dumps([[str(path), "--port", "0", *flags], ["chat", "--model", str(bare), *flags]])
    run = subprocess.run([sys.executable, "-c", RUNS, arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    (code, error), (chat_code, chat_error) = map(json.loads, run.stdout.splitlines())
    last = error.splitlines()[-1]
    assert (code, last.startswith(f"error: {path}: --kv-cache-memory: 1 bytes are too few")) == (1, True), error
    # A chat needs a template, which is checked before that flag.
    assert (chat_code, chat_error.splitlines()[-1]) == (
        1,
        f"error: {bare} has no chat template: give one with --chat-template",
    )
