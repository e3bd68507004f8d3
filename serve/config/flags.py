"""The command line of a server."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.layout import PAGE_SIZE
from serve.config.config import ServeConfig
from serve.config.options import CommandLine, argument_type
from serve.config.values import OneOf, api_key

if TYPE_CHECKING:
    from serve.config.api_keys import ApiKey

_KEY_VARIABLES = ("LOGPROBD_API_KEY", "VLLM_API_KEY")
_EPILOG = """\
examples:
  logprobd serve                                         the default model on 127.0.0.1:8000
  logprobd serve Qwen/Qwen2.5-0.5B-Instruct --port 9000  a model of the Hugging Face hub
  logprobd serve model-q4_k_m.gguf                       a local file, its weights as they are
  logprobd serve MODEL --dtype float32 --max-num-seqs 4  log-probs exact to 1e-4, for few clients
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
    "--block-size": str(PAGE_SIZE),
    "--load-format": "auto",
    "--tokenizer-mode": "auto",
    "--scheduling-policy": "priority",
    "--chat-template-content-format": "auto",
    "--stream-interval": "1",
    "--data-parallel-size": "1",
    "--api-server-count": "1",
}


def parse_args(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> ServeConfig:
    """Parse the command line; a mistake exits with code 2 and names the flag."""
    description = "OpenAI-compatible server of exact log-probabilities and ranks."
    return server_flags(ServeConfig, environ, prog="logprobd serve", description=description).read(arguments)


def server_flags[C: ServeConfig](
    kind: type[C], environ: Mapping[str, str], *, prog: str, description: str
) -> CommandLine[C]:
    """The flags of a server, including those of vLLM that have no effect; `environ` may have API keys."""

    def complete(values: dict[str, Any]) -> None:
        values["flag_keys"] = values.get("api_key", ())
        values["api_key"] = _all_keys(values.get("api_key", ()), values.get("api_key_file"), environ)

    line = CommandLine(kind, prog=prog, description=description, epilog=_EPILOG, positional="model", complete=complete)
    for name in _ALWAYS_ON:
        line.parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    for name, value in _ONE_VALUE.items():
        line.parser.add_argument(name, type=argument_type(OneOf((value,))), help=argparse.SUPPRESS)
    return line


def _all_keys(flags: Sequence[str], file: Path | None, environ: Mapping[str, str]) -> "tuple[str | ApiKey, ...]":
    """The keys of the command line and the file or, if there are none, those of the environment.

    Raises ValueError for a file without keys and for an invalid key: an empty key must not open the server.
    """
    keys: Sequence[str | ApiKey] = flags
    if file is not None:
        from serve.config.api_keys import all_keys  # pydantic is not needed to print --help

        keys = all_keys(flags, file)
    return tuple(keys or [api_key(environ[name], f"${name}: ") for name in _KEY_VARIABLES if name in environ])
