"""Tokenizers from hand-made GGUF metadata: each pre-tokenizer, token types, SentencePiece scores, errors."""

import math
from typing import Any

import pytest
from gguf.constants import Keys

from serve.text.gguf_tokenizer import gguf_eos_token_ids, tokenizer_from_gguf
from serve.text.tokenizer import Tokenizer, TokenizerError, byte_characters

BYTES = byte_characters()
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def byte_level(pre: str | None, merges: list[str], extra: dict[str, int] | None = None, **keys: Any) -> dict[str, Any]:
    """Metadata of a vocabulary of the 256 bytes, what `merges` make, and `extra` tokens with their types."""
    words = ["".join(merge.split()) for merge in merges]
    extra = extra or {}
    metadata = {
        "model": "gpt2",
        "tokens": [*BYTES, *words, *extra],
        "token_type": [NORMAL] * (256 + len(words)) + list(extra.values()),
        "merges": merges,
        **({} if pre is None else {"pre": pre}),
        **keys,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_text(index) for index in tokenizer.encode(text, add_special_tokens=True)]


def test_byte_characters_are_a_bijection_that_keeps_ascii() -> None:
    assert len(set(BYTES)) == 256
    assert BYTES[ord("A")] == "A"
    assert (BYTES[0], BYTES[ord(" ")], BYTES[ord("\n")], BYTES[0xAD]) == ("Ā", "Ġ", "Ċ", "Ń")


# The merge of 1 and 2 can only happen where the digits are one word; that of "x" and a digit in none of them.
@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "12 ab", ["1", "2", " a", "b"]),
        ("smollm", " 12", [" ", "1", "2"]),
        ("gpt-2", "1212 ab", ["12", "12", " a", "b"]),
        ("default", "1212", ["12", "12"]),
        ("qwen2", "1212 ab", ["1", "2", "1", "2", " a", "b"]),
        ("llama-bpe", "1212 ab", ["12", "1", "2", " a", "b"]),
        # Llama's and Qwen's patterns take contractions in capitals, GPT-2's does not: there S goes with what follows.
        ("gpt-2", "'St", ["'", "St"]),
        ("smollm", "'St", ["'", "St"]),
        ("qwen2", "'St", ["'S", "t"]),
        ("llama-bpe", "'St", ["'S", "t"]),
        # gpt-oss's takes a contraction as the end of a word, and starts one at a capital after a small letter.
        ("gpt-4o", "1212 ab", ["12", "1", "2", " a", "b"]),
        ("gpt-4o", "'St", ["'", "St"]),
        ("gpt-4o", "bS", ["b", "S"]),
        ("llama-bpe", "bS", ["bS"]),
    ],
)
def test_pre_tokenizer_splits_words_as_the_file_specifies(pre: str, text: str, expected: list[str]) -> None:
    tokenizer = tokenizer_from_gguf(byte_level(pre, ["1 2", "Ġ a", "S t", "' S", "Ġ 1", "b S"], add_bos_token=False))
    assert pieces(tokenizer, text) == expected


