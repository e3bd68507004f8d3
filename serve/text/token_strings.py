"""One token as a string, where a token may be only a part of a UTF-8 character."""

from collections.abc import Sequence

from serve.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_CONTEXT = 4  # tokens: a UTF-8 character has at most four bytes


def decoded_tokens(tokenizer: Tokenizer, context_ids: Sequence[int], candidate_ids: Sequence[int]) -> list[str]:
    """The `decoded_token` of each candidate for one position, by vLLM's rule.

    A candidate whose own text ends in a broken character is decoded together with up to four tokens before it: if
    that completes the character, it gets the whole character (the tokens that began it have ""), else "". Special
    tokens are shown.

    Args:
        context_ids: the tokens that really precede the position; only the last four matter.
        candidate_ids: alternatives for the position, each repaired on its own.
    """
    context = [tokenizer.token_bytes(index) for index in context_ids[-_MAX_CONTEXT:]]
    return [_decoded(context, tokenizer.token_bytes(index)) for index in candidate_ids]


def whole_text(tokenizer: Tokenizer, token_id: int) -> str | None:
    """The text of a token that reads the same after whatever tokens; None for one that may be completed by them."""
    data = tokenizer.token_bytes(token_id)
    return None if _is_broken(data) else _text(data)


def _decoded(context: list[bytes], token: bytes) -> str:
    if not _is_broken(token):
        return _text(token)
    for start in range(len(context) - 1, -1, -1):
        if _is_broken(b"".join(context[start:]) + token):
            continue
        while start < len(context) and not all(map(_is_broken, context[start:])):
            start += 1  # this token is whole, and has shown its text itself
        return _text(b"".join(context[start:]) + token)
    return ""


def _is_broken(data: bytes) -> bool:
    """Whether the text ends in U+FFFD that was not written out."""
    return _text(data).endswith(_REPLACEMENT) and not data.endswith(_REPLACEMENT.encode())


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
