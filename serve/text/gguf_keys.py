"""Keys of a GGUF file's tokenizer: those that are read, those without effect, and values at which others have none."""

from collections.abc import Mapping
from reprlib import repr as short_repr
from typing import Any

from serve.text.tokenizer import TokenizerError

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
