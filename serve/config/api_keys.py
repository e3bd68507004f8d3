"""API keys from flags, a file or the environment."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_VARIABLES = ("LOGPROBD_API_KEY", "VLLM_API_KEY")


def api_key(text: str) -> str:
    """A valid key; raises ValueError otherwise."""
    if not re.fullmatch(r"[\x21-\x7e]+", text):
        raise ValueError("a key must be non-empty ASCII text without spaces")
    return text


def all_keys(flags: Sequence[str], file: Path | None, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of the command line and the file or, if there are none, those of the environment.

    Raises:
        ValueError: the file has no key, or a key is invalid: an empty key must not open the server. The message names
            the flag or the variable.
    """
    keys = [*flags, *([] if file is None else _read(file.expanduser()))]
    return tuple(keys or [_checked(environ[name], f"${name}") for name in _VARIABLES if name in environ])


def _read(path: Path) -> list[str]:
    """One key per line; lines starting with # are comments."""
    source = f"argument --api-key-file: {path}"
    try:
        lines = [line.strip() for line in path.read_text(encoding="ascii").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{source}: not ASCII text") from None
    except OSError as error:
        raise ValueError(f"{source}: {error.strerror}") from None
    keys = [_checked(line, source) for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{source}: contains no key")
    return keys


def _checked(key: str, source: str) -> str:
    try:
        return api_key(key)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
