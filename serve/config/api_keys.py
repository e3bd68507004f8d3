"""API keys from where an operator keeps them: flags, a file, the environment."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_VARIABLES = ("LOGPROBD_API_KEY", "VLLM_API_KEY")


def api_key(text: str) -> str:
    """A key; raises argparse.ArgumentTypeError for what is none."""
    if not re.fullmatch(r"[\x21-\x7e]+", text):
        raise argparse.ArgumentTypeError("a key has one character at least, all of them ASCII and none a space")
    return text


def all_keys(said: Sequence[str], file: Path | None, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Those of the command line and the file; where there are none, those of the environment.

    Raises:
        ValueError: the file has none, or one is none: nobody means a key that is set and empty, which would open the
            server. The message names the flag or the variable.
    """
    keys = [*said, *([] if file is None else _in_file(file.expanduser()))]
    return tuple(keys or [_checked(environ[name], f"${name}") for name in _VARIABLES if name in environ])


def _in_file(path: Path) -> list[str]:
    """One a line; what begins with # is none."""
    where = f"argument --api-key-file: {path}"
    try:
        lines = [line.strip() for line in path.read_text(encoding="ascii").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{where}: it is no ASCII text") from None
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from None
    keys = [_checked(line, where) for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{where}: there is no key in it")
    return keys


def _checked(key: str, where: str) -> str:
    try:
        return api_key(key)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{where}: {error}") from None
