"""`logprobd score`: scores the texts of a file."""

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from model.token_logprobs import TokenLogprobs
from serve.cli.batch.journal import Checkpoint
from serve.cli.batch.run import Batch, Output, run_batch
from serve.cli.batch.source import BatchError, Line, Source
from serve.cli.score.config import ScoreConfig
from serve.cli.score.rows import RowWriter, Sums, write_csv, write_parquet
from serve.cli.score.texts import Context, LineError, Text, TextReader, make_context
from serve.jobs.request_queue import RequestError
from serve.jobs.results import perplexity
from serve.jobs.score import ScoreRequest, TextEncoder
from serve.llm import LLM


def main(config: ScoreConfig) -> int:
    """Score a file and return the exit code that --help lists."""
    return run_batch(Scoring(config))


@dataclass(frozen=True, slots=True)
class ScoreItem(ScoreRequest):
    """A line to score, or the error that prevents it; then it has no tokens."""

    line: Line
    text: Text | None = None
    error: str | None = None


class Scoring(Batch[ScoreConfig, Sums]):
    label = "scoring"
    unit = "tokens"
    sums = Sums

    @property
    def columns(self) -> tuple[str, ...]:
        return TextReader.fields(self.config.text_field)

    def model_identity(self, llm: LLM) -> dict[str, Any]:
        return self._context(llm).identity()

    async def run(self, llm: LLM, source: Source, output: Output[Sums]) -> None:
        """Score until the end or a broken line that is not skipped."""
        encoder = TextEncoder(llm.chats, llm.loaded.limits.vocab_size, self.config.add_special_tokens)
        reader = TextReader(encoder, self.config.text_field)
        writer = RowWriter(llm.loaded.tokenizer, self.config)
        context = self._context(llm)
        read = partial(_item, reader, context, is_text=source.is_text)
        async with aclosing(llm.stream_scores(map(read, source.lines), self.config.top_logprobs)) as items:
            async for item, result in items:
                self._write(writer, output, item, result)

    @property
    def converter(self) -> Callable[[Path, Path, Checkpoint[Sums]], None] | None:
        if self.config.output_format == "parquet":
            return lambda rows, output, checkpoint: write_parquet(
                rows,
                output,
                config=self.config,
                longest_row=checkpoint.longest_row,
                about=checkpoint.made_with,
            )
        return (lambda rows, output, _: write_csv(rows, output)) if self.config.output_format == "csv" else None

    def units(self, sums: Sums) -> int:
        return sums.scored

    def describe(self, sums: Sums, rate: str) -> str:
        value = perplexity(sums.logprob, sums.scored)
        end = "" if value is None else f", perplexity {value:.4g}"
        return f"{sums.lines + sums.skipped:,} lines, {sums.scored:,} tokens, {rate}{end}"

    def summary(self, sums: Sums) -> list[tuple[str, str]]:
        return sums.summary()

    def _context(self, llm: LLM) -> Context:
        limits = llm.loaded.limits
        return make_context(min(limits.max_model_len, limits.cache_tokens), self.config.long, self.config.stride)

    def _write(
        self, writer: RowWriter, output: Output[Sums], item: ScoreItem, result: TokenLogprobs | RequestError
    ) -> None:
        line = item.line
        if item.text is not None and isinstance(result, TokenLogprobs):
            row, sums = writer.row(line.number, item.text, len(item.windows), result)
        else:
            message = f"{self.config.file}:{line.number}: {item.error or result}"
            if self.config.on_error != "skip":
                raise BatchError(f"{message} (--on-error skip leaves such lines out; the rows so far are kept)")
            output.warn(message)
            row, sums = b"", Sums(skipped=1)
        output.write(line, row, sums)


def _item(reader: TextReader, context: Context, line: Line, *, is_text: bool) -> ScoreItem:
    try:
        text = reader.read(line, is_text=is_text)
        token_ids = text.encoded.token_ids
        return ScoreItem(token_ids, context.windows(len(token_ids)), line, text)
    except LineError as error:
        return ScoreItem([], (), line, error=str(error))
