"""Options of commands that write one row per line of a file."""

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from serve.config.engine_config import EngineConfig
from serve.config.options import option, switch
from serve.config.values import Between

FILES = "Input and output"
MAX_COUNT = 1 << 40
_SUFFIXES = (".gz", ".zst", ".jsonl", ".ndjson", ".json", ".txt", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig(EngineConfig):
    # Options that may differ between an unfinished run and the one that resumes it. What else changes the results is in
    # `identity` or in the model's fingerprint.
    resumable: ClassVar[frozenset[str]] = frozenset(field.name for field in dataclasses.fields(EngineConfig)).union(
        ("file", "output", "overwrite")
    ) - {"model", "tokenizer", "revision", "dtype", "kv_cache_dtype", "quantization", "chat_template", "max_model_len"}

    file: Path = option(FILES, "input file, see below", Path, default=dataclasses.MISSING)
    output: Path | None = option(FILES, "default: FILE's name with another extension", Path)
    limit: int | None = option(FILES, "read only the first N lines", Between(1, MAX_COUNT))
    overwrite: bool = switch(FILES, "replace existing output instead of resuming")

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        if self.file.resolve() == self.output_path.resolve():
            raise ValueError(f"argument --output: {self.output_path} is the input file")

    @property
    def output_suffix(self) -> str:
        """End of the default output's name."""
        return ".out.jsonl"

    @property
    def output_format(self) -> str:
        return "jsonl"

    @property
    def output_path(self) -> Path:
        if self.output is not None:
            return self.output
        stem = self.file
        while stem.suffix in _SUFFIXES:
            stem = stem.with_suffix("")
        return stem.with_name(stem.name + self.output_suffix)

    @property
    def engine(self) -> EngineConfig:
        """The engine's options, without sampling defaults."""
        return replace(self, generation_config="vllm")

    def identity(self) -> dict[str, Any]:
        """Options that a resumed run must repeat, as JSON values."""
        options = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in self.resumable
        }
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        return plain | {"format": self.output_format}
