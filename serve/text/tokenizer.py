"""Tokenizer: text to token ids and back, the bytes of each token, chat templates."""

import contextlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from serve.text.chat_template import ChatTemplateError, render_chat
from serve.text.token_bytes import UnknownDecoderError, token_bytes_table

_LARGE = 1 << 18  # characters: such a text takes 75 MB while it is tokenized
_MAX_LARGE = 2  # large texts tokenized at the same time
_PANIC = "PanicException"  # pyo3's class of Rust panics, derived from BaseException and exported nowhere


class TokenizerError(ValueError):
    """The tokenizer cannot be loaded, or a text cannot be tokenized. The message is one line."""


class PanicError(Exception):
    """The Rust code of `tokenizers` panicked.

    Known case: a merge whose result is longer than every token (huggingface/tokenizers issue 2198), which a model's
    file can cause.
    """


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Convert a Rust panic, a BaseException, to an Exception.

    Raises:
        PanicError: a panic occurred.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != _PANIC:
            raise
        raise PanicError(str(error)) from error


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
    ) -> None:
        """Take ownership of `backend`, disable its padding and truncation, and tabulate all token bytes (about 0.2 s).

        Args:
            eos_token_ids: ids that end an output.
            special_tokens: names such as "bos_token" -> token text, for templates.

        Raises:
            TokenizerError: the tokens are neither byte-level nor SentencePiece pieces.
        """
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._large = threading.BoundedSemaphore(_MAX_LARGE)
        self._special_tokens = dict(special_tokens)
        try:
            self._bytes = token_bytes_table(backend)
        except UnknownDecoderError as error:
            raise TokenizerError(str(error)) from error
        self._special_ids = frozenset(
            index for index, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._longest = max(1, *map(len, self._bytes))
        self.eos_token_ids = frozenset(eos_token_ids)
        self.chat_template = chat_template

    @property
    def vocab_size(self) -> int:
        """Highest token id plus 1; the model's vocabulary may be larger."""
        return len(self._bytes)

    @property
    def bos_token(self) -> str | None:
        """Text of the token that begins a sequence, if the model has one."""
        return self._special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the token that ends a sequence, if the model has one."""
        return self._special_tokens.get("eos_token")

    @property
    def special_tokens(self) -> dict[str, str]:
        """Texts of special tokens by name, such as "eos_token"."""
        return dict(self._special_tokens)

    def token_piece(self, token_id: int) -> str:
        """The token as spelled in the vocabulary, such as "Ġthe"; "" for an id without a token."""
        return self._backend.id_to_token(token_id) or ""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; the text of a special token becomes that token.

        As in the original library, bytes that the vocabulary lacks are dropped, such as 0x04 with SmolLM2.

        Args:
            add_special_tokens: add the tokens that the model expects around a text, such as BOS.

        Raises:
            TokenizerError: `text` contains a lone surrogate, or the library fails on it.
        """
        limiter = self._large if len(text) > _LARGE else contextlib.nullcontext()
        try:
            with limiter, panics_as_errors():
                return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:  # raised by `tokenizers` for a str that is not valid Unicode
            raise TokenizerError("text contains a lone surrogate, which is not valid Unicode") from error
        except PanicError as error:
            raise TokenizerError("the tokenizer fails on this text") from error

    def surely_above(self, text: str, tokens: int) -> bool:
        """True if `text` certainly has more than `tokens` tokens, judging by its length alone; False is no statement.

        Avoids tokenizing megabytes, which takes seconds. A normalizer may shorten a text by a factor of 4 at most.
        """
        return len(text) > 4 * self._longest * tokens

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of `ids` (each at least 0), invalid UTF-8 as U+FFFD; SentencePiece drops the first space."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text; joined over ids they are the UTF-8 of the text."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str:
        r"""The token's text; bytes that are not valid UTF-8 are written as `\xNN`, as OpenAI does."""
        return self.token_bytes(token_id).decode("utf-8", "backslashreplace")

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of markup tokens."""
        return self._special_ids

    def is_special(self, token_id: int) -> bool:
        """True for a markup token, which `skip_special_tokens` hides."""
        return token_id in self._special_ids

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        chat_template_kwargs: Mapping[str, Any],
        chat_template: str | None,
    ) -> str:
        """Render a chat, special tokens written out: encode the text with `add_special_tokens=False`.

        Args:
            chat_template: Jinja source; None for the model's own. See `serve.text.chat_template.render_chat`.

        Raises:
            ChatTemplateError: no template, or the template refuses the messages.
        """
        template = chat_template if chat_template is not None else self.chat_template
        if template is None:
            raise ChatTemplateError("this model has no chat template: pass one, or use the completions endpoint")
        return render_chat(
            template,
            messages,
            special_tokens=self._special_tokens,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=chat_template_kwargs,
        )


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """Load the tokenizer of a Hugging Face directory: `tokenizer.json` and related files. Runs no code from it.

    Raises:
        TokenizerError: it is missing, broken, or not a fast tokenizer.
    """
    if not model_dir.is_dir():  # AutoTokenizer would take the path for a hub id
        raise TokenizerError(f"{model_dir} is not a directory")
    try:
        with panics_as_errors():
            loaded: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # broken files raise almost anything, including a bare Exception from `tokenizers`
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TokenizerError(f"{model_dir}: the tokenizer cannot be loaded: {reason}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise TokenizerError(f"{model_dir}: {type(loaded).__name__} is not a fast tokenizer")
    template = loaded.chat_template
    return Tokenizer(
        backend,
        eos_token_ids=_eos_token_ids(model_dir, loaded.eos_token_id),
        special_tokens={name: str(token) for name, token in loaded.special_tokens_map.items() if not _is_list(token)},
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def _eos_token_ids(model_dir: Path, fallback: int | None) -> list[int]:
    """EOS ids from the first source that has them: generation_config.json, config.json, the tokenizer."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(model_dir / name).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(index) is int for index in ids):
                raise TokenizerError(f"{model_dir / name}: eos_token_id must be an integer or a list of integers")
            return ids
    return [] if fallback is None else [fallback]


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


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)
