"""`logprobd kl`: what a quantization costs, as the divergence of one model from another, token by token."""

import asyncio
import errno
import math
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson
from numpy.typing import NDArray

from serve.cli.batch.source import BatchError, open_source
from serve.cli.decide.report import svg_of
from serve.cli.kl import KlConfig
from serve.cli.score.texts import LineError, TextReader, make_context
from serve.engine.client import EngineClient
from serve.engine.request import (
    EngineStoppedError,
    FinishReason,
    NotPinnedError,
    PromptScoring,
    Request,
    SamplingParams,
)
from serve.jobs.request_queue import RequestError, RequestQueue
from serve.jobs.results import perplexity
from serve.jobs.score import TextEncoder, Window
from serve.llm import LLM
from serve.server.console import Reporter, is_terminal, progress_bar, start_reporting
from serve.server.model_files import STARTUP_ERRORS, open_model
from serve.server.startup_events import Event, failed
from serve.text.chat import ChatFormat

_ROWS = 16  # distributions read at once; a multiple of the rows of the compiled program
_PASSAGES = 2  # run at once, so that one is computed while the other's distributions are visited
_QUANTILES = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999, "max": 1.0}

type Visit = Callable[[int, NDArray[np.float32]], None]  # takes the first row's index and rows [n, V]


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens that one request scores, from index `first` on; their distributions are rows `row`, `row + 1`, ..."""

    token_ids: list[int]
    first: int
    row: int


def passages_of(texts: Iterable[tuple[Sequence[int], Sequence[Window]]]) -> list[Passage]:
    """The windows of texts (token ids, windows), with the rows of their scored tokens numbered in order."""
    windows = [(token_ids, window) for token_ids, windows in texts for window in windows]
    rows = accumulate((window.end - window.first for _, window in windows), initial=0)
    return [
        Passage([*token_ids[window.begin : window.end]], window.first - window.begin, row)
        for (token_ids, window), row in zip(windows, rows, strict=False)
    ]


def targets_of(passages: Iterable[Passage]) -> NDArray[np.int64]:
    """The scored tokens [N], by row."""
    return np.array([token for passage in passages for token in passage.token_ids[passage.first :]], np.int64)


def visit_distributions(
    queue: RequestQueue, engine: EngineClient, passages: Iterable[Passage], visit: Visit
) -> AsyncGenerator[None]:
    """Call `visit` with the log-probs over the full vocabulary of all rows, some at a time; yield after each passage.

    Raises:
        RequestError: the engine failed, or a log-prob is NaN.
        EngineStoppedError: the engine has stopped.
    """
    in_flight = asyncio.Semaphore(_PASSAGES)

    async def run(passage: Passage) -> None:
        scoring = PromptScoring(passage.first, full_vocab=True)
        request = Request(uuid.uuid4().hex, passage.token_ids, SamplingParams(max_tokens=0, prompt=scoring))
        async with in_flight, aclosing(queue.events(request)) as events:  # its pages stay pinned until it is closed
            event = await anext(events)
            if event.finish_reason is not FinishReason.LENGTH:
                raise RequestError("the engine failed: it did not finish the request")
            end = len(passage.token_ids) - 1
            for start in range(passage.first - 1, end, _ROWS):
                try:
                    rows = await engine.full_vocab_logprobs(request.id, start, min(_ROWS, end - start))
                except NotPinnedError:
                    raise RequestError("the engine failed: the prompt is no longer in the cache") from None
                if not (rows < np.inf).all():
                    raise RequestError("the engine failed: a log-prob is NaN")
                await asyncio.to_thread(visit, passage.row + start - passage.first + 1, rows)

    return queue.run_in_order(passages, run, lambda passage: len(passage.token_ids))


class Comparison:
    """Compares two models' distributions of N tokens. The reference's are kept in a file of 4 N V bytes."""

    def __init__(self, file: BinaryIO, targets: NDArray[np.int64], vocab_size: int) -> None:
        """Prepare for the tokens `targets` [N], at least one. `file` is empty and can be read and written."""
        count = len(targets)
        self._targets = targets
        self._row_bytes = 4 * vocab_size
        self._descriptor = file.fileno()
        self.kl = np.full(count, np.nan)  # [N] nats
        self.same_best = np.zeros(count, np.bool_)  # [N]; ties go to the lower id
        self.logprobs = np.full((2, count), np.nan)  # of the targets: by the reference, by the other model

    def add_reference(self, row: int, logprobs: NDArray[np.float32]) -> None:
        """Keep rows [n, V] of the reference. Raise OSError if they cannot be written."""
        data = np.ascontiguousarray(logprobs).data.cast("B")
        if os.pwrite(self._descriptor, data, row * self._row_bytes) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def add(self, row: int, logprobs: NDArray[np.float32]) -> None:
        """Compare rows [n, V] of the other model with the reference's."""
        rows = slice(row, row + len(logprobs))
        data = os.pread(self._descriptor, logprobs.size * 4, row * self._row_bytes)
        p, q = normalized(np.frombuffer(data, np.float32).reshape(logprobs.shape)), normalized(logprobs)
        with np.errstate(invalid="ignore"):  # a token without probability in both models
            self.kl[rows] = np.where(p > -np.inf, np.exp(p) * (p - q), 0.0).sum(axis=1)
        self.same_best[rows] = p.argmax(axis=1) == q.argmax(axis=1)
        index = np.arange(len(logprobs)), self._targets[rows]
        self.logprobs[:, rows] = p[index], q[index]

    def summary(self) -> "Divergence":
        """The statistics, when all rows are compared."""
        count = len(self.kl)
        # A quantile between two values, one of which is infinite, would be NaN.
        values = np.quantile(self.kl, [*_QUANTILES.values()], method="closest_observation").tolist()
        sums = [math.fsum(column) for column in self.logprobs.tolist()]
        try:
            ratio = math.exp((sums[0] - sums[1]) / count)
        except OverflowError:
            ratio = math.inf
        return Divergence(
            tokens=count,
            mean=math.fsum(self.kl.tolist()) / count,
            quantiles=dict(zip(_QUANTILES, values, strict=True)),
            same_best=float(self.same_best.mean()),
            perplexities=(perplexity(sums[0], count), perplexity(sums[1], count)),
            perplexity_ratio=ratio,
        )


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(reference || other model) in nats over the tokens of texts, and both models' perplexity of the texts."""

    tokens: int
    mean: float
    quantiles: dict[str, float]
    same_best: float  # share of tokens before which both models have the same most likely token
    perplexities: tuple[float | None, float | None]  # of the reference and of the other model; None: too large
    perplexity_ratio: float  # the other model's over the reference's


