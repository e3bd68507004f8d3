"""SentencePiece BPE from GGUF metadata (`tokenizer.ggml.model` "llama"): pieces with scores instead of merges."""

import math
from collections.abc import Collection

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from serve.text.gguf_vocabulary import USER_DEFINED, Vocabulary, required_list
from serve.text.token_bytes import SPACE
from serve.text.tokenizer import TokenizerError

_MAX_PIECE = 512  # characters: all ways to cut a piece in two are tried


def sentencepiece_backend(vocabulary: Vocabulary) -> Backend:
    """BPE whose next merge is the one that makes the piece of the highest score, with a fallback to `<0xNN>` bytes.

    Raises:
        TokenizerError: scores or the unknown token are missing, or wrong.
    """
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
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    vocabulary.add_special_tokens(backend, add_bos=True)
    # A text that itself holds runs of the mark: they are found before spaces are marked.
    backend.add_tokens([AddedToken(token, normalized=False) for token in runs])
    return backend


def _with_marked_spaces(vocabulary: Vocabulary) -> tuple[Vocabulary, list[str]]:
    """Runs of spaces, which GGUF files have as user-defined tokens, as ordinary pieces again; and these runs."""
    tokens, types, runs = list(vocabulary.tokens), list(vocabulary.types), []
    for index, token in enumerate(tokens):
        if types[index] == USER_DEFINED and not token.strip(" " + SPACE):
            tokens[index], types[index] = token.replace(" ", SPACE), 1
            runs.append(tokens[index])
    return Vocabulary(tokens, types, vocabulary.metadata), runs


def _merges(vocabulary: Vocabulary, runs: Collection[str]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece: best score first, then lower id, then lower ids of the two halves.

    Before them, whatever their score, runs of spaces that are user-defined (Gemma), the longest first: SentencePiece
    looks for such pieces beforehand, and takes the longest. Those of Llama 2 are ordinary pieces of the worst score.
    """
    scores = required_list(vocabulary.metadata, "scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise TokenizerError(f"GGUF: {len(vocabulary.tokens)} tokens, but {len(scores)} scores")
    if any(map(math.isnan, scores)):
        raise TokenizerError("GGUF: tokenizer.ggml.scores holds what is not a number")
    ids = vocabulary.ids()
    ranked = []
    for token, index in ids.items():
        if vocabulary.types[index] != 1:
            continue
        if len(token) > _MAX_PIECE:
            raise TokenizerError(f"GGUF: token {index} has {len(token)} characters, of at most {_MAX_PIECE}")
        is_run = token in runs
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                place = (-math.inf, -len(left), -len(right)) if is_run else (-scores[index], index, ids[left])
                ranked.append((*place, ids[right], left, right))
    ranked.sort()
    return [(row[4], row[5]) for row in ranked]
