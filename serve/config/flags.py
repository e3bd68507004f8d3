"""The command line of a server, and files that stand for it. Flags carry vLLM's names where vLLM has them."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from serve import __version__
from serve.config.api_keys import all_keys
from serve.config.config import GROUPS, EngineConfig, ServeConfig
from serve.config.options import CommandLine

_EPILOG = """\
commands without a server, each with its own --help:
  python -m serve score FILE      log-prob and rank of every token of a file
  python -m serve chat            a chat in this terminal, its tokens coloured by surprise

examples:
  python -m serve                                         the default model on 127.0.0.1:8000
  python -m serve Qwen/Qwen2.5-0.5B-Instruct --port 9000  a model of the hub
  python -m serve model-q8_0.gguf --quantization int8     a file of this machine, in half the memory
  python -m serve --dtype float32 --max-num-seqs 4        numbers to 1e-4, for few clients
  LOGPROBD_API_KEY=... python -m serve --host 0.0.0.0     for other machines, who need the key
  python -m serve --config serve.yaml --log-format json   flags from a file, logs for a machine
"""
# What vLLM switches with these is always so here: they are taken, so that its command lines work.
_ALWAYS_SO = (
    "--enable-chunked-prefill",
    "--enable-prompt-tokens-details",
    "--enable-request-id-headers",
    "--enable-tokenizer-info-endpoint",
    "--enable-server-load-tracking",
)

# And these have one value here, which is taken.
_ONE_VALUE = {
    "--block-size": "64",
    "--kv-cache-dtype": "auto",
    "--load-format": "auto",
    "--tokenizer-mode": "auto",
    "--scheduling-policy": "priority",
    "--chat-template-content-format": "auto",
    "--stream-interval": "1",
    "--data-parallel-size": "1",
    "--api-server-count": "1",
}


def parse_args(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> ServeConfig:
    """Reads the command line; a mistake ends the process with code 2 and a line that names the flag.

    Args:
        arguments: those of the process, if None.
        environ: may hold API keys.
    """
    return read_server(command_line(), arguments, environ)


def read_server[C: ServeConfig](line: CommandLine[C], arguments: Sequence[str] | None, environ: Mapping[str, str]) -> C:
    """Read the flags of a server and check them; see `parse_args`."""
    config = line.read(arguments)
    check_engine(config, line.parser.error)
    if (config.ssl_keyfile is None) != (config.ssl_certfile is None):
        line.parser.error("argument --ssl-keyfile: it goes with --ssl-certfile")
    if config.ssl_ca_certs is not None and config.ssl_certfile is None:
        line.parser.error("argument --ssl-ca-certs: it goes with --ssl-certfile")
    try:
        keys = all_keys(config.api_key, config.api_key_file, environ)
    except ValueError as error:
        line.parser.error(str(error))
    if config.prefix_cache_per_key and not keys:
        line.parser.error("argument --prefix-cache-per-key: there are no API keys")
    return replace(config, api_key=keys)


def command_line() -> CommandLine[ServeConfig]:
    """The flags of a server."""
    return server_flags(
        ServeConfig,
        prog="python -m serve",
        description="OpenAI-compatible server of exact log-probabilities and ranks.",
        epilog=_EPILOG,
    )


def server_flags[C: ServeConfig](
    kind: type[C], *, prog: str, description: str, epilog: str | None = None
) -> CommandLine[C]:
    """The flags of a kind of server, including the flags of vLLM that are accepted without effect."""
    line = CommandLine(kind, prog=prog, description=description, epilog=epilog, order=GROUPS)
    line.parser.add_argument("--version", action="version", version=f"logprobd {__version__}")
    for name in _ALWAYS_SO:
        line.parser.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    for name, value in _ONE_VALUE.items():
        line.parser.add_argument(name, choices=(value,), default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return line


class Refuse(Protocol):
    """Ends the process, as argparse does for a mistake."""

    def __call__(self, message: str) -> object:
        """`message` names the flag."""


def check_engine(config: EngineConfig, refuse: Refuse) -> None:
    """Refuses flags of an engine that contradict each other."""
    if (tokens := config.max_num_batched_tokens) is not None and tokens < config.max_num_seqs + 16:
        refuse(
            f"argument --max-num-batched-tokens: {tokens} leaves no room for 16 prompt tokens beside one for each of "
            f"--max-num-seqs {config.max_num_seqs}"
        )
    if config.quantization and config.dtype == "float32":
        refuse("argument --quantization: int8 weights go with --dtype bfloat16, not float32")
