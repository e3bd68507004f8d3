"""Bodies of the largest sizes, which a server reads, tokenizes or refuses while its streams go on."""

import json
import random

_TEXT = 1 << 20  # characters
_KEYS = 1_500_000  # more than our server parses
_ACCEPTED_KEYS = 290_000


def large_bodies(model: str) -> list[bytes]:
    """A text of 1 MB, an object of 1.5 million keys, and one that our server accepts, as completions of one token."""
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz    \n", k=_TEXT)
    common: dict[str, object] = {"model": model, "prompt": "a", "max_tokens": 1}
    fields: list[dict[str, object]] = [{"prompt": "".join(letters)}]
    fields += [{"many": {f"{i:x}": 1 for i in range(keys)}} for keys in (_KEYS, _ACCEPTED_KEYS)]
    return [json.dumps(common | each, separators=(",", ":")).encode() for each in fields]
