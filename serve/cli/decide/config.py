"""Options of `logprobd decide`."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from serve.cli.batch.config import FILES, BatchConfig
from serve.config.engine_config import QUEUE_LIMITS, SAMPLING_DEFAULTS
from serve.config.options import CommandLine, option
from serve.config.values import Between, OneOf

_DECISIONS = "Decisions"
_METRICS = "Accuracy and calibration"
_PLOTS = (".png", ".html")
SCORING_FLAGS = ("scoring", "normalize", "permutations", "temperature")  # keyword arguments of `LLM.decide`
_EPILOG = """\
input: JSONL, also as .gz or .zst; each line is a request in one of the two forms of the HTTP API:
  {"state": ..., "questions": {NAME: {"type": "noul"|"choice"|"score", "instructions": ..., "criteria": ...}}}
  {"input": ..., "questions": [{"type": "predicate"|"choice"|"score", "name": NAME, "instructions": ...}]}
other fields of a line:
  id        copied to the output
  expected  right answers, an object of question names: true or false, the value of a choice, or the level of a score,
            counted from 0; questions may be missing
  model, prompt_cache_key, prompt_cache_options and safety_identifier have no effect

output: one JSON object per input line, in order: line, id, expected, and answers with their evidence, in the form of
the request; or error with message, param and code if the line is not valid. Two runs write the same bytes on CPU.

For each question with right answers, the mean and its 95 % interval (percentiles of 1,000 bootstrap samples of the
lines, with a fixed seed) are printed:
  accuracy  share of lines whose most likely option is right
  log-loss  -log(p) of the right option, in nats
  Brier     sum over the options of (p - 1)^2 if right, p^2 if wrong; half of it for yes-or-no questions
  ECE       difference between the probability of the most likely option and its accuracy in bins of equal width, as
            the mean over lines

OUTPUT.meta.json records the model and the options and, at the end, the totals. Until then, rows are in OUTPUT.partial.
Run the same command again to resume. A run with another model, other options or changed lines is refused.

exit codes:
  0    every line has a row; those that are not valid are also reported by number
  1    an unusable model or file, or nothing to plot
  2    a mistake in the flags
  130  Ctrl-C; finished rows are kept
  143  SIGTERM; finished rows are kept

examples:
  logprobd decide requests.jsonl
  logprobd decide labelled.jsonl --scoring permutations --plot calibration.png --plot calibration.html
  logprobd decide labelled.jsonl --scoring sequences --normalize byte --output sequences.jsonl
"""


def _plot(text: str) -> Path:
    path = Path(text)
    if path.suffix not in _PLOTS:
        raise ValueError(f"{text!r} ends in neither .png nor .html")
    if find_spec("matplotlib") is None:
        raise ValueError("matplotlib is not installed: pip install 'logprobd[plot]'")
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class DecideConfig(BatchConfig):
    resumable: ClassVar[frozenset[str]] = BatchConfig.resumable | {"plot", "bins"}

    output: Path | None = option(FILES, "default: FILE's name with .decisions.jsonl", Path)

    scoring: str = option(
        _DECISIONS,
        "read an option by its label (Yes, A), as the sequence of its own tokens, or by labels over several orders of "
        "the options",
        OneOf(("labels", "sequences", "permutations")),
        default="labels",
    )
    normalize: str | None = option(
        _DECISIONS,
        "what sequences are compared by: log-prob, log-prob per token or byte, or minus the log-prob after an empty "
        "state; default: sum",
        OneOf(("sum", "token", "byte", "pmi")),
    )
    permutations: int | None = option(
        _DECISIONS, "number of orders; default: all, for up to 5 options", Between(1, 120)
    )
    temperature: float | None = option(
        _DECISIONS, "divides log-probs before the softmax; default: the model's, or 1", Between(1e-3, 1e3)
    )

    bins: int = option(_METRICS, "bins of the ECE and of the diagram", Between(1, 100), default=15)
    plot: tuple[Path, ...] = option(
        _METRICS,
        "write a reliability diagram, as .png or .html; may be repeated",
        _plot,
        default=(),
        repeatable=True,
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        BatchConfig.__post_init__(self)
        if self.normalize is not None and self.scoring != "sequences":
            raise ValueError("argument --normalize: requires --scoring sequences")
        if self.permutations is not None and self.scoring != "permutations":
            raise ValueError("argument --permutations: requires --scoring permutations")
        if {".parquet", ".txt"}.intersection(self.file.suffixes):
            raise ValueError(f"argument FILE: {self.file} must be JSONL")

    @property
    def output_suffix(self) -> str:
        return ".decisions.jsonl"

    @property
    def scoring_options(self) -> dict[str, Any]:
        """Keyword arguments of `LLM.decide`."""
        return {name: getattr(self, name) for name in SCORING_FLAGS}


def parse_args(arguments: Sequence[str]) -> DecideConfig:
    line = CommandLine(
        DecideConfig,
        prog="logprobd decide",
        description="Probabilities of the options of questions, for each request of a file, and their calibration.",
        epilog=_EPILOG,
        positional="file",
        exclude=(*SAMPLING_DEFAULTS, *QUEUE_LIMITS),
    )
    return line.read(arguments)
