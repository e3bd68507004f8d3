"""Metrics of decisions against values computed by hand, and the reliability diagrams."""

import math
import re
from pathlib import Path

import numpy as np
import orjson
import pytest

from serve.cli.batch.source import BatchError
from serve.cli.decide.report import Outcomes, Report, metrics_table, option_index, read_reports, write_diagram


def outcomes_of(*rows: tuple[list[float], int]) -> Outcomes:
    outcomes = Outcomes()
    for probabilities, expected in rows:
        outcomes.add("choice", probabilities, expected)
    return outcomes


def report_of(outcomes: Outcomes, name: str = "q", bins: int = 15) -> Report:
    return Report(name, len(outcomes.rows), outcomes.metrics(bins), outcomes.reliability(bins))


def test_metrics_of_a_choice() -> None:
    outcomes = outcomes_of(([0.7, 0.2, 0.1], 0), ([0.5, 0.3, 0.2], 1), ([0.1, 0.1, 0.8], 2), ([0.72, 0.2, 0.08], 1))
    metrics = outcomes.metrics(15)
    assert metrics["accuracy"].value == 0.5
    assert metrics["log-loss"].value == pytest.approx(-math.log(0.7 * 0.3 * 0.8 * 0.2) / 4)
    squares = (0.3**2 + 0.2**2 + 0.1**2, 0.5**2 + 0.7**2 + 0.2**2, 0.1**2 + 0.1**2 + 0.2**2, 0.72**2 + 0.8**2 + 0.08**2)
    assert metrics["Brier"].value == pytest.approx(sum(squares) / 4)
    # 0.7 and 0.72 are in the bin (10/15, 11/15]; 0.5 and 0.8 are alone.
    assert metrics["ECE"].value == pytest.approx((abs(0.7 + 0.72 - 1) + abs(0.5 - 0) + abs(0.8 - 1)) / 4)
    # With one bin: the difference of the means.
    assert outcomes.metrics(1)["ECE"].value == pytest.approx(abs((0.7 + 0.5 + 0.8 + 0.72) / 4 - 0.5))


def test_metrics_of_a_yes_or_no_question() -> None:
    outcomes = Outcomes()
    outcomes.add("noul", (0.9, 1 - 0.9), 0)
    outcomes.add("noul", (0.3, 1 - 0.3), 0)
    metrics = outcomes.metrics(15)
    assert metrics["Brier"].value == pytest.approx((0.1**2 + 0.7**2) / 2)
    assert metrics["accuracy"].value == 0.5
    assert outcomes.rows[1][0] == pytest.approx(0.7)  # of the most likely answer, which is no


def test_bins_include_their_upper_end() -> None:
    points = outcomes_of(([0.5, 0.5], 0), ([0.25, 0.75], 0), ([0.4, 0.6], 1), ([0.0, 1.0], 1)).reliability(4)
    found = [(point.low, point.high, point.count, point.confidence, point.accuracy) for point in points]
    assert found == [(0.25, 0.5, 1, 0.5, 1.0), (0.5, 0.75, 2, 0.675, 0.5), (0.75, 1.0, 1, 1.0, 1.0)]


def test_an_impossible_right_answer_has_an_infinite_log_loss() -> None:
    metrics = outcomes_of(([1.0, 0.0], 1), ([0.5, 0.5], 0)).metrics(15)
    assert metrics["log-loss"].value == metrics["log-loss"].high == math.inf
    assert metrics["log-loss"].low == pytest.approx(math.log(2))


def test_intervals_are_those_of_the_mean() -> None:
    generator = np.random.default_rng(5)
    right = generator.random(400) < 0.7
    outcomes = outcomes_of(*(([0.7, 0.3], 0 if is_right else 1) for is_right in right))
    accuracy = outcomes.metrics(15)["accuracy"]
    deviation = math.sqrt(accuracy.value * (1 - accuracy.value) / 400)  # of the mean, by the normal approximation
    assert accuracy.low == pytest.approx(accuracy.value - 1.96 * deviation, abs=0.006)
    assert accuracy.high == pytest.approx(accuracy.value + 1.96 * deviation, abs=0.006)
    assert outcomes.metrics(15) == outcomes.metrics(15)
    alone = outcomes_of(([0.7, 0.3], 0)).metrics(15)
    assert all(metric.low == metric.value == metric.high for metric in alone.values())