@pytest.mark.parametrize(("pre", "expected"), [("qwen2", "é"), ("llama-bpe", "e\u0301")])
def test_pre_tokenizer_normalizes_for_qwen2_only(pre: str, expected: str) -> None:
    tokenizer = tokenizer_from_gguf(byte_level(pre, ["a b"], add_bos_token=False))
    ids = tokenizer.encode("e\u0301", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", ["abc"]), ("gpt-2", ["ab", "c"])])
def test_pre_tokenizer_ignores_merges_for_llama_only(pre: str, expected: list[str]) -> None:
    tokenizer = tokenizer_from_gguf(byte_level(pre, ["a b"], {"abc": NORMAL}, add_bos_token=False))
    assert pieces(tokenizer, "abc") == expected


def test_token_types_control_matching_and_skipping() -> None:
    extra = {"<end>": CONTROL, "<tool>": USER_DEFINED, "[PAD259]": UNUSED}
    tokenizer = tokenizer_from_gguf(byte_level("gpt-2", ["a b"], extra, eos_token_id=257, eot_token_id=258))
    ids = tokenizer.encode("ab<end><tool>[", add_special_tokens=True)
    assert ids == [256, 257, 258, ord("[")]
    assert [tokenizer.is_special(index) for index in ids] == [False, True, False, False]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<tool>["
    assert tokenizer.token_bytes(259) == b""
    assert tokenizer.eos_token_ids == {257, 258}
    assert tokenizer.special_tokens["eos_token"] == "<end>"


@pytest.mark.parametrize(
    ("pre", "keys", "around"),
    [
        ("gpt-2", {}, ([], [])),
        ("gpt-2", {"add_bos_token": True}, (["<s:0>"], [])),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, (["<s:0>"], ["<end>"])),
        ("llama-bpe", {}, (["<s:0>"], [])),
        ("llama-bpe", {"add_bos_token": False}, ([], [])),
    ],
)
def test_encode_adds_bos_and_eos_as_the_file_specifies(
    pre: str, keys: dict[str, bool], around: tuple[list[str], list[str]]
) -> None:
    extra = {"<s:0>": CONTROL, "<end>": CONTROL}
    tokenizer = tokenizer_from_gguf(byte_level(pre, ["a b"], extra, bos_token_id=257, eos_token_id=258, **keys))
    assert pieces(tokenizer, "ab") == [*around[0], "ab", *around[1]]
    assert tokenizer.encode("ab", add_special_tokens=False) == [256]


@pytest.mark.parametrize("name", ["padding", "unknown"])
def test_wrong_id_of_an_unused_token_is_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_from_gguf(byte_level("gpt-2", ["a b"]) | {f"tokenizer.ggml.{name}_token_id": 257})
    assert pieces(tokenizer, "ab") == ["ab"]
    assert not tokenizer.special_tokens
    assert f"tokenizer.ggml.{name}_token_id 257 is not below 257; the key is ignored" in caplog.text


def sentencepiece(**keys: Any) -> dict[str, Any]:
    normal = {"▁": -1.0, "a": -2.0, "b": -3.0, "c": -4.0, "bc": -5.0, "ab": -6.0, "▁a": -7.0, "▁▁": -9.0}
    rows = [("<unk>", UNKNOWN, 0.0), ("<s>", CONTROL, 0.0), ("  ", USER_DEFINED, -1000.0), ("<t>", USER_DEFINED, 0.0)]
    rows += [(f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)]
    rows += [(piece, NORMAL, score) for piece, score in normal.items() if piece != "▁▁"]
    metadata: dict[str, Any] = {"model": "llama", "unknown_token_id": 0, "bos_token_id": 1}
    metadata |= dict(zip(("tokens", "token_type", "scores"), map(list, zip(*rows, strict=True)), strict=True))
    return {f"tokenizer.ggml.{name}": value for name, value in (metadata | keys).items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc", ["<s>", " a", "bc"]),  # bc scores best, so ab cannot be made; then ▁a
        ("ab", ["<s>", " ", "ab"]),  # ab scores better than ▁a
        ("b<t>b", ["<s>", " ", "b", "<t>", " ", "b"]),
        ("é", ["<s>", " ", r"\xc3", r"\xa9"]),
        ("b  a", ["<s>", " ", "b", "  ", "a"]),  # runs of spaces come before any other merge
    ],
)
def test_sentencepiece_merges_by_score(text: str, expected: list[str]) -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece())
    assert pieces(tokenizer, text) == expected
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().replace("<t> ", "<t>") == " " + text


def test_sentencepiece_merges_ordinary_runs_of_spaces_by_score() -> None:
    metadata = sentencepiece()
    at = metadata["tokenizer.ggml.tokens"].index("  ")
    metadata["tokenizer.ggml.tokens"][at], metadata["tokenizer.ggml.token_type"][at] = "▁▁", NORMAL
    tokenizer = tokenizer_from_gguf(metadata)
    assert pieces(tokenizer, "b  a") == ["<s>", " ", "b", " ", " a"]  # as in Llama 2: the run scores worst
    assert pieces(tokenizer, "b  c") == ["<s>", " ", "b", "  ", "c"]


