"""ApiKey: a client's key with its name, role and limits; and the file of keys."""

import hashlib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve.config.values import api_key

_TABLE = re.compile(r"\[+\s*keys?\s*\]+")  # first line of a file of entries
_AUTOMATIC_NAME = re.compile(r"key\d+")  # of keys without an entry
_Limit = Annotated[int, Field(ge=1, le=1 << 40)]


class ApiKey(BaseModel):
    """An entry of the key file. The name identifies the client: limits and cached prompts follow it to a new key."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9A-Fa-f]{64}$")] | None = None  # of the key, instead of it
    key: Annotated[str, AfterValidator(api_key)] | None = Field(None, repr=False)
    role: Literal["user", "admin"] = "user"
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    max_bodies: _Limit | None = None  # requests with a body that are in progress
    min_priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.sha256 is None) == (self.key is None):
            raise ValueError("needs either `sha256` or `key`")
        if _AUTOMATIC_NAME.fullmatch(self.name):
            raise ValueError(f"the name {self.name!r} is reserved for keys without a name")
        return self

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256) if self.sha256 is not None else digest(self.key or "")


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    keys: list[ApiKey]


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def all_keys(flags: Sequence[str | ApiKey], path: Path) -> list[str | ApiKey]:
    """The keys of the command line and the file. Raises ValueError if an entry's name or key is used twice."""
    keys = [*flags, *keys_in(path)]
    entries = [key for key in keys if isinstance(key, ApiKey)]
    digests = [digest(key) if isinstance(key, str) else key.digest for key in keys]
    names = [entry.name for entry in entries]
    for entry in entries:
        if names.count(entry.name) > 1 or digests.count(entry.digest) > 1:
            what = "name" if names.count(entry.name) > 1 else "key"
            raise ValueError(f"argument --api-key-file: {path}: the {what} of {entry.name!r} is used twice")
    return keys


def keys_in(path: Path) -> list[str | ApiKey]:
    """The keys of a file: TOML with a table `[[keys]]` for each, or one key per line; # starts a comment.

    Raises ValueError, whose message shows no key.
    """
    path = path.expanduser()
    source = f"argument --api-key-file: {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{source}: not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{source}: {error.strerror}") from None
    lines = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"{source}: contains no key")
    if not _TABLE.match(lines[0]):
        return [api_key(line, f"{source}: ") for line in lines]
    try:
        return [*_File.model_validate(tomllib.loads(text)).keys]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{source}: not valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        reason = "unknown field" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{source}: {place}: {reason}") from None
