"""Tokenizer: text to token ids and back, the true bytes of a token, chat templates."""

import contextlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from serve.text.chat_template import ChatTemplateError, render_chat
from serve.text.rust_panic import PanicError, panics_as_errors
from serve.text.token_bytes import UnknownDecoderError, token_bytes_table

_LARGE, _LARGE_AT_ONCE = 1 << 18, 2  # characters: 75 MB while they are made tokens


class TokenizerError(ValueError):
    """The tokenizer cannot be loaded, or the text cannot be tokenized; the message says why in one line."""


class Tokenizer:
    """A fast tokenizer with what a server of log-probs asks of it. Immutable; safe to use from several threads.

    Ids that no token has (models pad their vocabulary) have no bytes and no text.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        eos_token_ids: Iterable[int],
        special_tokens: Mapping[str, str],
        chat_template: str | None,
    ) -> None:
        """Takes over `backend`, turns its padding and truncation off, and tabulates all token bytes (about 0.2 s).

        Args:
            eos_token_ids: ids that end a generation.
            special_tokens: names such as "bos_token" -> token text, for templates.

        Raises:
            TokenizerError: the tokens are neither byte-level nor SentencePiece pieces.
        """
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._large = threading.BoundedSemaphore(_LARGE_AT_ONCE)
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
        """One more than the highest id that has a token; the model's vocabulary may be larger."""
        return len(self._bytes)

    @property
    def bos_token(self) -> str | None:
        """Text of the token that begins a sequence, if there is one."""
        return self._special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the token that ends a sequence, if there is one."""
        return self._special_tokens.get("eos_token")

    @property
    def special_tokens(self) -> dict[str, str]:
        """Names such as "eos_token" and the texts of these tokens."""
        return dict(self._special_tokens)

    def token_piece(self, token_id: int) -> str:
        """The token as the vocabulary spells it, such as "Ġthe"; "" for an id that no token has."""
        return self._backend.id_to_token(token_id) or ""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of `text`, in which the text of a special token becomes that token.

        Exactly the original's: a byte that the vocabulary lacks is dropped, such as SmolLM2's 0x04.

        Args:
            add_special_tokens: adds what the model wants around a text, such as BOS.

        Raises:
            TokenizerError: `text` holds a lone surrogate, or the library fails on it.
        """
        few = self._large if len(text) > _LARGE else contextlib.nullcontext()
        try:
            with few, panics_as_errors():
                return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:  # how `tokenizers` says that a str is not valid Unicode
            raise TokenizerError("text holds a lone surrogate, which is not valid Unicode") from error
        except PanicError as error:
            raise TokenizerError("the tokenizer fails on this text") from error

    def surely_above(self, text: str, tokens: int) -> bool:
        """Whether `text` has more than so many tokens, told by its length alone: tokenizing megabytes takes seconds.

        False says nothing. A normalizer may shorten what is tokenized, by no more than the factor of 4 taken here.
        """
        return len(text) > 4 * self._longest * tokens

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of `ids` (0 or more each), broken UTF-8 as U+FFFD; SentencePiece drops the first space."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text, in bytes; joined over ids they are the UTF-8 of the text."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str:
        r"""The token's text where its bytes are valid UTF-8; bytes that are not are shown as `\xNN`, as OpenAI does."""
        return self.token_bytes(token_id).decode("utf-8", "backslashreplace")

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are markup."""
        return self._special_ids

    def is_special(self, token_id: int) -> bool:
        """Whether the token is markup, which `skip_special_tokens` hides."""
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
        """Text of a chat, special tokens written out: encode it with `add_special_tokens=False`.

        Args:
            chat_template: Jinja source, or None for the model's own; see `serve.text.chat_template.render_chat`.

        Raises:
            ChatTemplateError: no template, or the template refuses the messages.
        """
        template = chat_template if chat_template is not None else self.chat_template
        if template is None:
            raise ChatTemplateError("this model has no chat template: give one, or use the completions endpoint")
        return render_chat(
            template,
            messages,
            special_tokens=self._special_tokens,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=chat_template_kwargs,
        )


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory: `tokenizer.json` and the files beside it. Runs no code from it.

    Raises:
        TokenizerError: there is none, it is broken, or it is not a fast one.
    """
    if not model_dir.is_dir():  # else AutoTokenizer takes the path for a hub id
        raise TokenizerError(f"{model_dir} is not a directory")
    try:
        with panics_as_errors():
            loaded: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # broken files raise almost anything, a bare Exception from `tokenizers` included
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TokenizerError(f"{model_dir}: the tokenizer does not load: {reason}") from error
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
    """The first that says it: generation_config.json, config.json, the tokenizer."""
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
