"""Checks of tokenizers, names in the API, and the fingerprint."""

import copy
import os
from pathlib import Path

import jax
import pytest

from compiled.shapes import make_buckets
from serve.config.flags import parse_args
from serve.server.model_files import StartupError, api_name, check_tokenizer, resolve_max_logprobs
from serve.server.startup import load, system_fingerprint
from tests.server.test_bad_models import directory, write_tokenizer
from tests.support.http_client import END, byte_tokenizer
from tests.support.scoring import RecordingReporter
from tests.support.tiny import random_weights, tiny_configs, write_checkpoint


def fingerprint(*flags: str, kernels: tuple[str, ...] = ()) -> str:
    config = parse_args(flags)
    buckets = make_buckets(
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len or 4096,
        max_num_batched_tokens=config.batched_tokens,
        full_vocab=config.max_logprobs == -1,
    )
    return system_fingerprint(config, buckets, kernels)


def test_fingerprint_ignores_the_address() -> None:
    assert fingerprint("--dtype", "float32") == fingerprint(*("--dtype", "float32", "--port", "1", "--api-key", "k"))


def test_fingerprint_of_a_cache_dtype_that_auto_means() -> None:
    flags = ("--dtype", "float32", "--kv-cache-dtype")
    assert fingerprint(*flags, "float32") == fingerprint(*flags, "auto") != fingerprint(*flags, "bfloat16")


@pytest.mark.parametrize(
    "flags",
    [
        ("--dtype", "float32"),
        ("--quantization", "int8"),
        ("--kv-cache-dtype", "float32"),
        ("--max-num-seqs", "4"),
        ("--max-num-batched-tokens", "1024"),
        ("--max-model-len", "512"),
        ("--max-logprobs", "5"),
        ("--max-logprobs", "-1"),
        ("--no-enable-prefix-caching",),
        ("--grammar-fast-forward",),
    ],
    ids=" ".join,
)
def test_fingerprint_depends_on_options_of_the_model(flags: tuple[str, ...]) -> None:
    assert fingerprint(*flags) != fingerprint()


def test_fingerprint_depends_on_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint()
    monkeypatch.setattr("serve.server.startup.__version__", "0")
    assert fingerprint() != before


def test_fingerprint_names_the_kernels() -> None:
    assert "_xla_" in fingerprint()
    assert "_linear-attention_" in fingerprint(kernels=("linear", "attention"))


def test_load_makes_the_planned_cache(tmp_path: Path, compilation_cache: Path) -> None:
    words = "--dtype float32 --kv-cache-dtype bfloat16 --max-model-len 64 --max-num-seqs 1 --compilation-cache-dir"
    config = parse_args((str(directory(tmp_path / "tiny")), *words.split(), str(compilation_cache)))
    reporter = RecordingReporter()
    cache = load(config, reporter).runner._state.cache
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cache.layers)} == {"bfloat16"}
    assert cache.hidden.dtype == "float32"
    events = {event.name: event for event in reporter.events}
    assert events["memory_planned"].fields["cache"] == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert events["model_found"].fields["kv_cache_dtype"] == "bfloat16"
    assert "float32 with a bfloat16 cache" in events["model_found"].line


def test_latent_attention_is_not_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_configs()["deepseek2"]
    write_checkpoint(tmp_path, hf, random_weights(hf, 1))
    write_tokenizer(tmp_path, 40)
    monkeypatch.setattr("serve.server.startup._mesh", lambda _: None)  # this process has one device
    config = parse_args((str(tmp_path), "--tensor-parallel-size", "2", "--compilation-cache-dir", str(tmp_path)))
    with pytest.raises(StartupError, match="--tensor-parallel-size 2: multi-head latent attention is not sharded"):
        load(config, RecordingReporter())


@pytest.mark.parametrize("eos", [-1, 300])
def test_check_tokenizer_rejects_an_unknown_eos_id(eos: int) -> None:
    tokenizer = copy.copy(byte_tokenizer())
    check_tokenizer("m", tokenizer, tokenizer.vocab_size)
    tokenizer.eos_token_ids = frozenset({END, eos})
    with pytest.raises(StartupError, match=f"m: eos_token_id {eos} is outside the model's 300 tokens"):
        check_tokenizer("m", tokenizer, 300)


def test_check_tokenizer_rejects_a_larger_vocabulary() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(StartupError, match=f"m: the tokenizer has {tokenizer.vocab_size} tokens, the model 200"):
        check_tokenizer("m", tokenizer, 200)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/model", "org/model"),  # a hub id
        ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),  # the default model
        ("folder/model", "model"),
        ("folder/model/", "model"),
        ("folder/../folder/model/.", "model"),
        ("folder/a-q8_0.gguf", "a-q8_0.gguf"),
    ],
)
def test_api_name_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, name: str) -> None:
    (tmp_path / "folder" / "model").mkdir(parents=True)
    (tmp_path / "folder" / "a-q8_0.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert api_name(model) == name
    if os.path.exists(model):
        assert api_name(os.path.abspath(model)) == name


@pytest.mark.parametrize(("value", "expected"), [(-1, -1), (1024, 1024), (151_936, -1), (200_000, -1)])
def test_max_logprobs_of_vocabulary_size_is_full_vocabulary(value: int, expected: int) -> None:
    config = parse_args(["--max-logprobs", str(value)])
    assert resolve_max_logprobs(config, 151_936) == expected


def test_max_logprobs_between_limit_and_vocabulary_size_refused() -> None:
    config = parse_args(["--max-logprobs", "1025"])
    with pytest.raises(StartupError, match=r"--max-logprobs 1025: must be at most 1024, or -1 for .* 151936"):
        resolve_max_logprobs(config, 151_936)
