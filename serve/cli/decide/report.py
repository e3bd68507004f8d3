"""Accuracy and calibration of decisions whose right answers are known: metrics, and reliability diagrams."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from serve.cli.batch.source import BatchError
from serve.text.decisions.questions import QuestionType

_RESAMPLES = 1000
_SEED = 0
_INTERVAL = (0.025, 0.975)
_COLUMNS = 3  # panels beside each other
_MAX_PANELS = 100

type Columns = NDArray[np.float64]  # [4, N]: confidence, correct, log-loss and Brier score of each line


class Metric(NamedTuple):
    value: float
    low: float  # 95 % interval
    high: float


@dataclass(frozen=True, slots=True)
class Bin:
    """Decisions whose most likely option has a probability in (low, high]."""

    low: float
    high: float
    count: int
    confidence: float  # mean probability of the most likely option
    accuracy: float


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Decisions of one question with right answers."""

    rows: list[tuple[float, float, float, float]] = field(default_factory=list)  # one per line, as in Columns

    def add(self, kind: QuestionType, probabilities: Sequence[float], expected: int) -> None:
        """Add a decision; `expected` is the index of the right option."""
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        squares = math.fsum((p - (i == expected)) ** 2 for i, p in enumerate(probabilities))
        right = probabilities[expected]
        log_loss = -math.log(right) if right > 0 else math.inf
        brier = squares / 2 if kind == "noul" else squares
        self.rows.append((probabilities[best], float(best == expected), log_loss, brier))

    def metrics(self, bins: int) -> dict[str, Metric]:
        columns = np.array(self.rows, np.float64).T
        count = columns.shape[1]
        generator = np.random.default_rng(_SEED)
        samples = [_metrics(columns[:, generator.integers(0, count, count)], bins) for _ in range(_RESAMPLES)]
        # A quantile between two samples, one of which is infinite, would be NaN.
        bounds = np.quantile(samples, _INTERVAL, axis=0, method="closest_observation")
        names = ("accuracy", "log-loss", "Brier", "ECE")
        values = zip(_metrics(columns, bins).tolist(), *bounds.tolist(), strict=True)
        return dict(zip(names, map(Metric._make, values), strict=True))

    def reliability(self, bins: int) -> list[Bin]:
        """The bins that are not empty."""
        columns = np.array(self.rows, np.float64).T
        index = _bin_index(columns[0], bins)
        counts = np.bincount(index, minlength=bins)
        sums = [np.bincount(index, column, bins) for column in columns[:2]]
        return [
            Bin(i / bins, (i + 1) / bins, count, float(sums[0][i]) / count, float(sums[1][i]) / count)
            for i, count in enumerate(counts.tolist())
            if count
        ]


@dataclass(frozen=True, slots=True)
class Report:
    question: str
    lines: int
    metrics: dict[str, Metric]
    reliability: list[Bin]

    @property
    def cells(self) -> list[str]:
        """Question, number of lines, and each metric with its interval."""
        metrics = [f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]" for metric in self.metrics.values()]
        return [_shown(self.question), f"{self.lines:,}", *metrics]


def _metrics(columns: Columns, bins: int) -> NDArray[np.float64]:
    confidence, correct, log_loss, brier = columns
    gaps = np.bincount(_bin_index(confidence, bins), confidence - correct, bins)
    return np.array([correct.mean(), log_loss.mean(), brier.mean(), np.abs(gaps).sum() / len(correct)])


def _bin_index(confidence: NDArray[np.float64], bins: int) -> NDArray[np.intp]:
    """Bin i holds the values in (i / bins, (i + 1) / bins]."""
    return np.clip(np.ceil(confidence * bins).astype(np.intp) - 1, 0, bins - 1)


def option_index(values: Sequence[Any], value: Any) -> int | None:
    """Index of a value of the same type, so that true, "true" and 1 differ; or None."""
    return next((i for i, item in enumerate(values) if type(item) is type(value) and item == value), None)


def read_reports(path: Path, bins: int) -> list[Report]:
    """Reports on the questions of an output that have right answers; those of one name and several types are apart."""
    outcomes: dict[tuple[str, QuestionType], Outcomes] = {}
    with path.open("rb") as file:
        for line in file:
            row = orjson.loads(line)
            answers = row.get("answers", {})
            if isinstance(answers, list):
                answers = {answer["name"]: answer for answer in answers}
            for name, expected in row.get("expected", {}).items():
                if name in answers:
                    kind, values, probabilities = _options(answers[name])
                    index = option_index(values, expected)
                    assert index is not None
                    outcomes.setdefault((name, kind), Outcomes()).add(kind, probabilities, index)
    names = [name for name, _ in outcomes]
    return [
        Report(
            name if names.count(name) == 1 else f"{name} ({kind})",
            len(outcome.rows),
            outcome.metrics(bins),
            outcome.reliability(bins),
        )
        for (name, kind), outcome in outcomes.items()
    ]


