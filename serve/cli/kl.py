"""Options of `logprobd kl`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from serve.config.engine_config import QUEUE_LIMITS, SAMPLING_DEFAULTS, EngineConfig
from serve.config.options import MODEL, CommandLine, option, switch, with_default
from serve.config.values import Between

_TEXTS = "Texts and output"
_EPILOG = """\
MODEL is the reference: its distribution of each next token is P, that of MODEL_B is Q, and KL(P || Q) is the mean of
log P - log Q over P, in nats, over the full vocabulary. Both models need the same vocabulary and must tokenize the
texts in the same way. FILE has one text per line, in the formats of `logprobd score`; the first token of a text is not
scored. Texts longer than --max-model-len are scored in windows that overlap by half.

One model is in memory at a time. The log-probs of MODEL are kept in a temporary file in the folder that TMPDIR names:
4 bytes per token and entry of the vocabulary, which is 2 GB for 10,000 tokens of a model with 49,152; --limit bounds
them. Log-probs of both are normalized in float64, and so are all sums.

--output writes kl.json, kl.txt (the table) and kl.svg: the share of tokens whose divergence is above a value.

examples:
  logprobd kl model.gguf model-q4_k.gguf texts.jsonl
  logprobd kl ~/models/SmolLM2-135M q4.gguf texts.jsonl --max-model-len 512 --output q4-report --json
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class KlConfig(EngineConfig):
    model: str | None = option(
        MODEL, "the reference: hub id, folder or .gguf file", default=dataclasses.MISSING, metavar="MODEL"
    )
    model_b: str = option(MODEL, "the other model", default=dataclasses.MISSING, metavar="MODEL")
    dtype: str = with_default(EngineConfig, "dtype", "float32")
    file: Path = option(_TEXTS, "texts, see below", Path, default=dataclasses.MISSING)
    limit: int | None = option(_TEXTS, "read only the first N lines", Between(1, 1 << 40))
    text_field: str | None = option(_TEXTS, "field that holds the text, token ids or messages", metavar="NAME")
    add_special_tokens: bool = switch(_TEXTS, "add the models' special tokens, such as BOS, to texts", default=True)
    json: bool = switch(_TEXTS, "print a JSON object instead of the table")
    output: Path | None = option(_TEXTS, "also write the table and a plot to a folder", Path, metavar="FOLDER")

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        if self.output is not None and find_spec("matplotlib") is None:
            raise ValueError("argument --output: matplotlib is not installed: pip install 'logprobd[plot]'")

    def engine(self, model: str | None) -> EngineConfig:
        """The engine's options for one of the two models."""
        return replace(self, model=model, max_logprobs=-1, generation_config="vllm")


def parse_args(arguments: Sequence[str]) -> KlConfig:
    line = CommandLine(
        KlConfig,
        prog="logprobd kl",
        description="KL divergence of a model from a reference on texts, token by token, and the perplexity of both.",
        epilog=_EPILOG,
        positional=("model", "model_b", "file"),
        exclude=(*SAMPLING_DEFAULTS, *QUEUE_LIMITS, "revision", "quantization", "max_logprobs"),
    )
    return line.read(arguments)
