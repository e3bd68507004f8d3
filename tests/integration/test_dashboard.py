"""deploy/grafana.json queries existing metrics and is a valid Grafana dashboard."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support.server_process import ROOT, ServerProcess

DASHBOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel, target) for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
GUIDE = ROOT / "docs" / "guides" / "deploying.md"

SCRAPED = {"instance", "job"}  # labels that Prometheus adds
WIDTH = 24  # columns of a dashboard


@dataclass(slots=True)
class Series:
    """A metric of the server."""

    kind: str  # counter, gauge or histogram
    labels: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Asked:
    """A metric in an expression and the labels used with it."""

    name: str
    labels: set[str]
    in_range: bool


def asked_by(expression: str) -> Iterator[Asked]:
    """Yield the metrics that an expression reads.

    Raises:
        ValueError: the expression is not PromQL.
    """
    tree = promql_parser.parse(re.sub(r"\$__\w+", "5m", expression))
    selectors: list[tuple[Any, bool]] = []
    grouped: set[str] = set()
    ranges = 0  # range selectors not visited yet

    def visit(node: promql_parser.Expr) -> bool:
        nonlocal ranges
        if isinstance(node, promql_parser.MatrixSelector):
            ranges += 1
        elif isinstance(node, promql_parser.VectorSelector):
            selectors.append((node, ranges > 0))
            ranges = 0
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            grouped.update(node.modifier.labels)
        return True

    promql_parser.walk(tree, pre_visit=visit)
    for selector, in_range in selectors:
        yield Asked(selector.name, {*grouped, *(each.name for each in selector.matchers.matchers)}, in_range)


@pytest.fixture(scope="module")
def series(server: ServerProcess) -> dict[str, Series]:
    """Metrics of a real server after an answer and an error."""
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        assert client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2}).status_code == 200
        assert client.post("/v1/completions", json={"prompt": []}).status_code == 400
        text = client.get("/metrics").text
    found: dict[str, Series] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, Series(family.type)).labels.update(sample.labels)
    return found


def check(expression: str, series: dict[str, Series]) -> None:
    """Check that an expression matches existing metrics."""
    asked = list(asked_by(expression))
    assert asked
    for each in asked:
        assert each.name in series, each.name
        missing = each.labels - series[each.name].labels - SCRAPED
        assert not missing, f"{each.name} has no {missing}"
        # rate() of a gauge and a counter without rate() are meaningless.
        assert each.in_range == (series[each.name].kind != "gauge"), each.name


def test_dashboard_expressions_match_metrics(series: dict[str, Series]) -> None:
    for panel, target in TARGETS:
        check(target["expr"], series)
        (first, *others) = [each.labels for each in asked_by(target["expr"])]
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        known = first.union(*others) | SCRAPED
        assert named <= known, f"{panel['title']}: no {named - known} to name a curve by"


@pytest.mark.parametrize(
    "wrong",
    [
        'sum(rate(logprobd:prompt_tokens{model_name="m"}[5m]))',  # without _total
        'sum(rate(http_requests_total{model_name="m"}[5m]))',  # a label of other metrics
        "sum by (reason) (logprobd:num_requests_running)",
        "rate(logprobd:num_requests_running[5m])",
        "sum(logprobd:prompt_tokens_total)",
    ],
)
def test_dashboard_check_rejects_unknown_metrics(series: dict[str, Series], wrong: str) -> None:
    with pytest.raises(AssertionError):
        check(wrong, series)
    with pytest.raises(ValueError, match="unclosed"):
        list(asked_by(wrong + " + ("))


def test_dashboard_shows_every_engine_metric(series: dict[str, Series]) -> None:
    shown = {each.name for _, target in TARGETS for each in asked_by(target["expr"])}
    suffixes = r"_(total|sum|count|bucket|created)$"
    left_out = {re.sub(suffixes, "", name) for name in series if name.startswith("logprobd:")} - {
        re.sub(suffixes, "", name) for name in shown
    }
    assert left_out == {
        "logprobd:request_inference_time_seconds",
        "logprobd:request_max_num_generation_tokens",
        "logprobd:request_params_max_tokens",
        "logprobd:request_params_n",
        "logprobd:request_time_per_output_token_seconds",
    }


def test_dashboard_variables_are_defined_and_used(series: dict[str, Series]) -> None:
    assert list(VARIABLES) == ["datasource", "model_name", "instance"]
    expressions = "\n".join(target["expr"] for _, target in TARGETS)
    assert set(re.findall(r"\$(?!__)(\w+)", expressions)) == {"model_name", "instance"}
    for name in ("model_name", "instance"):
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", VARIABLES[name]["query"]["query"])
        assert found is not None
        assert found[2] == name
        check(found[1], series)
        ((asked),) = asked_by(found[1])
        assert name in series[asked.name].labels | SCRAPED
    assert VARIABLES["datasource"] | {"type": "datasource", "query": "prometheus"} == VARIABLES["datasource"]


def test_dashboard_uses_the_chosen_data_source() -> None:
    sources = [each["datasource"] for panel, target in TARGETS for each in (panel, target)]
    sources += [VARIABLES[name]["datasource"] for name in ("model_name", "instance")]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_dashboard_can_be_imported() -> None:
    assert (DASHBOARD["uid"], DASHBOARD["title"]) == ("logprobd", "logprobd")
    assert DASHBOARD["schemaVersion"] >= 36  # data sources are objects since 36
    assert "id" not in DASHBOARD  # Grafana assigns ids; a fixed one could overwrite another dashboard


def test_dashboard_error_panels_show_zero_without_errors() -> None:
    (errors,) = [panel for panel in PANELS if panel["title"] == "Errors"]
    for target in errors["targets"]:
        above, _, _ = target["expr"].partition(" / ")
        assert above.endswith(" or vector(0))")


def test_dashboard_panels_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = [(panel["title"], panel["gridPos"]) for panel in DASHBOARD["panels"]]
    for title, place in places:
        assert place["x"] >= 0, title
        assert place["x"] + place["w"] <= WIDTH, title
    for (one, a), (other, b) in itertools.combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (one, other)
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Traffic", "Latency", "Tokens", "Engine", "Process"]


def test_dashboard_panels_have_descriptions() -> None:
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)
    for panel in PANELS:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["type"] in {"timeseries", "heatmap", "stat"}
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)
        heat = panel["type"] == "heatmap"
        assert all((target["format"] == "heatmap") == heat for target in panel["targets"])
        unit = panel["options"]["yAxis"]["unit"] if heat else panel["fieldConfig"]["defaults"]["unit"]
        assert unit


def test_alerts_of_the_guide_match_metrics(series: dict[str, Series]) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (rules,) = [yaml.safe_load(block)["groups"] for block in blocks if block.startswith("groups:")]
    alerts = [rule for group in rules for rule in group["rules"]]
    assert len(alerts) == 3
    for alert in alerts:
        for each in asked_by(alert["expr"]):
            assert each.name in series
            assert each.labels <= series[each.name].labels | SCRAPED
