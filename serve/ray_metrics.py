"""The metrics of several replicas as one text for Prometheus."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


def merged(texts: Mapping[str, bytes]) -> bytes:
    """Every number of every replica, which the label `replica` tells apart: a sum over it is the deployment's.

    Args:
        texts: replica -> what it tells of itself.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Replicas(texts))
    return generate_latest(registry)


class _Replicas(Collector):
    def __init__(self, texts: Mapping[str, bytes]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in sorted(self._texts.items()):
            for family in text_string_to_metric_families(text.decode()):
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    whole.samples.append(sample._replace(labels=sample.labels | {"replica": replica}))
        yield from families.values()
