"""Options of `logprobd score`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from serve.cli.batch.config import FILES, MAX_COUNT, BatchConfig
from serve.config.engine_config import QUEUE_LIMITS, SAMPLING_DEFAULTS, EngineConfig
from serve.config.options import CommandLine, option, switch
from serve.config.values import Between, OneOf

_TEXTS = "Texts and log-probs"
_EPILOG = """\
input formats, by FILE's extension; all but .parquet may also be .gz or .zst:
  .jsonl    one JSON value per line: a string or an object (also the default for other extensions)
  .txt      one text per line; to score a file as one text: jq -Rs . FILE > FILE.jsonl
  .parquet  one row per text, columns are fields
fields of an object; the first one present is scored:
  text                a text, token ids or messages; --text-field names another field
  prompt, completion  both texts, token ids or messages; the completion also gets its own totals
  messages            a chat; a final assistant message is treated as the completion
  token_ids           token ids, scored unchanged
  id is copied to the output; tools are passed to the chat template

output: one row per input line, in order: line, id, token_ids, tokens, byte_lengths, logprobs, ranks (null for the first
token, which has no context), top_token_ids and top_logprobs, num_tokens, num_scored, logprob (the sum), perplexity and
bits_per_byte; for a completion also completion_start, completion_logprob, completion_perplexity and is_greedy. Bytes
that are not complete characters are shown as \\xNN; byte_lengths count the original bytes. -9999 means probability 0.
CSV has the columns of one value per line.

OUTPUT.meta.json records the model and the options and, at the end, the totals. Until then, rows are in OUTPUT.partial.
Run the same command again to resume. A run with another model, other options or changed lines is refused.

exit codes:
  0    every line is scored, or --on-error skip reported those that are not
  1    a malformed line, or an unusable model or file
  2    a mistake in the flags
  130  Ctrl-C; finished rows are kept
  143  SIGTERM; finished rows are kept

examples:
  logprobd score corpus.jsonl --dtype float32
  logprobd score wiki.txt.gz --long window --output wiki.parquet
  logprobd score pairs.jsonl --top-logprobs 20 --on-error skip
  logprobd score docs.parquet --text-field body --no-per-token --output docs.scores.jsonl
"""
_FORMATS = ("jsonl", "csv", "parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig(BatchConfig):
    resumable: ClassVar[frozenset[str]] = BatchConfig.resumable | {"on_error"}

    output: Path | None = option(FILES, "default: FILE's name with .logprobs.jsonl", Path)
    format: str | None = option(FILES, "output format; default: by OUTPUT's extension", OneOf(_FORMATS))
    on_error: str = option(
        FILES,
        "stop at a malformed line, or skip it; each is reported by number",
        OneOf(("stop", "skip")),
        default="stop",
    )

    text_field: str | None = option(_TEXTS, "field that holds the text, token ids or messages", metavar="NAME")
    add_special_tokens: bool = switch(
        _TEXTS, "add the model's special tokens, such as BOS, to texts; never to chats", default=True
    )
    top_logprobs: int = option(_TEXTS, "number of alternatives per token", Between(0, 1024), default=0, metavar="K")
    per_token: bool = switch(_TEXTS, "write log-probs of each token, not only sums", default=True)
    long: str = option(
        _TEXTS,
        "texts above --max-model-len: error, truncate (keep the first tokens) or window (score every token once, in "
        "overlapping windows)",
        OneOf(("error", "truncate", "window")),
        default="error",
    )
    stride: int | None = option(
        _TEXTS,
        "new tokens per window after the first; smaller: more context per token, but slower; default: half a window",
        Between(1, MAX_COUNT),
        metavar="TOKENS",
    )

    def __post_init__(self) -> None:
        BatchConfig.__post_init__(self)
        if self.stride is not None and self.long != "window":
            raise ValueError("argument --stride: requires --long window")
        if self.top_logprobs and not self.per_token:
            raise ValueError("argument --top-logprobs: requires --per-token")
        if self.top_logprobs and not self.writes_tokens:
            raise ValueError("argument --top-logprobs: CSV has only the sums of each line; write .jsonl or .parquet")

    @property
    def output_suffix(self) -> str:
        return f".logprobs.{self.format or 'jsonl'}"

    @property
    def output_format(self) -> str:
        """Format of the output: --format, or else the one that its extension names, or else jsonl."""
        suffix = self.output_path.suffix.removeprefix(".")
        return self.format or (suffix if suffix in _FORMATS else "jsonl")

    @property
    def writes_tokens(self) -> bool:
        """True if a row has the values of each token; CSV has only the sums."""
        return self.per_token and self.output_format != "csv"

    @property
    def engine(self) -> EngineConfig:
        """The engine's options, with max_logprobs of at least top_logprobs and without sampling defaults."""
        return replace(self, max_logprobs=max(self.computed_logprobs, self.top_logprobs), generation_config="vllm")


def parse_args(arguments: Sequence[str]) -> ScoreConfig:
    line = CommandLine(
        ScoreConfig,
        prog="logprobd score",
        description="Log-prob and rank of every token of a file, as JSONL, CSV or Parquet, and its perplexity.",
        epilog=_EPILOG,
        positional="file",
        exclude=(*SAMPLING_DEFAULTS, *QUEUE_LIMITS),
    )
    return line.read(arguments)
