"""Vocabulary from GGUF metadata, validated. For the keys see "Tokenizer" in `docs/gguf.md` of the ggml project."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from serve.text.tokenizer import TokenizerError

_PREFIX = "tokenizer.ggml."
# Values of `tokenizer.ggml.token_type`.
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens and their types by id, and the metadata."""

    tokens: list[str]
    types: list[int]
    metadata: Mapping[str, Any]

    def id_of(self, name: str) -> int | None:
        """The id in `tokenizer.ggml.<name>_token_id`; None if the key is absent.

        Raises:
            TokenizerError: it is not the id of a token.
        """
        value = self.metadata.get(f"{_PREFIX}{name}_token_id")
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise TokenizerError(f"GGUF: {_PREFIX}{name}_token_id {value!r} is not below {len(self.tokens)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """The boolean `tokenizer.ggml.<name>`."""
        return bool(self.metadata.get(_PREFIX + name, default))

    def ids(self) -> dict[str, int]:
        """Token -> id, without the unused tokens that pad the model's vocabulary."""
        return {token: index for index, token in enumerate(self.tokens) if self.types[index] != UNUSED}

    def add_special_tokens(self, backend: Tokenizer, *, add_bos: bool) -> None:
        """Add to `backend` the tokens that match text first, and the BOS and EOS that surround a text.

        Args:
            backend: changed in place.
            add_bos: add BOS if the file does not specify it.
        """
        backend.add_tokens(
            [
                AddedToken(token, special=kind == CONTROL, normalized=False)
                for token, kind in zip(self.tokens, self.types, strict=True)
                if kind in (CONTROL, USER_DEFINED)
            ]
        )
        around = {
            "bos": self.id_of("bos") if self.flag("add_bos_token", add_bos) else None,
            "eos": self.id_of("eos") if self.flag("add_eos_token", False) else None,
        }
        present = {name: index for name, index in around.items() if index is not None}
        if present:
            # Names instead of the tokens' texts, which could contain the colon of the template syntax.
            backend.post_processor = processors.TemplateProcessing(
                single=[name for name in ("bos", "$A", "eos") if name == "$A" or name in present],
                special_tokens=[
                    {"id": name, "ids": [index], "tokens": [self.tokens[index]]} for name, index in present.items()
                ],
            )


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Read tokens and token types.

    Raises:
        TokenizerError: a key is missing or has the wrong type, or the two differ in length.
    """
    tokens, types = required_list(metadata, "tokens", str), required_list(metadata, "token_type", int)
    if len(tokens) != len(types):
        raise TokenizerError(f"GGUF: {len(tokens)} tokens, but {len(types)} token types")
    return Vocabulary(tokens, types, metadata)


def required_list[T](metadata: Mapping[str, Any], name: str, kind: type[T]) -> list[T]:
    """The list `tokenizer.ggml.<name>`.

    Raises:
        TokenizerError: it is missing or empty, or has an item of another type than `kind`.
    """
    value = metadata.get(_PREFIX + name)
    if not value or not isinstance(value, list):
        raise TokenizerError(f"GGUF: {_PREFIX}{name} is missing")
    if not all(isinstance(item, kind) for item in value):
        raise TokenizerError(f"GGUF: {_PREFIX}{name} must contain only {kind.__name__}")
    return value