def _options(answer: Mapping[str, Any]) -> tuple[QuestionType, Sequence[Any], Sequence[float]]:
    """Type, options and their probabilities of an answer in either form."""
    if answer["type"] in ("noul", "predicate"):
        probability = answer["noul"] if answer["type"] == "noul" else answer["probability"]
        return "noul", (True, False), (probability, 1 - probability)
    kind: QuestionType = "choice" if answer["type"] == "choice" else "score"
    items = answer["probabilities"]
    if isinstance(items, list):
        values, probabilities = [item["value"] for item in items], [item["probability"] for item in items]
    else:
        values, probabilities = [*items], [*items.values()]
    return kind, range(len(values)) if kind == "score" else values, probabilities


def metrics_table(reports: Sequence[Report], bins: int) -> str:
    """One line per question."""
    cells = [["question", "lines", *reports[0].metrics], *(report.cells for report in reports)]
    cells[0][-1] += f" ({bins} bins)"
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


def _shown(name: str) -> str:
    """A name on one line."""
    return name if name.isprintable() else ascii(name)[1:-1]


def write_diagram(path: Path, reports: Sequence[Report], bins: int) -> None:
    """Write the reliability diagrams of all questions as PNG or HTML. Raise BatchError for too many of them."""
    if len(reports) > _MAX_PANELS:
        raise BatchError(f"--plot: {len(reports)} questions are too many for a diagram; at most {_MAX_PANELS}")
    figure = _figure(reports, bins)
    if path.suffix == ".png":
        figure.savefig(path, format="png", dpi=100)
        return
    svg = svg_of(figure)
    path.write_text(_page(svg[svg.index("<svg") :], reports), "utf-8")


def svg_of(figure: Any) -> str:
    """A matplotlib figure as SVG. Text stays text, and equal figures have equal ids."""
    import matplotlib as mpl  # an optional dependency

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "logprobd"}):
        image = StringIO()
        figure.savefig(image, format="svg", metadata={"Date": None})
    return image.getvalue()


def _figure(reports: Sequence[Report], bins: int) -> Any:
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(reports))
    rows = -(-len(reports) // columns)
    figure = Figure(figsize=(4.2 * columns, 4.8 * rows), layout="constrained")
    panels = figure.subfigures(rows, columns, squeeze=False).flat
    for panel, report in zip(panels, reports, strict=False):
        upper, lower = panel.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        points, width = report.reliability, 1 / bins
        centers = [(point.low + point.high) / 2 for point in points]
        upper.set_title(_shown(report.question), parse_math=False)
        upper.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1)
        upper.bar(centers, [point.accuracy for point in points], width, color="#9ecae1", edgecolor="#3182bd")
        upper.plot([point.confidence for point in points], [point.accuracy for point in points], "o", color="#08519c")
        accuracy, error = report.metrics["accuracy"].value, report.metrics["ECE"].value
        text = f"accuracy {accuracy:.3f}\nECE {error:.3f}\n{report.lines:,} lines"
        upper.text(0.03, 0.97, text, va="top", transform=upper.transAxes)
        upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        lower.bar(centers, [point.count for point in points], width, color="0.75", edgecolor="0.45")
        lower.set(xlabel="probability of the most likely option", ylabel="lines")
    return figure


def _page(svg: str, reports: Sequence[Report]) -> str:
    parts = [svg, "<h2>Metrics</h2>", "<p>95 % intervals from 1,000 bootstrap samples of the lines.</p>"]
    parts.append(_html_table(("question", "lines", *reports[0].metrics), [report.cells for report in reports]))
    for report in reports:
        points = [
            (f"({b.low:.3f}, {b.high:.3f}]", f"{b.count:,}", f"{b.confidence:.4f}", f"{b.accuracy:.4f}")
            for b in report.reliability
        ]
        parts.append(f"<h2>{escape(_shown(report.question))}</h2>")
        parts.append(_html_table(("bin", "lines", "mean probability", "accuracy"), points))
    style = "body{font-family:sans-serif;margin:2em}td,th{padding:.2em 1em .2em 0;text-align:left}svg{max-width:100%}"
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Reliability</title><style>{style}</style>'
    return "\n".join([head, "<h1>Reliability</h1>", *parts, "</html>", ""])


def _html_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"
