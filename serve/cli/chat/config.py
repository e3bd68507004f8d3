"""Options of `logprobd chat`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from serve.config.engine_config import QUEUE_LIMITS, EngineConfig
from serve.config.options import CommandLine, option, with_default
from serve.config.values import Between

_CHAT = "Chat"
_EPILOG = """\
examples:
  logprobd chat                                       the default model
  logprobd chat model.gguf --temperature 0            a local file, greedy
  logprobd chat --system "Answer in one word." --seed 1
  echo "What is the capital of France?" | logprobd chat --log-format plain 2> log

Type /help in the chat for its commands.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig(EngineConfig):
    """Options of a chat. For sampling, None means the model's default or, without one, OpenAI's."""

    needs_chat_template: ClassVar[bool] = True

    max_num_seqs: int = with_default(EngineConfig, "max_num_seqs", 1)

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
    max_tokens: int | None = option(_CHAT, "maximum length of a reply; default: the context", Between(1, 1 << 24))


def parse_args(arguments: Sequence[str]) -> ChatConfig:
    line = CommandLine(
        ChatConfig,
        prog="logprobd chat",
        description="A chat in the terminal; each token's color shows how surprising it was to the model.",
        epilog=_EPILOG,
        positional="model",
        exclude=QUEUE_LIMITS,
    )
    return line.read(arguments)
