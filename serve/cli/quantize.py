"""`logprobd quantize`: writes a model as GGUF with weights of 4 to 8 bits."""

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.config.options import MODEL, CommandLine, option, switch
from serve.config.values import Between, OneOf

if TYPE_CHECKING:
    from model.importance import Importance
    from model.weights.gguf_writer import OutputModel
    from serve.server.console import Reporter
    from serve.server.model_files import ModelFiles

_OUTPUT = "Output"
_EPILOG = """\
MODEL is a folder of safetensors, a hub id or a .gguf file; OUTPUT is a .gguf file, which llama.cpp loads, too. As with
llama.cpp's llama-quantize, q4_k and q5_k keep 6 bits for attn_v and ffn_down of half of the layers, and for the head,
also if it is the embedding; mxfp4 keeps 8 bits for head and embedding. Rows that are no multiple of 256 weights get
blocks of 32: q5_0 for q4_k, q5_1 for q5_k, q8_0 for q6_k. Norms and biases stay float32.

With --importance-texts, an error of a weight counts by the mean square of its input over these texts, which are run
through the model in float32. A few hundred kilobytes of text like that the model will see are enough.
`logprobd kl MODEL OUTPUT FILE` measures what the result costs.

examples:
  logprobd quantize ~/models/SmolLM2-135M smollm2-q4.gguf --type q4_k
  logprobd quantize model-f16.gguf model-q5.gguf --type q5_k --importance-texts texts.jsonl
"""
# Names of pre-tokenizers in GGUF files; the first that gives the ids of the original is written.
_PRE_TOKENIZERS = ("smollm", "qwen2", "llama-bpe", "dbrx", "smaug-bpe", "gpt-2")
_PROBES = (
    "The  quick\n\n brown\tfox's 12345 jumps; don't WE'LL 3.14 x=1",
    "  def f(x):\n        return x ** 2  # naïve\r\n\r\n",
    "e\u0301 東京タワーは333メートル 🏳️\u200d🌈 ｆｕｌｌ \u00a0 نص हिन्दी",
    " leading and trailing ",
    "a" * 40 + " " * 20 + "!!!???...",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    model: str = option(MODEL, "hub id, local folder or .gguf file", default=dataclasses.MISSING, metavar="MODEL")
    revision: str | None = option(MODEL, "branch, tag or commit of a hub id", metavar="NAME")
    output: Path = option(_OUTPUT, "the .gguf file to write", Path, default=dataclasses.MISSING)
    type: str = option(
        _OUTPUT,
        "format of the matrices",
        OneOf(("q4_k", "q5_k", "q6_k", "q8_0", "mxfp4")),
        default=dataclasses.MISSING,
    )
    importance_texts: Path | None = option(_OUTPUT, "texts, in the formats of `logprobd score`", Path)
    limit: int | None = option(_OUTPUT, "read only the first N lines of the texts", Between(1, 1 << 40))
    overwrite: bool = switch(_OUTPUT, "replace an existing file")

    def __post_init__(self) -> None:
        if self.output.suffix != ".gguf":
            raise ValueError(f"argument --output: {self.output} does not end in .gguf")
        if self.limit is not None and self.importance_texts is None:
            raise ValueError("argument --limit: requires --importance-texts")


def parse_args(arguments: Sequence[str]) -> QuantizeConfig:
    line = CommandLine(
        QuantizeConfig,
        prog="logprobd quantize",
        description="Write a model as a GGUF file with weights of 4 to 8 bits.",
        epilog=_EPILOG,
        positional=("model", "output"),
    )
    return line.read(arguments)


def main(config: QuantizeConfig) -> int:
    """Write the file and return the exit code: 1 for an unusable model or file, 130 for Ctrl-C."""
    from serve.cli.batch.source import BatchError
    from serve.config.engine_config import EngineConfig
    from serve.server.console import Reporter
    from serve.server.model_files import STARTUP_ERRORS, open_model
    from serve.server.startup_events import Event, failed

    reporter = Reporter(sys.stderr)
    partial = config.output.with_name(config.output.name + ".partial")
    try:
        if config.output.exists() and not config.overwrite:
            raise BatchError(f"{config.output}: exists; use --overwrite to replace it")
        engine = EngineConfig(model=config.model, revision=config.revision)
        with open_model(engine, lambda line: reporter.report(Event("preparing", line))) as files:
            model = _output_model(files)
            importance = _importance(config, files, reporter) if config.importance_texts else {}
            _write(config, partial, model, importance, reporter)
        partial.replace(config.output)
    except OSError as error:
        reporter.report(failed(f"{error.filename or config.output}: {error.strerror or error}"))
        return 1
    except (*STARTUP_ERRORS, BatchError) as error:
        return reporter.fail(error)
    except KeyboardInterrupt:
        reporter.report(failed("interrupted"))
        return 130
    finally:
        partial.unlink(missing_ok=True)
    return 0


def _output_model(files: "ModelFiles") -> "OutputModel":
    from model.weights.gguf import GgufCheckpoint
    from model.weights.gguf_writer import output_of_folder, output_of_gguf
    from model.weights.weight_table import check_headers

    check_headers(files.checkpoint)
    if isinstance(files.checkpoint, GgufCheckpoint):
        return output_of_gguf(files.checkpoint)
    return output_of_folder(files.checkpoint, _tokenizer_keys(files))


def _tokenizer_keys(files: "ModelFiles") -> dict[str, Any]:
    """Keys of a GGUF file from which its readers make a tokenizer with the same ids.

    Raises:
        TokenizerError: no known pre-tokenizer gives them.
    """
    from serve.text.gguf_keys import PREFIX, tokenizer_keys
    from serve.text.gguf_tokenizer import tokenizer_from_gguf
    from serve.text.tokenizer import Tokenizer, TokenizerError

    config = files.checkpoint.config
    keys = tokenizer_keys(files.tokenizer, config.vocab_size)
    name, values = ("add_space_prefix", (False, True)) if "tokenizer.ggml.scores" in keys else ("pre", _PRE_TOKENIZERS)

    def ids(tokenizer: Tokenizer) -> list[list[int]]:
        special = "".join(files.tokenizer.added_tokens())
        return [
            tokenizer.encode(text, add_special_tokens=flag) for text in (*_PROBES, special) for flag in (False, True)
        ]

    expected = ids(files.tokenizer)
    for value in values:
        candidate = {**keys, PREFIX + name: value}
        if ids(tokenizer_from_gguf({"general.architecture": config.family, **candidate})) == expected:
            return candidate
    raise TokenizerError(f"{files.source.name}: no tokenizer of GGUF files gives the ids of its tokenizer.json")


def _importance(config: QuantizeConfig, files: "ModelFiles", reporter: "Reporter") -> "Importance":
    from model.importance import CHUNK, chunks_of, input_importance
    from model.weights.loader import load_model
    from serve.cli.batch.source import BatchError
    from serve.cli.divergence import read_texts
    from serve.cli.score.texts import TextReader
    from serve.jobs.score import TextEncoder
    from serve.server.console import is_terminal, progress_bar
    from serve.text.chat import ChatFormat

    assert config.importance_texts is not None
    encoder = TextEncoder(ChatFormat(files.tokenizer), files.checkpoint.config.vocab_size)
    texts = [token_ids for _, token_ids in read_texts(config.importance_texts, TextReader(encoder), config.limit)]
    if not texts:
        raise BatchError(f"{config.importance_texts}: has no texts")
    with reporter.loading() as progress:
        model = load_model(files.checkpoint, "float32", progress, max_model_len=CHUNK)
    chunks = sum(1 for _ in chunks_of(texts))
    with progress_bar("importance", chunks, hidden=not is_terminal(sys.stderr)) as advance:
        return input_importance(model, texts, advance)


def _write(
    config: QuantizeConfig, path: Path, model: "OutputModel", importance: "Importance", reporter: "Reporter"
) -> None:
    from model.weights.gguf_writer import TYPES, write_gguf
    from serve.server.console import is_terminal, progress_bar
    from serve.server.startup_events import Event

    formats: Counter[str] = Counter()
    with progress_bar("rounding", len(model.tensors), hidden=not is_terminal(sys.stderr)) as advance:

        def on_tensor(_: str, form: str) -> None:
            formats[form] += 1
            advance()

        write_gguf(path, model, TYPES[config.type], importance, on_tensor)
    size = path.stat().st_size
    listed = ", ".join(f"{count} {form}" for form, count in formats.most_common())
    bits = 8 * size / sum(math.prod(tensor.shape) for tensor in model.tensors)
    reporter.report(
        Event("written", f"{config.output}: {size / 1e6:,.1f} MB, {bits:.2f} bits per weight; tensors: {listed}")
    )
