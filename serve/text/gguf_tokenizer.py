"""Tokenizer from the metadata of a GGUF file, with the ids of the original tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from serve.text.gguf_sentencepiece import sentencepiece_backend
from serve.text.gguf_vocabulary import Vocabulary, read_vocabulary, required_list
from serve.text.tokenizer import Tokenizer, TokenizerError, panics_as_errors


@dataclass(frozen=True, slots=True)
class _Pre:
    """Pre-tokenizer named by `tokenizer.ggml.pre`: how a text is split into words before merging."""

    split: str | None = None  # the model's published pattern; None for GPT-2's, which `tokenizers` implements
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token is not split
    add_bos: bool = False  # default if the file does not specify it


_GPT2 = _Pre()
# tokenizer.json of Llama 3 and others that split words like cl100k: groups of three digits.
_THREES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _Pre(split=_THREES, ignore_merges=True, add_bos=True)
# tokenizer.json of Qwen2, Qwen2.5 and Qwen3: single digits.
_QWEN2 = _Pre(split=_THREES.replace("{1,3}", ""), nfc=True)
_PRE = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _Pre(single_digits=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": _Pre(split=_THREES),  # used by files of OLMo-2
    "smaug-bpe": _Pre(split=_THREES),
}
_TEMPLATE_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer from the keys of the GGUF specification (`docs/gguf.md` of the ggml project).

    Args:
        metadata: key -> plain Python value. `tokenizer.ggml.model` may be "gpt2" (byte-level BPE) or "llama"
            (SentencePiece BPE with scores).

    Raises:
        TokenizerError: a key is missing, contradicts another, or has an unknown value.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(f"GGUF: tokenizer.ggml.model {shown(kind)} is not supported; supported: gpt2, llama")
    vocabulary = read_vocabulary(metadata)
    backend = _byte_level_backend(vocabulary) if kind == "gpt2" else sentencepiece_backend(vocabulary)
    named = {name: vocabulary.id_of(key) for name, key in _TEMPLATE_NAMES.items()}
    ends = (vocabulary.id_of("eos"), vocabulary.id_of("eot"))
    return Tokenizer(
        backend,
        eos_token_ids=[index for index in ends if index is not None],
        special_tokens={name: vocabulary.tokens[index] for name, index in named.items() if index is not None},
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _byte_level_backend(vocabulary: Vocabulary) -> Backend:
    pre = _pre_of(vocabulary.metadata)
    pairs = [merge.split(" ") for merge in required_list(vocabulary.metadata, "merges", str)]
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
    backend.pre_tokenizer = pre_tokenizers.Sequence(_splitters(pre))
    backend.decoder = decoders.ByteLevel()
    vocabulary.add_special_tokens(backend, add_bos=pre.add_bos)
    return backend


def _splitters(pre: _Pre) -> list[pre_tokenizers.PreTokenizer]:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    return steps


def _pre_of(metadata: Mapping[str, Any]) -> _Pre:
    # No default for a missing key: a wrong split gives ids that look right but are not.
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in _PRE:
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.pre {shown(name)} is not supported; supported: {', '.join(sorted(_PRE))}"
        )
    return _PRE[name]
