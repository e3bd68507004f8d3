"""Tokenizer: text to token ids and back, and the bytes of each token."""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from serve.config.values import error_reason
from serve.text.end_of_turn import end_of_turn_ids

SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NOT_A_BYTE = "\uffff"  # does not fit into Latin-1, so encoding it fails
_LARGE = 1 << 18  # characters: such a text takes 75 MB while it is tokenized
_MAX_LARGE = 2  # large texts tokenized at the same time
_MAX_HELD = 1 << 10  # ids that are decoded without the release of the interpreter
_PANIC = "PanicException"  # pyo3's class of Rust panics, derived from BaseException and exported nowhere


class TokenizerError(ValueError):
    """The tokenizer cannot be loaded, or a text cannot be tokenized. The message is one line."""


@contextmanager
def panics_as_errors(message: str = "") -> Iterator[None]:
    """Convert a panic of the Rust code of `tokenizers`, which is a BaseException, to TokenizerError.

    Known case: a merge whose result is longer than every token (huggingface/tokenizers issue 2198), which a model's
    file can cause. `message` replaces the panic's own.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != _PANIC:
            raise
        raise TokenizerError(message or str(error)) from error


class Tokenizer:
    """A fast tokenizer that knows the bytes of each token. Immutable; thread-safe.

    Ids without a token (models pad their vocabulary) have no bytes and no text.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        eos_token_ids: Iterable[int],
        special_tokens: Mapping[str, str],
        chat_template: str | None,
        class_name: str,
        chat_control_tokens: Iterable[str] | None = None,
    ) -> None:
        """Take ownership of `backend`, disable its padding and truncation, and tabulate all token bytes (about 0.2 s).

        Special tokens with the name of an end of turn are added to `eos_token_ids`.
        Raise TokenizerError if the tokens are neither byte-level nor SentencePiece pieces.
        """
        backend.no_padding()
        backend.no_truncation()
        _keep_spaces(backend)
        self._backend = backend
        backend.encode_batch_fast([])  # starts its threads
        self._large = threading.BoundedSemaphore(_MAX_LARGE)
        self._bytes = _token_bytes_table(backend)
        self._longest = max(1, *map(len, self._bytes))
        self.special_tokens = dict(special_tokens)  # names such as "bos_token" -> token text, for templates
        # Markup tokens, which `skip_special_tokens` hides.
        special = {token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(special.values())
        self.eos_token_ids = frozenset(eos_token_ids) | end_of_turn_ids(special)  # end an output
        self.chat_template = chat_template  # Jinja source
        self.class_name = class_name  # of transformers
        # Added tokens that chat templates write as control tokens, besides special ones; None: those in the template.
        self.chat_control_tokens = None if chat_control_tokens is None else frozenset(chat_control_tokens)
        # BPE is local: two of its encodings that share a token are the same from there on, whatever comes before.
        self.is_bpe = isinstance(backend.model, BPE)
        # A SentencePiece model may put a space before a text, which its decoder drops.
        word = next((index for index, data in enumerate(self._bytes) if data[:1] == b" " != data[1:2]), None)
        self.drops_space = word is not None and not backend.decode([word]).startswith(" ")

    @property
    def vocab_size(self) -> int:
        """Highest token id plus 1; the model's vocabulary may be larger."""
        return len(self._bytes)

    def token_piece(self, token_id: int) -> str:
        """The token as spelled in the vocabulary, such as "Ġthe"; "" for an id without a token."""
        return self._backend.id_to_token(token_id) or ""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; the text of a special token becomes that token.

        As in the original library, bytes that the vocabulary lacks are dropped, such as 0x04 with SmolLM2.
        `add_special_tokens` adds those that surround a text, such as BOS. Raise TokenizerError for a lone surrogate.
        """
        return self._encode(self._backend.encode_batch_fast, [text], add_special_tokens)[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as from `encode`, without added special tokens."""
        return (
            [encoding.ids for encoding in self._encode(self._backend.encode_batch_fast, texts, False)] if texts else []
        )

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of `text` with no added token, special or not: their text is ordinary text."""
        normalizer, splitter = self._backend.normalizer, self._backend.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        words = [text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]
        return [token.id for word in words for token in self._backend.model.tokenize(word)]

    def state(self) -> dict[str, Any]:
        """The tokenizer as in a `tokenizer.json`."""
        state: dict[str, Any] = json.loads(self._backend.to_str())
        return state

    def added_tokens(self) -> dict[str, int]:
        return {token.content: index for index, token in self._backend.get_added_tokens_decoder().items()}

    def words(self, text: str) -> tuple[list[int], list[int], list[int | None]]:
        """Token ids of `text`; for each the code points before it, and the number of its word, None for added tokens.

        Words are the parts into which the tokenizer splits a text first; they are encoded one by one.
        """
        [encoding] = self._encode(self._backend.encode_batch, [text], False)
        return encoding.ids, [start for start, _ in encoding.offsets], encoding.word_ids

    def tokenize(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        """Token ids as from `encode`, and for each token the code points of `text` before it.

        Tokens that surround the text stand at its start and its end.
        """
        [encoding] = self._encode(self._backend.encode_batch, [text], add_special_tokens)
        offsets, end = list[int](), 0
        for index, is_added in enumerate(encoding.special_tokens_mask):
            # One at a time: `encoding.offsets` holds the interpreter while it makes a million tuples.
            span = None if is_added else encoding.token_to_chars(index)
            start, end = span or (end, end)
            offsets.append(start)
        return encoding.ids, offsets

    def _encode(
        self, encode_batch: Callable[..., list[Encoding]], texts: Sequence[str], add_special_tokens: bool
    ) -> list[Encoding]:
        """Encode on a thread of the backend: `Backend.encode` would hold the interpreter for seconds."""
        limiter = self._large if sum(map(len, texts)) > _LARGE else contextlib.nullcontext()
        try:
            with limiter, panics_as_errors("the tokenizer fails on this text"):
                return encode_batch(texts, add_special_tokens=add_special_tokens)
        except TypeError as error:  # raised by `tokenizers` for a str that is not valid Unicode
            raise TokenizerError("text contains a lone surrogate, which is not valid Unicode") from error

    def certainly_exceeds(self, text: str, tokens: int) -> bool:
        """True if `text` certainly has more than `tokens` tokens, judging by its length alone.

        Avoids tokenizing megabytes, which takes seconds. A normalizer may shorten a text by a factor of 4 at most.
        """
        return len(text) > 4 * self._longest * tokens

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of `ids` (each at least 0), invalid UTF-8 as U+FFFD; SentencePiece drops the first space."""
        if len(ids) <= _MAX_HELD:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text; joined over ids they are the UTF-8 of the text."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str:
        r"""The token's text; bytes that are not valid UTF-8 are written as `\xNN`, as OpenAI does."""
        return self.token_bytes(token_id).decode("utf-8", "backslashreplace")

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special_ids


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """Load the tokenizer of a Hugging Face directory, without running code from it.

    Raise TokenizerError if it is missing, broken, or not a fast tokenizer.
    """
    from transformers import AutoTokenizer  # takes 0.3 s, and GGUF files do not need it

    if not model_dir.is_dir():  # AutoTokenizer would take the path for a hub id
        raise TokenizerError(f"{model_dir} is not a directory")
    try:
        with panics_as_errors():
            loaded: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # broken files raise almost anything, including a bare Exception from `tokenizers`
        raise TokenizerError(f"{model_dir}: the tokenizer cannot be loaded: {error_reason(error)}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise TokenizerError(f"{model_dir}: {type(loaded).__name__} is not a fast tokenizer")
    template = loaded.chat_template or _read_json(model_dir / "chat_template.json").get("chat_template")
    return Tokenizer(
        backend,
        eos_token_ids=eos_token_ids_of(model_dir) | ({loaded.eos_token_id} - {None}),
        special_tokens={
            name: str(token) for name, token in loaded.special_tokens_map.items() if not isinstance(token, list | tuple)
        },
        chat_template=template.get("default") if isinstance(template, dict) else template,
        chat_control_tokens=getattr(loaded, "chat_control_tokens", None),
        class_name=str(_read_json(model_dir / "tokenizer_config.json").get("tokenizer_class") or type(loaded).__name__),
    )


def eos_token_ids_of(path: Path) -> set[int]:
    """EOS ids of generation_config.json and config.json in a folder, or of one such file."""
    ids: set[int] = set()
    for file in (path / "generation_config.json", path / "config.json") if path.is_dir() else (path,):
        content = _read_json(file)
        text = content.get("text_config")  # of a multimodal model
        value = content.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(index) is int for index in values):
            raise TokenizerError(f"{file}: eos_token_id must be an integer or a list of integers")
        ids.update(values)
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object")
    return value


def byte_characters() -> list[str]:
    """GPT-2's `bytes_to_unicode`: item b is the character that byte-level BPE writes for byte b.

    Printable bytes map to themselves, the other 68 to U+0100 and up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(0x100)]


def _token_bytes_table(backend: Backend) -> list[bytes]:
    """Bytes by token id; b"" for ids without a token.

    Byte-level tokens are mapped back to bytes; `<0xNN>` and the space mark of SentencePiece pieces are replaced; added
    tokens are their content in UTF-8.
    """
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    sentencepiece = _is_sentencepiece(backend)
    table = [b""] * (1 + max((*vocabulary.values(), *added), default=-1))
    if sentencepiece:
        for token, index in vocabulary.items():
            byte = _BYTE_PIECE.fullmatch(token)
            table[index] = bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()
    else:
        characters = dict.fromkeys(range(0x100), _NOT_A_BYTE)
        characters |= {ord(character): chr(byte) for byte, character in enumerate(byte_characters())}
        for token, index in vocabulary.items():
            try:
                table[index] = token.translate(characters).encode("latin-1")
            except UnicodeEncodeError:  # a character that maps to no byte: the token is plain text
                table[index] = token.encode()
    for index, extra in added.items():
        # The SentencePiece decoder also replaces the mark in added tokens; some are runs of spaces.
        text = extra.content.replace(SPACE, " ") if sentencepiece and not extra.special else extra.content
        table[index] = text.encode()
    return table


def _is_sentencepiece(backend: Backend) -> bool:
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
    kinds = {part["type"] for part in _parts(state)}
    if "ByteLevel" in kinds:
        return False
    if kinds & {"ByteFallback", "Metaspace"}:
        return True
    raise TokenizerError(
        f"tokenizer decoder {state['type']} is not supported; supported: ByteLevel and SentencePiece's"
    )


def _keep_spaces(backend: Backend) -> None:
    """Let the offsets of tokens include the spaces of their texts, which a post-processor may exclude."""
    if (processor := backend.post_processor) is not None:
        state = processor.__getstate__()
        processor.__setstate__(state.replace(b'"trim_offsets":true', b'"trim_offsets":false'))
        backend.post_processor = processor


def _parts(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield state
    for inner in state.get("decoders", ()):
        yield from _parts(inner)
