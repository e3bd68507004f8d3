"""Tokenizer from the metadata of a GGUF file, with the ids of the original tokenizer.

For the keys see "Tokenizer" in `docs/gguf.md` of the ggml project.
"""

import logging
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from serve.text.end_of_turn import END_OF_TURN
from serve.text.gguf_keys import PREFIX, check_tokenizer_keys
from serve.text.tokenizer import SPACE, Tokenizer, TokenizerError, panics_as_errors

logger = logging.getLogger(__name__)

# Values of `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
_PHI3_UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")
_MAX_PIECE = 512  # characters; all ways to split a piece in two are tried


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """Pre-tokenizer named by `tokenizer.ggml.pre`: how a text is split into words before merging."""

    split: str | None = None  # the model's published pattern; None for GPT-2's, which `tokenizers` implements
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token is not split
    add_bos: bool = False  # default if the file does not specify it


_GPT2 = _PreTokenizer()
# tokenizer.json of Llama 3 and others that split words like cl100k: groups of three digits.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _PreTokenizer(split=_CL100K, ignore_merges=True, add_bos=True)
# tokenizer.json of Qwen2, Qwen2.5 and Qwen3: single digits.
_QWEN2 = _PreTokenizer(split=_CL100K.replace("{1,3}", ""), nfc=True)
# tokenizer.json of gpt-oss (o200k): words split where capitals follow small letters, and may end in a slash.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _PreTokenizer(single_digits=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "gpt-4o": _PreTokenizer(split=_O200K, ignore_merges=True),
    "dbrx": _PreTokenizer(split=_CL100K),  # used by files of OLMo-2
    "smaug-bpe": _PreTokenizer(split=_CL100K, ignore_merges=True),  # Llama 3's without BOS, in files of SmolLM3
}
_CLASS_NAMES = {"gpt2": "GPT2TokenizerFast", "llama": "LlamaTokenizerFast"}  # of transformers, by tokenizer.ggml.model
_END_NAMES = ("eos", "eot", "eom")


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens and their types by id, and the metadata."""

    tokens: list[str]
    types: list[int]
    metadata: Mapping[str, Any]

    def id_of(self, name: str) -> int | None:
        """The id in `tokenizer.ggml.<name>_token_id`; None if the key is absent."""
        value = self.metadata.get(f"{PREFIX}{name}_token_id")
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise TokenizerError(f"GGUF: {PREFIX}{name}_token_id {value!r} is not below {len(self.tokens)}")
        return value

    def unused_id_of(self, name: str) -> int | None:
        """`id_of` for a token of which only templates read the text: a warning and None for a wrong id."""
        try:
            return self.id_of(name)
        except TokenizerError as error:
            logger.warning("%s; the key is ignored", error)
            return None

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.metadata.get(PREFIX + name, default))

    @property
    def is_phi(self) -> bool:
        """Whether the tokens are those of Phi-3 or Phi-4, whose flags no key of the file has.

        llama.cpp knows Phi-3 by the name in the file; fine-tuned models have other names, but the same architecture.
        """
        name = re.sub("[ _-]", "", str(self.metadata.get("general.name")).lower())
        return "phi3" in name or self.metadata.get("general.architecture") == "phi3"

    @property
    def has_instruction_tokens(self) -> bool:
        """Whether it is Mistral's from v2 on: only a text's first word gets a space, not those after special tokens."""
        return ("[INST]", CONTROL) in zip(self.tokens, self.types, strict=True)

    def ids(self) -> dict[str, int]:
        """Token -> id, without the unused tokens that pad the model's vocabulary."""
        return {token: index for index, token in enumerate(self.tokens) if self.types[index] != UNUSED}

    def add_special_tokens(self, backend: Backend, *, add_bos: bool) -> None:
        """Add to `backend` the tokens that match text first, and the BOS and EOS that surround a text.

        `add_bos` is the default for a file that does not specify it.
        """
        # Phi-3 drops white space after most added tokens, Phi-4, which has another pre-tokenizer, also before them.
        strips, on_left = self.is_phi, self.metadata.get("tokenizer.ggml.pre") == "dbrx"
        backend.add_tokens(
            [
                AddedToken(
                    token,
                    special=kind != USER_DEFINED,
                    normalized=False,
                    lstrip=strips and on_left,
                    rstrip=strips and (on_left or token not in _PHI3_UNSTRIPPED),
                )
                for token, kind in zip(self.tokens, self.types, strict=True)
                if kind in (UNKNOWN, CONTROL, USER_DEFINED)
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


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer from keys with plain Python values.

    `tokenizer.ggml.model` may be "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE with scores).

    Raises:
        TokenizerError: a key is missing, contradicts another, or has an unknown value.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(f"GGUF: tokenizer.ggml.model {short_repr(kind)} is not supported; supported: gpt2, llama")
    check_tokenizer_keys(metadata)
    tokens, types = _required_list(metadata, "tokens", str), _required_list(metadata, "token_type", int)
    if len(tokens) != len(types):
        raise TokenizerError(f"GGUF: {len(tokens)} tokens, but {len(types)} token types")
    # As in llama.cpp: converters stored some ends of turns as ordinary tokens. In Gemma's vocabulary </s> is HTML.
    ends = END_OF_TURN - {"</s>"}
    types = [
        CONTROL if token in ends and type_ in (NORMAL, USER_DEFINED) else type_
        for token, type_ in zip(tokens, types, strict=True)
    ]
    vocabulary = _Vocabulary(tokens, types, metadata)
    backend = _byte_level_backend(vocabulary) if kind == "gpt2" else _sentencepiece_backend(vocabulary)
    named = {name: vocabulary.id_of(key) for name, key in (("bos_token", "bos"), ("eos_token", "eos"))}
    named |= {"unk_token": vocabulary.unused_id_of("unknown"), "pad_token": vocabulary.unused_id_of("padding")}
    more = _eos_token_ids(metadata)
    return Tokenizer(
        backend,
        eos_token_ids=[*(index for name in _END_NAMES if (index := vocabulary.id_of(name)) is not None), *more],
        special_tokens={name: vocabulary.tokens[index] for name, index in named.items() if index is not None},
        chat_template=metadata.get("tokenizer.chat_template"),
        class_name=_CLASS_NAMES[kind],
    )


def gguf_eos_token_ids(metadata: Mapping[str, Any]) -> set[int]:
    """Ids that end an output by the file's keys."""
    ids = [metadata.get(f"{PREFIX}{name}_token_id") for name in _END_NAMES]
    return {index for index in (*ids, *_eos_token_ids(metadata)) if type(index) is int}


def _eos_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """The ids of a key that Ollama writes."""
    return _required_list(metadata, "eos_token_ids", int) if metadata.get(f"{PREFIX}eos_token_ids") else []


def _byte_level_backend(vocabulary: _Vocabulary) -> Backend:
    name = vocabulary.metadata.get("tokenizer.ggml.pre")
    # No default for a missing key: a wrong split gives ids that look right but are not.
    if not isinstance(name, str) or name not in _PRE:
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.pre {short_repr(name)} is not supported; supported: {', '.join(sorted(_PRE))}"
        )
    pre = _PRE[name]
    pairs = [merge.split(" ") for merge in _required_list(vocabulary.metadata, "merges", str)]
    if not all(len(pair) == 2 for pair in pairs):
        raise TokenizerError("GGUF: tokenizer.ggml.merges must be pairs separated by one space")
    merges = [(left, right) for left, right in pairs]
    try:
        with panics_as_errors():
            model = models.BPE(vocab=vocabulary.ids(), merges=merges, ignore_merges=pre.ignore_merges)
    except Exception as error:  # the library raises a bare Exception for an invalid merge
        raise TokenizerError(f"GGUF: tokenizer.ggml.merges do not fit the tokens: {error}") from error
    backend = Backend(model)
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    splitters: list[pre_tokenizers.PreTokenizer] = []
    if pre.single_digits:
        splitters.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split is not None:
        splitters.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    splitters.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(splitters)
    backend.decoder = decoders.ByteLevel()
    vocabulary.add_special_tokens(backend, add_bos=pre.add_bos)
    return backend


def _sentencepiece_backend(vocabulary: _Vocabulary) -> Backend:
    """BPE that merges to the piece with the highest score first, with a fallback to `<0xNN>` bytes."""
    vocabulary, runs = _with_marked_spaces(vocabulary)
    unknown = vocabulary.id_of("unknown")
    if unknown is None:
        raise TokenizerError("GGUF: tokenizer.ggml.unknown_token_id is missing")
    backend = Backend(
        models.BPE(
            vocab=vocabulary.ids(),
            merges=_merges(vocabulary, set(runs)),
            unk_token=vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = vocabulary.flag("add_space_prefix", True)
    if prefix and vocabulary.has_instruction_tokens:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        replace = normalizers.Replace(" ", SPACE)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    vocabulary.add_special_tokens(backend, add_bos=True)
    # For texts that contain runs of the mark: they are matched before spaces are marked.
    backend.add_tokens([AddedToken(token, normalized=False) for token in runs])
    return backend


def _with_marked_spaces(vocabulary: _Vocabulary) -> tuple[_Vocabulary, list[str]]:
    """The vocabulary with runs of spaces, user-defined tokens in GGUF files, as ordinary pieces; and these runs."""
    tokens, types, runs = list(vocabulary.tokens), list(vocabulary.types), []
    for index, token in enumerate(tokens):
        if types[index] == USER_DEFINED and not token.strip(" " + SPACE):
            tokens[index], types[index] = token.replace(" ", SPACE), NORMAL
            runs.append(tokens[index])
    return _Vocabulary(tokens, types, vocabulary.metadata), runs


def _merges(vocabulary: _Vocabulary, runs: Collection[str]) -> list[tuple[str, str]]:
    """All pairs of pieces that form a piece, ordered by score, id and the ids of both halves.

    User-defined runs of spaces (Gemma) come first, the longest first, because SentencePiece matches such pieces before
    all others. The runs of Llama 2 are ordinary pieces with the lowest scores.
    """
    scores = _required_list(vocabulary.metadata, "scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise TokenizerError(f"GGUF: {len(vocabulary.tokens)} tokens, but {len(scores)} scores")
    if any(map(math.isnan, scores)):
        raise TokenizerError("GGUF: tokenizer.ggml.scores contains NaN")
    ids = vocabulary.ids()
    ranked = []
    for token, index in ids.items():
        if vocabulary.types[index] != NORMAL:
            continue
        if len(token) > _MAX_PIECE:
            raise TokenizerError(f"GGUF: token {index} has {len(token)} characters; the maximum is {_MAX_PIECE}")
        is_run = token in runs
        for middle in range(1, len(token)):
            left, right = token[:middle], token[middle:]
            if left in ids and right in ids:
                order = (-math.inf, -len(left), -len(right)) if is_run else (-scores[index], index, ids[left])
                ranked.append((*order, ids[right], left, right))
    ranked.sort()
    return [(row[4], row[5]) for row in ranked]


def _required_list[T](metadata: Mapping[str, Any], name: str, kind: type[T]) -> list[T]:
    """The list `tokenizer.ggml.<name>`, whose items have type `kind`."""
    value = metadata.get(PREFIX + name)
    if not value or not isinstance(value, list):
        raise TokenizerError(f"GGUF: {PREFIX}{name} is missing")
    if not all(isinstance(item, kind) for item in value):
        raise TokenizerError(f"GGUF: {PREFIX}{name} must contain only {kind.__name__}")
    return value
