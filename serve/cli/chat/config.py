"""What `python -m serve chat` can be told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.config.config import GROUPS, SamplingConfig
from serve.config.flags import check_engine
from serve.config.options import CommandLine, between, option
from serve.engine.request import SamplingParams

_CHAT = "chat"
_ENGINE = "batches and memory"
_ANY_LENGTH = 1 << 24  # tokens
_EPILOG = """\
examples:
  python -m serve chat                                        the default model
  python -m serve chat --model model.gguf --temperature 0     a file of this machine, greedy
  python -m serve chat --system "Answer in one word." --seed 1
  echo "What is the capital of France?" | python -m serve chat --log-format plain 2> log

Type /help in the chat for its commands.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig(SamplingConfig):
    """Options of a chat. Of sampling, None leaves the model's default, or else OpenAI's."""

    needs_chat_template: bool = True

    max_num_seqs: int = option(_ENGINE, "requests that run at once", between(1, 1024), default=1)

    system: str | None = option(_CHAT, "a message that comes before all others")
    temperature: float | None = option(
        _CHAT, "0 takes the most likely token; default: the model's, or 1", between(0.0, 2.0)
    )
    top_p: float | None = option(_CHAT, "draw from the most likely tokens that have this share", between(1e-9, 1.0))
    top_k: int | None = option(_CHAT, "draw from so many tokens; 0: from all", between(0, 1 << 31))
    min_p: float | None = option(_CHAT, "draw from tokens that have this share of the likeliest's", between(0.0, 1.0))
    repetition_penalty: float | None = option(_CHAT, "above 1: what was said becomes less likely", between(1e-30, 1e30))
    max_tokens: int | None = option(_CHAT, "of a reply; default: as many as fit", between(1, _ANY_LENGTH))


# Names that an option, a model's generation_config.json and SamplingParams have in common.
_FROM_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_FROM_MODEL = (*_FROM_OPTIONS, "presence_penalty", "frequency_penalty")
_COOLEST = 0.01  # temperature above 0


def parse_args(arguments: Sequence[str]) -> ChatConfig:
    """Reads the command line; a mistake ends the process with code 2 and a line that names the flag."""
    line = CommandLine(
        ChatConfig,
        prog="python -m serve chat",
        description="A chat in the terminal; every token is coloured by how surprising it was to the model.",
        epilog=_EPILOG,
        order=GROUPS,
    )
    config = line.read(arguments)
    check_engine(config, line.parser.error)
    return config


def sampling_params(config: ChatConfig, defaults: Mapping[str, Any], eos_token_ids: frozenset[int]) -> SamplingParams:
    """How replies are drawn.

    Args:
        defaults: of the model, by the names that a request would give them.
    """
    said = {name: defaults[name] for name in _FROM_MODEL if name in defaults}
    said |= {name: value for name in _FROM_OPTIONS if (value := getattr(config, name)) is not None}
    said["top_k"] = max(0, said.get("top_k", 0))  # -1 is off, too
    if said.get("temperature"):
        said["temperature"] = max(_COOLEST, said["temperature"])
    most = config.max_tokens or defaults.get("max_new_tokens") or _ANY_LENGTH
    return SamplingParams(max_tokens=most, stop_token_ids=eos_token_ids, **said)
