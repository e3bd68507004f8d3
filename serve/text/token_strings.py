"""Tokens as strings; a token may be part of a UTF-8 character."""

from collections.abc import Sequence

from serve.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_CONTEXT = 4  # tokens: a UTF-8 character has at most four bytes


def decoded_tokens(tokenizer: Tokenizer, context_ids: Sequence[int], candidate_ids: Sequence[int]) -> list[str]:
    """The `decoded_token` of each candidate for a position, as in vLLM. Special tokens are written out.

    A candidate whose text ends in an incomplete character is decoded together with up to four preceding tokens: it gets
    the character if that completes it, else "". The tokens that start a character have "".

    Args:
        tokenizer: of the model.
        context_ids: the tokens that precede the position; only the last four matter.
        candidate_ids: alternatives for the position, decoded independently.
    """
    context = [tokenizer.token_bytes(index) for index in context_ids[-_MAX_CONTEXT:]]
    return [_decoded(context, tokenizer.token_bytes(index)) for index in candidate_ids]


def whole_text(tokenizer: Tokenizer, token_id: int) -> str | None:
    """The text of a token if it does not depend on the preceding tokens; None if they may complete it."""
    data = tokenizer.token_bytes(token_id)
    return None if _is_broken(data) else _text(data)


def _decoded(context: list[bytes], token: bytes) -> str:
    if not _is_broken(token):
        return _text(token)
    for start in range(len(context) - 1, -1, -1):
        if _is_broken(b"".join(context[start:]) + token):
            continue
        while start < len(context) and not all(map(_is_broken, context[start:])):
            start += 1  # this token is complete and has its own text
        return _text(b"".join(context[start:]) + token)
    return ""


def _is_broken(data: bytes) -> bool:
    """True if the data ends in an incomplete character: its text ends in U+FFFD, but the data does not."""
    return _text(data).endswith(_REPLACEMENT) and not data.endswith(_REPLACEMENT.encode())


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