def normalized(logprobs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probs [n, V] in float64, without the rounding of their common normalizer to float32."""
    values = logprobs.astype(np.float64)
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    return values


def main(config: KlConfig) -> int:
    """Compare two models and return the exit code: 1 for an unusable model or file, 130 for Ctrl-C."""
    reporter = start_reporting(config)
    try:
        with tempfile.TemporaryFile() as file:
            comparison, count = asyncio.run(_compare(config, reporter, file))
        divergence = comparison.summary()
        table = divergence_table(divergence, config, count)
        report = {"model": config.model, "model_b": config.model_b, "texts": count, **asdict(divergence)}
        document = orjson.dumps(report, option=orjson.OPT_INDENT_2).decode()
        if config.output is not None:
            config.output.mkdir(parents=True, exist_ok=True)
            (config.output / "kl.json").write_text(document + "\n", "utf-8")
            (config.output / "kl.txt").write_text(table + "\n", "utf-8")
            (config.output / "kl.svg").write_text(_plot(comparison.kl, config), "utf-8")
        print(document if config.json else table)
    except OSError as error:
        reporter.report(failed(f"{error.filename or tempfile.gettempdir()}: {error.strerror or error}"))
        return 1
    except EngineStoppedError:
        reporter.report(failed("the engine stopped"))
        return 1
    except (*STARTUP_ERRORS, BatchError, RequestError) as error:
        return reporter.fail(error)
    except KeyboardInterrupt:
        reporter.report(failed("interrupted"))
        return 130
    return 0


async def _compare(config: KlConfig, reporter: Reporter, file: BinaryIO) -> tuple[Comparison, int]:
    """Run both models, one after the other; return the comparison and the number of texts."""
    texts, context, vocab_size = _encode(config, reporter)
    with LLM.open(config.engine(config.model), reporter) as llm:
        size = min(context, llm.loaded.limits.cache_tokens)
        windows = make_context(size, "window", None).windows
        passages = passages_of((token_ids, windows(len(token_ids))) for token_ids in texts)
        comparison = Comparison(file, targets_of(passages), vocab_size)
        _check_space(config, 4 * len(comparison.kl) * vocab_size)
        await _run("reference", llm, passages, comparison.add_reference)
    del llm  # its weights, before the other model is loaded
    with LLM.open(config.engine(config.model_b), reporter) as llm:
        await _run("comparison", llm, passages, comparison.add)
    return comparison, len(texts)


def _check_space(config: KlConfig, size: int) -> None:
    if not size:
        raise BatchError(f"{config.file}: no text has two tokens")
    folder = tempfile.gettempdir()
    if size > (free := shutil.disk_usage(folder).free):
        raise BatchError(
            f"{config.file}: the log-probs of the tokens take {size / 1e9:,.1f} GB, and {folder} has "
            f"{free / 1e9:,.1f} GB free: use --limit, or another folder (TMPDIR)"
        )


async def _run(label: str, llm: LLM, passages: Sequence[Passage], visit: Visit) -> None:
    with progress_bar(label, len(passages), hidden=not is_terminal(sys.stderr)) as advance:
        async with aclosing(visit_distributions(llm.new_queue(), llm.engine, passages, visit)) as done:
            async for _ in done:
                advance()


def _encode(config: KlConfig, reporter: Reporter) -> tuple[list[list[int]], int, int]:
    """Token ids of the texts; the context and the vocabulary's size of both models, from their headers.

    Raises:
        STARTUP_ERRORS: a model is not supported.
        BatchError: a line is malformed, or the models do not have the same vocabulary.
    """
    models = (config.model, config.model_b)
    with ExitStack() as stack:
        files = [
            stack.enter_context(
                open_model(config.engine(model), lambda line: reporter.report(Event("preparing", line)))
            )
            for model in models
        ]
    sizes = [file.checkpoint.config.vocab_size for file in files]
    if sizes[0] != sizes[1]:
        raise BatchError(f"the vocabularies of {models[0]} and {models[1]} have {sizes[0]:,} and {sizes[1]:,} tokens")
    files[1].tokenizer.chat_template = files[0].tokenizer.chat_template  # chats are compared as one text
    encoders = [TextEncoder(ChatFormat(file.tokenizer), sizes[0], config.add_special_tokens) for file in files]
    readers = [TextReader(encoder, config.text_field) for encoder in encoders]
    texts, others = (read_texts(config.file, reader, config.limit) for reader in readers)
    for (number, token_ids), (_, others_ids) in zip(texts, others, strict=True):
        if token_ids != others_ids:
            raise BatchError(f"{config.file}:{number}: {models[0]} and {models[1]} tokenize this text differently")
    return [token_ids for _, token_ids in texts], min(file.max_model_len for file in files), sizes[0]


def read_texts(path: Path, reader: TextReader, limit: int | None = None) -> list[tuple[int, list[int]]]:
    """Number of the line and token ids of each text of a file.

    Raises:
        BatchError: the file cannot be read, or a line is malformed.
    """
    texts = []
    with open_source(path, reader.fields(reader.text_field), limit) as source:
        for line in source.lines:
            try:
                texts.append((line.number, reader.read(line, is_text=source.is_text).encoded.token_ids))
            except LineError as error:
                raise BatchError(f"{path}:{line.number}: {error}") from None
    return texts


def divergence_table(divergence: Divergence, config: KlConfig, texts: int) -> str:
    """Names and values, one per line."""

    def shown(value: float | None) -> str:
        return "too large" if value is None else f"{value:.6g}"

    reference, other = divergence.perplexities
    rows = [
        ("model", config.model),
        ("model B", config.model_b),
        ("tokens", f"{divergence.tokens:,} of {texts:,} texts"),
        ("KL mean", f"{divergence.mean:.6g} nats"),
        *((f"KL {name}", f"{value:.6g}") for name, value in divergence.quantiles.items()),
        ("same best", f"{divergence.same_best:.3%}"),
        ("perplexity", f"{shown(reference)} (model), {shown(other)} (model B)"),
        ("ratio", f"{divergence.perplexity_ratio:.6g}"),
    ]
    return "\n".join(f"{name:<11} {value}" for name, value in rows)


def _plot(kl: NDArray[np.float64], config: KlConfig) -> str:
    """The share of tokens with a larger divergence, as SVG."""
    from matplotlib.figure import Figure  # an optional dependency

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    values = np.sort(np.maximum(kl, 1e-9))
    axes.step(values, 1 - np.arange(len(values)) / len(values), where="post", color="#08519c")
    axes.set(xscale="log", yscale="log", xlabel="KL divergence (nats)", ylabel="share of tokens above it")
    axes.axvline(float(kl.mean()), color="0.5", linestyle="--", linewidth=1, label=f"mean {kl.mean():.3g}")
    axes.set_title(f"{Path(config.model or '').name} / {Path(config.model_b).name}", parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    return svg_of(figure)
