"""Options of `logprobd chat`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve.config.config import GROUPS, SCHEDULING, SamplingConfig
from serve.config.options import CommandLine, option
from serve.config.values import Between

if TYPE_CHECKING:
    from serve.engine.request import SamplingParams

_CHAT = "Chat"
_MAX_LENGTH = 1 << 24  # tokens
_EPILOG = """\
examples:
  logprobd chat                                       the default model
  logprobd chat model.gguf --temperature 0            a local file, greedy
  logprobd chat --system "Answer in one word." --seed 1
  echo "What is the capital of France?" | logprobd chat --log-format plain 2> log

Type /help in the chat for its commands.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig(SamplingConfig):
    """Options of a chat. For sampling, None means the model's default or, without one, OpenAI's."""

    needs_chat_template: bool = True

    max_num_seqs: int = option(SCHEDULING, "maximum number of running requests", Between(1, 1024), default=1)

    system: str | None = option(_CHAT, "system message")
    temperature: float | None = option(
        _CHAT, "0 takes the most likely token; default: the model's, or 1", Between(0.0, 2.0)
    )
    top_p: float | None = option(
        _CHAT, "sample from the most likely tokens with this total probability", Between(1e-9, 1.0)
    )
    top_k: int | None = option(_CHAT, "sample from the K most likely tokens; 0: no limit", Between(0, 1 << 31))
    min_p: float | None = option(
        _CHAT, "sample from tokens with at least this share of the highest probability", Between(0.0, 1.0)
    )
    repetition_penalty: float | None = option(
        _CHAT, "above 1: tokens that occurred before become less likely", Between(1e-30, 1e30)
    )
    max_tokens: int | None = option(_CHAT, "maximum length of a reply; default: the context", Between(1, _MAX_LENGTH))


# Field names shared by the options, a model's generation_config.json and SamplingParams.
_FROM_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_FROM_MODEL = (*_FROM_OPTIONS, "presence_penalty", "frequency_penalty")
_MIN_TEMPERATURE = 0.01  # if not 0


def parse_args(arguments: Sequence[str]) -> ChatConfig:
    """Parse the command line; a mistake exits with code 2 and names the flag."""
    line = CommandLine(
        ChatConfig,
        prog="logprobd chat",
        description="A chat in the terminal; each token's color shows how surprising it was to the model.",
        epilog=_EPILOG,
        order=GROUPS,
    )
    return line.read(arguments)


def sampling_params(config: ChatConfig, defaults: Mapping[str, Any], eos_token_ids: frozenset[int]) -> "SamplingParams":
    """The sampling parameters of replies.

    Args:
        defaults: the model's, by the names of request fields.
    """
    from serve.engine.request import SamplingParams  # imports numpy, which --help does not need

    fields = {name: defaults[name] for name in _FROM_MODEL if name in defaults}
    fields |= {name: value for name in _FROM_OPTIONS if (value := getattr(config, name)) is not None}
    fields["top_k"] = max(0, fields.get("top_k", 0))  # -1 also means no limit
    if fields.get("temperature"):
        fields["temperature"] = max(_MIN_TEMPERATURE, fields["temperature"])
    max_tokens = config.max_tokens or defaults.get("max_new_tokens") or _MAX_LENGTH
    return SamplingParams(max_tokens=max_tokens, stop_token_ids=eos_token_ids, **fields)