def test_sentencepiece_without_prefix_decodes_to_the_same_text() -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece(add_space_prefix=False, add_bos_token=False))
    ids = tokenizer.encode(" a  b\n", add_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == " a  b\n"
    assert b"".join(map(tokenizer.token_bytes, ids)) == b" a  b\n"


GOOD = byte_level("gpt-2", ["a b"])
# A value of each key that llama.cpp, its converter or Ollama knows and this tokenizer does not read.
_FIM = {f"fim_{name}_token_id": 3 for name in ("pre", "suf", "mid", "pad", "rep", "sep")}
_DEPRECATED = {f"{name}_token_id": 3 for name in ("prefix", "suffix", "middle")}
_PAIRS = {"token_type_count": 2, "seperator_token_id": 3, "cls_token_id": 3, "mask_token_id": 3, "add_sep_token": True}
_OFF = ("normalizer.lowercase", "normalizer.strip_accents", "remove_extra_whitespaces", "add_unknown_token")
_EFFECTIVE: dict[str, Any] = {
    **dict.fromkeys((*_OFF, "add_padding_token", "add_cls_token", "add_mask_token", "add_seperator_token"), True),
    "suppress_tokens": [7],
    "added_tokens": ["<x>"],
    "precompiled_charsmap": [1, 2],
    "no_such_key": 1,
}


@pytest.mark.parametrize(("name", "value"), (_FIM | _DEPRECATED | _PAIRS).items())
def test_key_without_effect_on_ids_and_outputs_is_accepted(name: str, value: Any) -> None:
    plain, same = (tokenizer_from_gguf(GOOD | keys) for keys in ({}, {f"tokenizer.ggml.{name}": value}))
    assert pieces(same, "ab c") == pieces(plain, "ab c")
    assert same.eos_token_ids == plain.eos_token_ids


@pytest.mark.parametrize(("name", "value"), _EFFECTIVE.items())
def test_key_that_is_not_read_is_refused_unless_it_is_off(name: str, value: Any) -> None:
    key = f"tokenizer.ggml.{name}"
    with pytest.raises(TokenizerError, match=f"^GGUF: {key} .* is not supported$"):
        tokenizer_from_gguf(GOOD | {key: value})
    if name != "no_such_key":
        tokenizer_from_gguf(GOOD | {key: type(value)()})


def test_every_key_of_the_format_is_read_or_in_a_test_above() -> None:
    fields = ("model", "pre", "tokens", "token_type", "scores", "merges")
    flags = ("add_bos_token", "add_eos_token", "add_space_prefix")
    ids = (f"{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding"))
    tested = {f"tokenizer.ggml.{name}" for name in (*fields, *flags, *ids, *_FIM, *_DEPRECATED, *_PAIRS, *_EFFECTIVE)}
    known = {value for value in vars(Keys.Tokenizer).values() if str(value).startswith("tokenizer.ggml.")}
    assert len(known) >= 30
    assert known <= tested


def test_all_ids_of_eos_end_an_output() -> None:
    keys = {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eos_token_ids": [3, 5]}
    assert tokenizer_from_gguf(GOOD | keys).eos_token_ids == gguf_eos_token_ids(keys) == {3, 5}


SIZE = len(sentencepiece()["tokenizer.ggml.tokens"])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "tokenizer.ggml.model None is not supported; supported: gpt2, llama"),
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.model": "gpt2"}, "tokenizer.ggml.tokens is missing"),
        (byte_level(None, ["a b"]), "pre None is not supported; supported: dbrx, deepseek-r1-qwen, default"),
        (byte_level("viking", ["a b"]), "pre 'viking'"),
        (byte_level("gpt-2", []), "merges is missing"),
        (byte_level("gpt-2", ["a"]), "must be pairs"),
        (GOOD | {"tokenizer.ggml.merges": ["a b", "x yz"]}, "do not fit the tokens"),
        (GOOD | {"tokenizer.ggml.merges": ["a b", "ab ab"]}, "do not fit the tokens"),  # of which the library panics
        (GOOD | {"tokenizer.ggml.token_type": [NORMAL]}, "257 tokens, but 1 token types"),
        (GOOD | {"tokenizer.ggml.eos_token_id": 257}, "eos_token_id 257 is not below 257"),
        (GOOD | {"tokenizer.ggml.eos_token_ids": ["x"]}, "eos_token_ids must contain only int"),
        (GOOD | {"tokenizer.ggml.add_bos_token": "false"}, "add_bos_token 'false' is not supported"),
        (sentencepiece(scores=[0.0]), "but 1 scores"),
        (sentencepiece(unknown_token_id=SIZE), f"unknown_token_id {SIZE} is not below {SIZE}"),
        (sentencepiece(unknown_token_id=None), "unknown_token_id is missing"),
        (GOOD | {"tokenizer.ggml.pre": ["gpt-2"]}, "pre .'gpt-2'. is not supported"),
        (GOOD | {"tokenizer.ggml.model": ["gpt2"]}, "model .'gpt2'. is not supported"),
        (GOOD | {"tokenizer.ggml.merges": [1.0]}, "merges must contain only str"),
        (GOOD | {"tokenizer.ggml.tokens": [7] * 257}, "tokens must contain only str"),
        (GOOD | {"tokenizer.ggml.token_type": ["x"] * 257}, "token_type must contain only int"),
        (sentencepiece(scores=["x"] * SIZE), "scores must contain only float"),
        (sentencepiece(scores=[math.nan] * SIZE), "scores contains NaN"),
        (
            sentencepiece(tokens=["a" * 513] * SIZE, token_type=[NORMAL] * SIZE),
            "has 513 characters; the maximum is 512",
        ),
    ],
)
def test_invalid_metadata_is_named_in_the_error(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizer_from_gguf(metadata)
