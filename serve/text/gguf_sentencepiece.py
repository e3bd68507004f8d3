"""SentencePiece BPE from GGUF metadata (`tokenizer.ggml.model` "llama"): pieces with scores instead of merges."""

import math
from collections.abc import Collection

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from serve.text.gguf_vocabulary import USER_DEFINED, Vocabulary, required_list
from serve.text.token_bytes import SPACE
from serve.text.tokenizer import TokenizerError

_MAX_PIECE = 512  # characters; all ways to split a piece in two are tried


def sentencepiece_backend(vocabulary: Vocabulary) -> Backend:
    """BPE that merges to the piece with the highest score first, with a fallback to `<0xNN>` bytes.

    Raises:
        TokenizerError: scores or the unknown token are missing or invalid.
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
    # For texts that contain runs of the mark: they are matched before spaces are marked.
    backend.add_tokens([AddedToken(token, normalized=False) for token in runs])
    return backend


def _with_marked_spaces(vocabulary: Vocabulary) -> tuple[Vocabulary, list[str]]:
    """The vocabulary with runs of spaces, user-defined tokens in GGUF files, as ordinary pieces; and these runs."""
    tokens, types, runs = list(vocabulary.tokens), list(vocabulary.types), []
    for index, token in enumerate(tokens):
        if types[index] == USER_DEFINED and not token.strip(" " + SPACE):
            tokens[index], types[index] = token.replace(" ", SPACE), 1
            runs.append(tokens[index])
    return Vocabulary(tokens, types, vocabulary.metadata), runs


def _merges(vocabulary: Vocabulary, runs: Collection[str]) -> list[tuple[str, str]]:
    """All pairs of pieces that form a piece, ordered by score, id and the ids of both halves.

    User-defined runs of spaces (Gemma) come first, the longest first, because SentencePiece matches such pieces before
    all others. The runs of Llama 2 are ordinary pieces with the lowest scores.
    """
    scores = required_list(vocabulary.metadata, "scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise TokenizerError(f"GGUF: {len(vocabulary.tokens)} tokens, but {len(scores)} scores")
    if any(map(math.isnan, scores)):
        raise TokenizerError("GGUF: tokenizer.ggml.scores contains NaN")
    ids = vocabulary.ids()
    ranked = []
    for token, index in ids.items():
        if vocabulary.types[index] != 1:
            continue
        if len(token) > _MAX_PIECE:
            raise TokenizerError(f"GGUF: token {index} has {len(token)} characters; the maximum is {_MAX_PIECE}")
        is_run = token in runs
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                order = (-math.inf, -len(left), -len(right)) if is_run else (-scores[index], index, ids[left])
                ranked.append((*order, ids[right], left, right))
    ranked.sort()
    return [(row[4], row[5]) for row in ranked]
