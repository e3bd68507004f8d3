"""Sampling fields, and their defaults from the model's generation_config.json, as in vLLM."""

import json
from pathlib import Path
from typing import Annotated, Any, Self, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_FILE = "generation_config.json"
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class SamplingFields(BaseModel):
    """Sampling fields of requests and of generation_config.json. SamplingParams has fields of the same names."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    # In float32 it must not be 0, nor make a logit infinite.
    repetition_penalty: Annotated[float, Field(ge=1e-30, le=1e30)] | None = None


class SamplingFieldKeywords(TypedDict, total=False):
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None


class DefaultsError(ValueError):
    """A file or flag of generation defaults is invalid; the message names it and the field."""


class GenerationDefaults(SamplingFields):
    """Values of fields that a request does not set; None means OpenAI's default."""

    model_config = ConfigDict(frozen=True)

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None  # of chats; for completions it is 16

    @classmethod
    def parse(cls, text: str | bytes, source: str) -> Self:
        """Read the fields above from a JSON object, and ignore the others that transformers writes.

        Raises:
            DefaultsError: not an object, or a field has an invalid value; the message starts with `source`.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DefaultsError(f"{source}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise DefaultsError(f"{source}: must be a JSON object")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise DefaultsError(f"{source}: {first['loc'][0]}: {first['msg']}") from None

    def fill[B: BaseModel](self, body: B) -> B:
        """A request with its unset fields filled."""
        missing = {name: value for name, value in self.as_dict().items() if getattr(body, name, value) is None}
        return body.model_copy(update=missing) if missing else body

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


def defaults_of(source: str, override: str, model: Path) -> GenerationDefaults:
    """The defaults of a server.

    Args:
        source: `auto` for the model's generation_config.json, if any; `vllm` for none; else the path of such a file or
            of its folder.
        override: JSON object whose values take precedence over the file's.
        model: the model's folder or file.

    Raises:
        DefaultsError: the file or the object is invalid.
    """
    overriding = GenerationDefaults.parse(override, "--override-generation-config")
    return _from_file(source, model).model_copy(update=overriding.as_dict())


def _from_file(source: str, model: Path) -> GenerationDefaults:
    if source == "vllm" or (source == "auto" and not (model / _FILE).is_file()):
        return GenerationDefaults()
    path = (model if source == "auto" else Path(source).expanduser()).resolve()
    path = path / _FILE if path.is_dir() else path
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DefaultsError(f"--generation-config: {path}: {error.strerror}") from None
    return GenerationDefaults.parse(text, str(path))
