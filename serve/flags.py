"""The command line, and files that stand for it. Flags carry vLLM's names where vLLM has them."""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from serve import __version__
from serve.config import DEFAULT_MAX_LOGPROBS, ServeConfig
from serve.memory import MemoryAmount, parse_memory

_MAX_LOGPROBS_LIMIT = 1024  # a program with a larger top-k would be slow for every request
_KEY_VARIABLES = ("LOGPROBD_API_KEY", "VLLM_API_KEY")
_LISTS = ("api_key", "served_model_name")
# What vLLM switches with these is always so here: they are taken, so that its command lines work.
_ALWAYS_SO = (
    "--enable-chunked-prefill",
    "--enable-prompt-tokens-details",
    "--enable-request-id-headers",
    "--enable-tokenizer-info-endpoint",
    "--enable-server-load-tracking",
    "--disable-uvicorn-access-log",
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
    parser = _parser()
    files, _ = _file_parser().parse_known_args(arguments)
    said = {} if files.config is None else _from_file(files.config, parser)
    parser.set_defaults(**{name: value for name, value in said.items() if name not in _LISTS})
    values = vars(parser.parse_args(arguments))
    for name in _LISTS:  # argparse would add to a default
        values[name] = values[name] or said.get(name, [])
    del values["config"], values["always_so"]
    _check(parser, values)
    values["api_key"] = tuple(values["api_key"] or [environ[name] for name in _KEY_VARIABLES if environ.get(name)])
    values["served_model_name"] = tuple(values["served_model_name"])
    return ServeConfig(**values)


def _check(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> None:
    if (tokens := values["max_num_batched_tokens"]) is not None and tokens < values["max_num_seqs"] + 16:
        parser.error(
            f"argument --max-num-batched-tokens: {tokens} leaves no room for 16 prompt tokens beside one for each of "
            f"--max-num-seqs {values['max_num_seqs']}"
        )
    if values["quantization"] and values["dtype"] == "float32":
        parser.error("argument --quantization: int8 weights go with --dtype bfloat16, not float32")
    if (values["ssl_keyfile"] is None) != (values["ssl_certfile"] is None):
        parser.error("argument --ssl-keyfile: it goes with --ssl-certfile")


def _from_file(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Values of a YAML file, read as the flags read them; the command line stands over them."""
    try:
        said = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"argument --config: {path}: {str(error).splitlines()[0]}")
    if not isinstance(said, dict):
        parser.error(f"argument --config: {path}: must be a mapping of flags to values")
    return vars(parser.parse_args(words_of(said)))


def words_of(said: Mapping[str, Any]) -> list[str]:
    """The command line that says what a mapping of flags to values says; an underscore may stand for a hyphen."""
    words = []
    for key, value in said.items():
        flag = "--" + str(key).replace("_", "-")
        if value is None:
            continue
        if flag == "--model":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list) and flag[2:].replace("-", "_") in _LISTS:
            words += [word for each in value for word in (flag, str(each))]
        else:
            words.append(f"{flag}={json.dumps(value) if isinstance(value, list | dict) else value}")
    return words


def _file_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="YAML file of flags; the command line stands over it")
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells a default where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default not in (None, [], False, "", argparse.SUPPRESS)
        return super()._get_help_string(action) if told else action.help


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve",
        description="OpenAI-compatible server of exact log-probabilities.",
        formatter_class=_Help,
        allow_abbrev=False,
        parents=[_file_parser()],
    )
    flag = parser.add_argument
    flag("model", nargs="?", help="hub id, local directory or .gguf file; nothing: SmolLM2-135M-Instruct")
    flag("--tokenizer", type=Path, help="local directory or .gguf file; default: the model's own")
    flag("--host", default="127.0.0.1", help="address to listen on")
    flag("--port", type=between(0, 65535), default=8000, help="port to listen on; 0 picks a free one")
    flag("--uds", type=Path, help="listen on this Unix socket instead of host and port")
    flag("--ssl-keyfile", type=Path, help="serve HTTPS with this key")
    flag("--ssl-certfile", type=Path, help="and this certificate")
    flag("--root-path", default="", help="path under which a proxy serves this")
    flag("--allowed-origins", type=_strings, default='["*"]', help="for CORS, as a JSON list")
    flag("--allowed-methods", type=_strings, default='["*"]', help="for CORS, as a JSON list")
    flag("--allowed-headers", type=_strings, default='["*"]', help="for CORS, as a JSON list")
    flag("--allow-credentials", action=argparse.BooleanOptionalAction, default=False, help="for CORS")
    flag(
        "--api-key",
        action="append",
        default=[],
        help="a key that clients must send; may be given again; default: $LOGPROBD_API_KEY and $VLLM_API_KEY",
    )
    flag("--served-model-name", action="append", default=[], help="name in the API; may be given again")
    flag(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of weights and cache; auto: float32 for a model that is stored so, else bfloat16",
    )
    flag(
        "--quantization",
        choices=("int8",),
        help="of matrices: int8 with a scale for 32 weights, GGUF's Q8_0 taken as it is; default: none",
    )
    flag("--revision", help="branch, tag or commit of a hub id")
    flag("--max-model-len", type=between(2, 1 << 24), help="tokens of prompt and output; default: the model's")
    flag("--tensor-parallel-size", type=between(1, 1024), default=1, help="devices over which the model is cut")
    flag("--max-num-seqs", type=between(1, 1024), default=16, help="requests that run at once")
    flag(
        "--max-num-batched-tokens",
        type=between(17, 1 << 20),
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
    flag("--max-num-queued-reqs", type=between(1, 1 << 20), default=1024, help="unfinished requests before 429")
    flag("--max-num-queued-tokens", type=between(1, 1 << 40), help="their prompt tokens before 429; default: no limit")
    flag(
        "--seed",
        type=between(0, (1 << 63) - 1),
        help="of what requests without a seed draw; default: another each start",
    )
    flag(
        "--logprobs-mode",
        choices=("raw_logprobs", "processed_logprobs"),
        default="raw_logprobs",
        help="numbers of generated tokens: before or after penalties, masks, temperature and filters",
    )
    flag(
        "--return-tokens-as-token-ids",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="write tokens as token_id:123",
    )
    flag(
        "--generation-config", default="auto", help="defaults of requests: auto (the model's file), vllm (none), a path"
    )
    flag("--override-generation-config", default="{}", help="JSON object that stands over that file")
    flag("--chat-template", help="a Jinja file, or the template itself, instead of the model's")
    flag(
        "--trust-request-chat-template",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="take templates from requests",
    )
    flag("--response-role", default="assistant", help="role of replies")
    flag(
        "--enable-force-include-usage",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="end every stream with its usage",
    )
    flag(
        "--disable-fastapi-docs",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="no /docs and no /openapi.json",
    )
    flag(
        "--vllm-metrics",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="every number of /metrics under vLLM's name, too",
    )
    flag(
        "--enable-log-requests",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="log each request: its id, prompt and fields",
    )
    flag("--max-log-len", type=between(0, 1 << 30), help="characters of a prompt in that log; default: all")
    flag("--uvicorn-log-level", choices=("critical", "error", "warning", "info", "debug", "trace"), default="warning")
    flag("--compilation-cache-dir", type=Path, default=Path("~/.cache/logprobd/xla"), help="kept executables")
    flag("--shutdown-timeout", type=between(0, 3600), default=30, help="seconds that running requests get at the end")
    for name in _ALWAYS_SO:
        flag(name, action="store_true", dest="always_so", help=argparse.SUPPRESS)
    for name, value in _ONE_VALUE.items():
        flag(name, choices=(value,), dest="always_so", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"logprobd {__version__}")
    return parser


def between(low: int, high: int) -> Callable[[str], int]:
    """The type of an integer flag within bounds."""

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
    return -1 if text == "-1" else between(1, _MAX_LOGPROBS_LIMIT)(text)


def _memory(text: str) -> MemoryAmount:
    try:
        return parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _strings(text: str) -> tuple[str, ...]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON list of strings, such as ["*"]')
    return tuple(value)