@pytest.mark.parametrize(
    ("value", "index"),
    [(True, 0), ("true", 1), (1, 2), (False, None), ("1", None), (1.0, None), (None, None)],
)
def test_option_index_compares_types(value: object, index: int | None) -> None:
    assert option_index((True, "true", 1), value) == index


def test_rows_of_both_forms_and_several_types(tmp_path: Path) -> None:
    choice = {"type": "choice", "choice": "a", "probabilities": {"a": 0.75, "b": 0.25}}
    rows = [
        {"answers": {"q": choice, "n": {"type": "noul", "noul": 0.25}}, "expected": {"q": "a", "n": True}},
        {"answers": {"q": choice}},
        {"error": {"message": "broken"}, "expected": {"q": "a"}},
        {
            "answers": [
                {"type": "predicate", "name": "n", "probability": 0.5},
                {"type": "predicate", "name": None, "probability": 0.5},
                {"type": "score", "name": "s", "probabilities": [{"value": 0, "label": "x", "probability": 1.0}]},
                {"type": "choice", "name": "q", "probabilities": [{"value": True, "probability": 1.0}]},
            ],
            "expected": {"n": False, "s": 0, "q": True},
        },
        {"answers": {"q": {"type": "score", "probabilities": {"0": 0.5, "1": 0.5}}}, "expected": {"q": 1}},
    ]
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    reports = {report.question: report for report in read_reports(path, 15)}
    assert {name: report.lines for name, report in reports.items()} == {"q (choice)": 2, "n": 2, "s": 1, "q (score)": 1}
    assert reports["q (choice)"].metrics["log-loss"].value == pytest.approx(-math.log(0.75) / 2)
    assert reports["n"].metrics["accuracy"].value == 0.0  # 0.25 for a true one; a tie goes to true


def test_table_has_one_line_per_question() -> None:
    reports = [report_of(outcomes_of(([0.75, 0.25], 0)), "first\nline"), report_of(outcomes_of(([0.25, 0.75], 0)), "b")]
    lines = metrics_table(reports, 15).splitlines()
    assert lines[0].split("  ")[0] == "question"
    assert lines[0].endswith("ECE (15 bins)")
    assert re.split(r" {2,}", lines[1]) == [
        r"first\nline",
        "1",
        *("1.000 [1.000, 1.000]", "0.288 [0.288, 0.288]", "0.125 [0.125, 0.125]", "0.250 [0.250, 0.250]"),
    ]
    assert re.split(r" {2,}", lines[2])[:3] == ["b", "1", "0.000 [0.000, 0.000]"]


def test_diagram_as_png(tmp_path: Path) -> None:
    path = tmp_path / "diagram.png"
    write_diagram(path, [report_of(outcomes_of(([0.75, 0.25], 0)), r"from $\frac$")] * 4, 15)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_diagram_as_html(tmp_path: Path) -> None:
    path, outcomes = tmp_path / "diagram.html", outcomes_of(([0.7, 0.3], 0), ([0.72, 0.28], 1))
    write_diagram(path, [report_of(outcomes, "<b>bold</b>")], 15)
    page = path.read_text("utf-8")
    assert page.startswith("<!doctype html>")
    assert "<b>" not in page
    assert page.count("&lt;b&gt;bold&lt;/b&gt;") >= 3  # in the picture, the metrics and above the bins
    assert "<svg" in page
    assert "<td>(0.667, 0.733]</td><td>2</td><td>0.7100</td><td>0.5000</td>" in page
    assert "http://" not in re.sub(r'(xmlns(:\w+)?|href|rdf:resource|rdf:about)="[^"]*"', "", page)
    write_diagram(tmp_path / "again.html", [report_of(outcomes, "<b>bold</b>")], 15)
    assert (tmp_path / "again.html").read_text("utf-8") == page


def test_diagram_of_too_many_questions(tmp_path: Path) -> None:
    reports = [report_of(outcomes_of(([1.0], 0)))] * 101
    with pytest.raises(BatchError, match="101 questions"):
        write_diagram(tmp_path / "x.png", reports, 15)
