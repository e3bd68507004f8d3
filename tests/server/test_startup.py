"""What start-up decides without a model: the pages of the cache and the fingerprint."""

import copy

import pytest

from compiled.shapes import make_buckets
from serve.config.flags import parse_args
from serve.config.sizes import MemoryAmount
from serve.server.memory import pages_in
from serve.server.startup import StartupError, check_tokenizer, system_fingerprint
from tests.support.http_client import END, byte_tokenizer


def fingerprint(*flags: str, kernels: tuple[str, ...] = ()) -> str:
    config = parse_args(flags)
    buckets = make_buckets(
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len or 4096,
        max_num_batched_tokens=config.batched_tokens,
        whole_vocabulary=config.max_logprobs == -1,
    )
    return system_fingerprint(config, buckets, kernels)


def test_pages_are_what_the_amount_holds_whole() -> None:
    assert pages_in(MemoryAmount(1000), free=None, page_bytes=300) == 3
    assert pages_in(MemoryAmount(0.5), free=1000, page_bytes=250) == 2


def test_an_amount_below_one_page_beside_the_null_page_says_the_numbers() -> None:
    assert pages_in(MemoryAmount(2000), free=None, page_bytes=1000) == 2
    with pytest.raises(ValueError, match=r"1,999 bytes hold no page: one takes 1,000 bytes"):
        pages_in(MemoryAmount(1999), free=None, page_bytes=1000)


def test_a_share_of_an_unknown_amount_asks_for_bytes() -> None:
    with pytest.raises(ValueError, match="give bytes"):
        pages_in(MemoryAmount(0.5), free=None, page_bytes=1)


def test_the_same_options_have_the_same_fingerprint_wherever_the_server_listens() -> None:
    assert fingerprint("--dtype", "float32") == fingerprint(*("--dtype", "float32", "--port", "1", "--api-key", "k"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--dtype", "float32"),
        ("--quantization", "int8"),
        ("--max-num-seqs", "4"),
        ("--max-num-batched-tokens", "1024"),
        ("--max-model-len", "512"),
        ("--max-logprobs", "5"),
        ("--max-logprobs", "-1"),
        ("--no-enable-prefix-caching",),
    ],
    ids=" ".join,
)
def test_what_changes_shapes_changes_the_fingerprint(flags: tuple[str, ...]) -> None:
    assert fingerprint(*flags) != fingerprint()


def test_the_fingerprint_names_the_kernels() -> None:
    assert "_xla_" in fingerprint()
    assert "_linear-attention_" in fingerprint(kernels=("linear", "attention"))


@pytest.mark.parametrize("eos", [-1, 300])
def test_an_eos_id_that_the_model_lacks_is_refused(eos: int) -> None:
    tokenizer = copy.copy(byte_tokenizer())
    check_tokenizer("m", tokenizer, tokenizer.vocab_size)
    tokenizer.eos_token_ids = frozenset({END, eos})
    with pytest.raises(StartupError, match=f"m: eos_token_id {eos} is none of the model's 300 tokens"):
        check_tokenizer("m", tokenizer, 300)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(StartupError, match=f"m: the tokenizer has {tokenizer.vocab_size} tokens, the model 200"):
        check_tokenizer("m", tokenizer, 200)
