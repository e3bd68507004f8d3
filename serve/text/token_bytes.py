"""Table of the bytes of every token of a vocabulary."""

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer as Backend

SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NOT_A_BYTE = "\uffff"  # does not fit into Latin-1, so encoding it fails


class UnknownDecoderError(ValueError):
    """The tokens are neither byte-level nor SentencePiece pieces."""


def byte_characters() -> list[str]:
    """GPT-2's `bytes_to_unicode`: item b is the character that byte-level BPE writes for byte b.

    Printable bytes map to themselves, the other 68 to U+0100 and up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(0x100)]


def token_bytes_table(backend: Backend) -> list[bytes]:
    """Bytes by token id; b"" for ids without a token.

    Byte-level tokens are mapped back to bytes; `<0xNN>` and the space mark of SentencePiece pieces are replaced; added
    tokens are their content in UTF-8.

    Raises:
        UnknownDecoderError: names the decoder.
    """
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    sentencepiece = _is_sentencepiece(backend)
    table = [b""] * (1 + max((*vocabulary.values(), *added), default=-1))
    if sentencepiece:
        for token, index in vocabulary.items():
            table[index] = _piece_bytes(token)
    else:
        characters = _latin1_of_characters()
        for token, index in vocabulary.items():
            table[index] = _byte_level_bytes(token, characters)
    for index, extra in added.items():
        # The SentencePiece decoder also replaces the mark in added tokens; some are runs of spaces.
        text = extra.content.replace(SPACE, " ") if sentencepiece and not extra.special else extra.content
        table[index] = text.encode()
    return table


def _byte_level_bytes(token: str, characters: dict[int, str]) -> bytes:
    try:
        return token.translate(characters).encode("latin-1")
    except UnicodeEncodeError:  # a character that maps to no byte: the token is plain text
        return token.encode()


def _latin1_of_characters() -> dict[int, str]:
    table = dict.fromkeys(range(0x100), _NOT_A_BYTE)
    table.update({ord(character): chr(byte) for byte, character in enumerate(byte_characters())})
    return table


def _piece_bytes(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


def _is_sentencepiece(backend: Backend) -> bool:
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
    kinds = {part["type"] for part in _parts(state)}
    if "ByteLevel" in kinds:
        return False
    if kinds & {"ByteFallback", "Metaspace"}:
        return True
    raise UnknownDecoderError(
        f"tokenizer decoder {state['type']} is not supported; supported: ByteLevel and SentencePiece's"
    )


def _parts(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield state
    for inner in state.get("decoders", ()):
        yield from _parts(inner)
