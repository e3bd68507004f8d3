"""The command line of a server."""

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from serve.config.api_keys import all_keys
from serve.config.config import GROUPS, ServeConfig
from serve.config.options import CommandLine, argument_type
from serve.config.values import OneOf

_EPILOG = """\
examples:
  logprobd serve                                         the default model on 127.0.0.1:8000
  logprobd serve Qwen/Qwen2.5-0.5B-Instruct --port 9000  a model of the Hugging Face hub
  logprobd serve model-q8_0.gguf --quantization int8     a local file, in half the memory
  logprobd serve --dtype float32 --max-num-seqs 4        log-probs exact to 1e-4, for few clients
  LOGPROBD_API_KEY=... logprobd serve --host 0.0.0.0     for other machines; clients need the key
  logprobd serve --config serve.yaml --log-format json   flags from a file, logs as JSON
"""
# vLLM's switches of features that are always on here, accepted so that its command lines work.
_ALWAYS_ON = (
    "--enable-chunked-prefill",
    "--enable-prompt-tokens-details",
    "--enable-request-id-headers",
    "--enable-tokenizer-info-endpoint",
    "--enable-server-load-tracking",
)

# vLLM's options of which one value is supported here.
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
    """Parse the command line; a mistake exits with code 2 and names the flag.

    Args:
        arguments: by default those of the process.
        environ: may hold API keys.
    """
    line = server_flags(
        ServeConfig, prog="logprobd serve", description="OpenAI-compatible server of exact log-probabilities and ranks."
    )
    return line.read(arguments, lambda values: add_api_keys(values, environ))


def server_flags[C: ServeConfig](kind: type[C], *, prog: str, description: str) -> CommandLine[C]:
    """The flags of a server, those of vLLM that have no effect included."""
    line = CommandLine(kind, prog=prog, description=description, epilog=_EPILOG, order=GROUPS)
    for name in _ALWAYS_ON:
        line.parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    for name, value in _ONE_VALUE.items():
        line.parser.add_argument(name, type=argument_type(OneOf((value,))), help=argparse.SUPPRESS)
    return line


def add_api_keys(values: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Complete the flags of a server by the keys of --api-key-file or the environment.

    Raises:
        ValueError: a key is invalid; the message names its source.
    """
    values["api_key"] = all_keys(values.get("api_key", ()), values.get("api_key_file"), environ)
