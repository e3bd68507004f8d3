"""ServeConfig: what the command line says. Flags carry vLLM's names where vLLM has them."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve import __version__
from serve.memory import MemoryAmount, parse_memory

DEFAULT_MAX_LOGPROBS = 20
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
    quantization: str | None  # "int8"
    revision: str | None
    max_model_len: int | None  # None: the model's own
    max_num_seqs: int
    max_num_batched_tokens: int | None  # None: 256 and a row for each of max_num_seqs
    kv_cache_memory: MemoryAmount | None  # None: 1 GiB, or one request of full length
    enable_prefix_caching: bool
    max_logprobs: int  # -1: prompts may be scored on the whole vocabulary
    max_num_queued_reqs: int
    chat_template: str | None  # a file, or the template itself
    compilation_cache_dir: Path
    shutdown_timeout: int  # seconds

    @property
    def computed_logprobs(self) -> int:
        """K: alternatives that every step computes."""
        return DEFAULT_MAX_LOGPROBS if self.max_logprobs == -1 else self.max_logprobs

    @property
    def weights_as(self) -> str:
        """What the numbers of a matrix are: the quantization, or else the dtype."""
        return self.quantization or self.dtype

    @property
    def batched_tokens(self) -> int:
        """Prompt and decode tokens of one step at most."""
        return self.max_num_batched_tokens or 256 + self.max_num_seqs


def parse_args(arguments: Sequence[str] | None = None) -> ServeConfig:
    """Reads the command line; a mistake ends the process with code 2 and a line that names the flag."""
    parser = _parser()
    values = vars(parser.parse_args(arguments))
    if (tokens := values["max_num_batched_tokens"]) is not None and tokens < values["max_num_seqs"] + 16:
        parser.error(
            f"argument --max-num-batched-tokens: {tokens} leaves no room for 16 prompt tokens beside one for each of "
            f"--max-num-seqs {values['max_num_seqs']}"
        )
    if values["quantization"] and values["dtype"] != "bfloat16":
        parser.error(f"argument --quantization: int8 weights go with --dtype bfloat16, not {values['dtype']}")
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
    flag(
        "--quantization",
        choices=("int8",),
        help="of matrices: int8 with a scale for 32 weights, GGUF's Q8_0 taken as it is; default: none",
    )
    flag("--revision", help="branch, tag or commit of a hub id")
    flag("--max-model-len", type=_between(2, 1 << 24), help="tokens of prompt and output; default: the model's")
    flag("--max-num-seqs", type=_between(1, 1024), default=16, help="requests that run at once")
    flag(
        "--max-num-batched-tokens",
        type=_between(17, 1 << 20),
        help="prompt and decode tokens of one step; default: 256 and one for each of --max-num-seqs",
    )
    flag(
        "--kv-cache-memory",
        type=_memory,
        help="of the page cache: bytes, such as 800M or 2GiB, or a share of what the weights leave free, such as 0.5; "
        "default: 1GiB, or what one request of full length needs",
    )
    flag(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep full pages for prompts that begin alike",
    )
    flag(
        "--max-logprobs",
        type=_max_logprobs,
        default=DEFAULT_MAX_LOGPROBS,
        help="most alternatives per token; -1: 20, but prompt_logprobs may be any number, or -1 for all tokens",
    )
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


def _max_logprobs(text: str) -> int:
    return -1 if text == "-1" else _between(1, MAX_LOGPROBS_LIMIT)(text)


def _memory(text: str) -> MemoryAmount:
    try:
        return parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
