"""Keys of a GGUF file's tokenizer: which are read, which have no effect, and those that describe a tokenizer.json."""

import re
from collections.abc import Mapping
from reprlib import repr as short_repr
from typing import Any

from serve.text.tokenizer import SPACE, Tokenizer, TokenizerError

PREFIX = "tokenizer.ggml."
# Keys that change neither the ids of a text nor what is generated, and values at which others do not. All that are
# neither listed nor read are refused.
_IGNORED_KEYS = frozenset(
    (
        *("token_type_count", "seperator_token_id", "cls_token_id", "mask_token_id", "add_sep_token"),  # of BERT
        *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
        *("prefix_token_id", "suffix_token_id", "middle_token_id"),
    )
)
_NEUTRAL_KEYS: dict[str, Any] = {
    **{name: [] for name in ("suppress_tokens", "added_tokens", "precompiled_charsmap")},
    **dict.fromkeys(("normalizer.lowercase", "normalizer.strip_accents", "remove_extra_whitespaces"), False),
    **dict.fromkeys((f"add_{name}_token" for name in ("unknown", "padding", "cls", "mask", "seperator")), False),
}
_IDS = frozenset(f"{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding"))
_FLAGS = frozenset(("add_bos_token", "add_eos_token", "add_space_prefix"))
_READ_KEYS = frozenset(("model", "pre", "tokens", "token_type", "scores", "merges", "eos_token_ids", *_IDS, *_FLAGS))


def check_tokenizer_keys(metadata: Mapping[str, Any]) -> None:
    """Raise TokenizerError for a key that may change ids or outputs and is not read."""
    for key, value in metadata.items():
        name = key.removeprefix(PREFIX)
        if name == key or name in _IGNORED_KEYS or (name in _NEUTRAL_KEYS and value == _NEUTRAL_KEYS[name]):
            continue
        if name not in _READ_KEYS or (name in _FLAGS and not isinstance(value, bool)):
            raise TokenizerError(f"GGUF: {key} {short_repr(value)} is not supported")


# Values of `tokenizer.ggml.token_type`.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def tokenizer_keys(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The keys of a BPE tokenizer for a model with `vocab_size` tokens, without the name of its pre-tokenizer.

    Raises:
        TokenizerError: it is not a BPE tokenizer.
    """
    state = tokenizer.state()
    model = state["model"]
    if model["type"] != "BPE":
        raise TokenizerError(f"a tokenizer of type {model['type']} cannot be written to a GGUF file")
    is_sentencepiece = bool(model.get("byte_fallback"))
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    tokens, types = [f"[PAD{index}]" for index in range(vocab_size)], [_UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        is_byte = is_sentencepiece and _BYTE_PIECE.fullmatch(token)
        tokens[index], types[index] = token, _BYTE if is_byte else _NORMAL
    ids = {token: index for index, token in enumerate(tokens)}
    for token in state["added_tokens"]:
        index, text = token["id"], token["content"]
        ids[text] = index
        if token["special"]:
            tokens[index], types[index] = text, _CONTROL
        else:  # converters write the spaces of runs of spaces
            tokens[index], types[index] = text.replace(SPACE, " ") if is_sentencepiece else text, _USER_DEFINED
    named = {name: ids.get(tokenizer.special_tokens.get(key, "")) for name, key in _NAMED.items()}
    around = tokenizer.encode("a", add_special_tokens=True)
    values: dict[str, Any] = {
        "model": "llama" if is_sentencepiece else "gpt2",
        "tokens": tokens,
        "token_type": types,
        "add_bos_token": around[0] == named["bos"],
        "add_eos_token": len(around) > 1 and around[-1] == named["eos"],
        **{f"{name}_token_id": index for name, index in named.items() if index is not None},
    }
    if is_sentencepiece:
        if named["unknown"] is not None:
            types[named["unknown"]] = _UNKNOWN
        values["scores"] = _scores(tokens, merges)
    else:
        values["merges"] = [" ".join(merge) for merge in merges]
    template = {} if tokenizer.chat_template is None else {"tokenizer.chat_template": tokenizer.chat_template}
    return {PREFIX + name: value for name, value in values.items()} | template


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores that order merges as a list of merges does: those of one piece follow each other in it."""
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    return [-float(ranks.get(token, len(ranks))) for token in tokens]
