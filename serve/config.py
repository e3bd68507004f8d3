"""ServeConfig: what the command line says. Flags carry vLLM's names where vLLM has them."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve import __version__

MAX_LOGPROBS_LIMIT = 1024  # a program with a larger top-k would be slow for every request


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Options of one server."""

    model: str | None  # hub id, directory or .gguf file; None is the default model
    host: str
    port: int
    api_key: tuple[str, ...]
    served_model_name: tuple[str, ...]  # empty: the model as named
    dtype: str  # "bfloat16" or "float32"
    revision: str | None
    max_model_len: int | None  # None: the model's own
    max_num_seqs: int
    max_logprobs: int
    max_num_queued_reqs: int
    chat_template: str | None  # a file, or the template itself
    compilation_cache_dir: Path
    shutdown_timeout: int  # seconds


def parse_args(arguments: Sequence[str] | None = None) -> ServeConfig:
    """Reads the command line; a mistake ends the process with code 2 and a line that names the flag."""
    values = vars(_parser().parse_args(arguments))
    values["api_key"] = tuple(values["api_key"])
    values["served_model_name"] = tuple(values["served_model_name"])
    return ServeConfig(**values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve",
        description="OpenAI-compatible server of exact log-probabilities.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument
    flag("model", nargs="?", help="hub id, local directory or .gguf file; nothing: SmolLM2-135M-Instruct")
    flag("--host", default="127.0.0.1", help="address to listen on")
    flag("--port", type=_between(0, 65535), default=8000, help="port to listen on; 0 picks a free one")
    flag("--api-key", action="append", default=[], help="a key that clients must send; may be given again")
    flag("--served-model-name", action="append", default=[], help="name in the API; may be given again")
    flag("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of weights and cache")
    flag("--revision", help="branch, tag or commit of a hub id")
    flag("--max-model-len", type=_between(2, 1 << 24), help="tokens of prompt and output; default: the model's")
    flag("--max-num-seqs", type=_between(1, 1024), default=16, help="requests that run at once")
    flag("--max-logprobs", type=_between(1, MAX_LOGPROBS_LIMIT), default=20, help="most alternatives per token")
    flag("--max-num-queued-reqs", type=_between(1, 1 << 20), default=1024, help="unfinished requests before 429")
    flag("--chat-template", help="a Jinja file, or the template itself, instead of the model's")
    flag("--compilation-cache-dir", type=Path, default=Path("~/.cache/logprobd/xla"), help="kept executables")
    flag("--shutdown-timeout", type=_between(0, 3600), default=30, help="seconds that running requests get at the end")
    parser.add_argument("--version", action="version", version=f"logprobd {__version__}")
    return parser


def _between(low: int, high: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
        return value

    return integer
