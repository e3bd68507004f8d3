"""The metrics of several replicas, and of the front before them, as one text for Prometheus."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from serve.api.metrics import ERRORS_TEXT, OWN_PREFIX

_FRONT = "front"  # in the label `replica`


def merged(texts: Mapping[str, bytes], errors: Mapping[str, int]) -> bytes:
    """Every number of every replica, which the label `replica` tells apart: a sum over it is the deployment's.

    Args:
        texts: replica -> what it tells of itself.
        errors: code -> how often the front itself has told it to clients.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Replicas(texts, errors))
    return generate_latest(registry)


class _Replicas(Collector):
    def __init__(self, texts: Mapping[str, bytes], errors: Mapping[str, int]) -> None:
        self._texts = texts
        self._errors = errors

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        model = ""
        for replica, text in sorted(self._texts.items()):
            for family in text_string_to_metric_families(text.decode()):
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    model = sample.labels.get("model_name", model)
                    whole.samples.append(sample._replace(labels=sample.labels | {"replica": replica}))
        if self._errors:
            name = f"{OWN_PREFIX}request_errors"
            told = families.setdefault(name, CounterMetricFamily(name, ERRORS_TEXT))
            for code, count in sorted(self._errors.items()):
                told.add_sample(f"{name}_total", {"model_name": model, "code": code, "replica": _FRONT}, count)
        yield from families.values()
