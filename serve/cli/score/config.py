"""What `python -m serve score` can be told."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve.config.config import GROUPS, EngineConfig
from serve.config.flags import check_engine
from serve.config.options import CommandLine, between, option

_FILES = "input and output"
_TEXTS = "texts and numbers"
_MOST = 1 << 40
_EPILOG = """\
input, told by FILE's extension, each also as .gz or .zst (but for .parquet):
  .jsonl    one JSON value a line: a string, or an object (any other extension is read so, too)
  .txt      one text a line; a whole file as one text: jq -Rs . FILE > FILE.jsonl
  .parquet  rows are lines, columns are fields
fields of an object, the first that it has:
  text                a text, token ids or messages; --text-field names another field
  prompt, completion  two of these of one kind: the completion is told apart
  messages            a chat; a last message by the assistant is told apart, as the completion
  token_ids           ids, scored as they are
  id                  is repeated in the output; tools: for the chat template

output: a row for each line, in order: line, id, token_ids, tokens, byte_lengths, logprobs, ranks (null for the first
token, before which nothing stands), top_token_ids and top_logprobs, num_tokens, num_scored, logprob (their sum),
perplexity and bits_per_byte; of a completion completion_start, completion_logprob, completion_perplexity, is_greedy. A
token that is a part of a character reads \\xNN; byte_lengths are those of the true bytes. -9999 is a probability of 0.

OUTPUT.meta.json says what the numbers were made with and, at the end, the totals. Until then rows are in
OUTPUT.partial. A run that was stopped or killed goes on where it was when the same command is given again; what would
not fit what is written (another model, other options, changed lines) is refused.

exit codes:
  0    every line is scored, or --on-error skip has told of those that are not
  1    a broken line, or the model or a file cannot be used; 2: a mistake in the flags
  130  Ctrl-C, 143 SIGTERM: what is scored is kept

examples:
  python -m serve score corpus.jsonl --dtype float32
  python -m serve score wiki.txt.gz --long window --output wiki.parquet
  python -m serve score pairs.jsonl --top-logprobs 20 --on-error skip
  python -m serve score docs.parquet --text-field body --no-per-token --output docs.scores.jsonl
"""
_SUFFIXES = (".gz", ".zst", ".jsonl", ".ndjson", ".json", ".txt", ".parquet")
# What may differ between a run and the one that it goes on with. What else changes bits is in the model's fingerprint.
_FREE = frozenset(
    {
        *(field.name for field in dataclasses.fields(EngineConfig)),
        *("file", "output", "on_error", "overwrite"),
    }
) - {"model", "tokenizer", "revision", "dtype", "quantization", "chat_template", "max_model_len"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig(EngineConfig):
    """Options of a scoring."""

    file: Path = option(
        _FILES, "what to score, see below", Path, default=dataclasses.MISSING, positional=True, metavar="FILE"
    )
    output: Path | None = option(_FILES, "default: FILE's name with .logprobs.jsonl", Path)
    format: str | None = option(_FILES, "default: what OUTPUT's extension says", choices=("jsonl", "parquet"))
    on_error: str = option(
        _FILES, "what a broken line does; each is told by its number", choices=("stop", "skip"), default="stop"
    )
    limit: int | None = option(_FILES, "score the first lines only", between(1, _MOST))
    overwrite: bool = option(_FILES, "begin anew, whatever is there", None, default=False)

    text_field: str | None = option(_TEXTS, "field that holds the text, the token ids or the messages", metavar="NAME")
    add_special_tokens: bool = option(
        _TEXTS, "what the model wants around a text, such as BOS; never around a chat", None, default=True
    )
    top_logprobs: int = option(_TEXTS, "alternatives of each token", between(0, 1024), default=0, metavar="K")
    per_token: bool = option(_TEXTS, "write each token's numbers; without, sums only", None, default=True)
    long: str = option(
        _TEXTS,
        "texts above --max-model-len: error, truncate (the first tokens that fit), window (every token is scored once, "
        "in windows that overlap)",
        choices=("error", "truncate", "window"),
        default="error",
    )
    stride: int | None = option(
        _TEXTS,
        "new tokens of each window but the first: fewer leave each more context and take longer; default: half of it",
        between(1, _MOST),
        metavar="TOKENS",
    )

    @property
    def writes_to(self) -> Path:
        """The output."""
        if self.output is not None:
            return self.output
        stem = self.file
        while stem.suffix in _SUFFIXES:
            stem = stem.with_suffix("")
        suffix = "parquet" if self.format == "parquet" else "jsonl"
        return stem.with_name(f"{stem.name}.logprobs.{suffix}")

    @property
    def writes_parquet(self) -> bool:
        """Whether the output is Parquet; else it is JSONL."""
        return (self.format or self.writes_to.suffix.removeprefix(".")) == "parquet"

    @property
    def engine(self) -> EngineConfig:
        """The same, with as many alternatives as are asked for."""
        most = max(self.computed_logprobs, self.top_logprobs)
        return replace(self, max_logprobs=most)

    def identity(self) -> dict[str, Any]:
        """What must be the same in a run that goes on with what this one has written; JSON values."""
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in _FREE}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in said.items()}
        return plain | {"format": "parquet" if self.writes_parquet else "jsonl"}


def parse_args(arguments: Sequence[str]) -> ScoreConfig:
    """Reads the command line; a mistake ends the process with code 2 and a line that names the flag."""
    line = CommandLine(
        ScoreConfig,
        prog="python -m serve score",
        description="Log-prob and rank of every token of a file, as JSONL or Parquet, and its perplexity.",
        epilog=_EPILOG,
        order=GROUPS,
    )
    config = line.read(arguments)
    check_engine(config, line.parser.error)
    if config.stride is not None and config.long != "window":
        line.parser.error("argument --stride: it goes with --long window")
    if config.top_logprobs and not config.per_token:
        line.parser.error("argument --top-logprobs: it goes with --per-token")
    if config.file.resolve() == config.writes_to.resolve():
        line.parser.error(f"argument --output: {config.writes_to} is what is to be scored")
    return config
