"""What a request is given where it says nothing: the model's own generation_config.json, as vLLM takes it."""

import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_FILE = "generation_config.json"
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class SamplingFields(BaseModel):
    """Sampling parameters for which a model may bring defaults."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    # In float32 it must be neither 0 nor so large that a logit times it is infinite.
    repetition_penalty: Annotated[float, Field(ge=1e-30, le=1e30)] | None = None


class DefaultsError(ValueError):
    """A file or option of generation defaults is wrong; the message names it and the field."""


class GenerationDefaults(SamplingFields):
    """Values for fields that a request leaves out; None leaves OpenAI's default."""

    model_config = ConfigDict(frozen=True)

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None  # of a chat; a completion has 16

    @classmethod
    def read(cls, values: Any, where: str) -> Self:
        """Takes the fields that it knows from a JSON object; transformers writes many others.

        Raises:
            DefaultsError: no object, or a known field whose value is wrong. `where` names the source.
        """
        if not isinstance(values, dict):
            raise DefaultsError(f"{where}: must be a JSON object")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise DefaultsError(f"{where}: {first['loc'][0]}: {first['msg']}") from None

    def under(self, other: "GenerationDefaults") -> "GenerationDefaults":
        """These, but for what the other sets."""
        return self.model_copy(update=other.model_dump(exclude_none=True))

    def fill[B: BaseModel](self, body: B) -> B:
        """The request with its gaps filled."""
        missing = {name: value for name, value in self.said().items() if getattr(body, name, value) is None}
        return body.model_copy(update=missing) if missing else body

    def said(self) -> dict[str, Any]:
        """What is set."""
        return self.model_dump(exclude_none=True)


def defaults_of(source: str, override: str, model: Path) -> GenerationDefaults:
    """The defaults of a server.

    Args:
        source: `auto` takes the model's generation_config.json if it has one, `vllm` takes nothing, anything else is
            that file or a folder that holds one.
        override: a JSON object whose values stand over the file's.
        model: the model's folder or file.

    Raises:
        DefaultsError: a file or the object cannot be read.
    """
    try:
        over = GenerationDefaults.read(json.loads(override), "--override-generation-config")
    except json.JSONDecodeError as error:
        raise DefaultsError(f"--override-generation-config: not JSON: {error}") from None
    return _from_file(source, model).under(over)


def _from_file(source: str, model: Path) -> GenerationDefaults:
    if source == "vllm" or (source == "auto" and not (model / _FILE).is_file()):
        return GenerationDefaults()
    path = (model if source == "auto" else Path(source).expanduser()).resolve()
    path = path / _FILE if path.is_dir() else path
    try:
        return GenerationDefaults.read(json.loads(path.read_bytes()), str(path))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DefaultsError):
            raise
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise DefaultsError(f"--generation-config: {path}: {reason}") from None
