"""Request fields that are known and not honoured: those that are refused, and those that change no answer."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from serve.api.errors import unsupported
from serve.api.nesting import check_levels

logger = logging.getLogger(__name__)

# Field -> values that change nothing; null never does. Any other value is refused until the field is honoured.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "tools": (),
    "tool_choice": ("none",),
    "functions": (),
    "function_call": ("none",),
    "use_beam_search": (False,),
    "suffix": ("",),
    "prompt_embeds": (),
    "logits_processors": ([],),
    "typical_p": (1,),
    "vllm_xargs": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "kv_transfer_params": (),
    "thinking_token_budget": (),
    "repetition_detection": (),
}
# Fields that say something about the caller or the transport and nothing about the answer.
WITHOUT_EFFECT = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "parallel_tool_calls",
        "include_reasoning",
        "spaces_between_special_tokens",
        "session_id",
        "stream_interval",
        "verbosity",
    )
)


class FieldLog:
    """Logs each unknown field's name once in the life of a server."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def unknown(self, names: Iterable[str]) -> None:
        """Notes unknown fields; only their first thousand, so that a client cannot fill the memory."""
        for name in names:
            if name not in self._seen and len(self._seen) < 1000:
                self._seen.add(name)
                logger.warning("unknown request field %.100r is ignored", name)


def check_extra(fields: Mapping[str, Any], log: FieldLog) -> None:
    """Looks at the fields that no model has.

    Raises:
        APIError: 400 that names a field which would change the answer if it were honoured, or is too deep.
    """
    for name, value in fields.items():
        if value is not None and value not in UNSUPPORTED.get(name, (value,)):
            raise unsupported(name)
    check_levels(fields)
    log.unknown(name for name in fields if name not in UNSUPPORTED and name not in WITHOUT_EFFECT)
