"""Reading what a server tells, through Prometheus' own parser."""

from __future__ import annotations

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from server.observability.metrics import ServerMetrics


def families(metrics: ServerMetrics) -> dict[str, Metric]:
    """By name; the parser takes the `_total` from a counter's. Fails if a name or a sample comes twice."""
    found: dict[str, Metric] = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        assert family.name not in found
        found[family.name] = family
        keys = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(set(keys)) == len(keys)
    return found


def values(metrics: ServerMetrics, prefix: str = "idefics2:") -> dict[str, float]:
    """Sample name without the prefix, with its labels other than the model's and the engine's, to value."""
    found = {}
    for family in families(metrics).values():
        for sample in family.samples:
            if not sample.name.startswith(prefix):
                continue
            labels = [f"{key}={value}" for key, value in sample.labels.items() if key not in ("model_name", "engine")]
            name = sample.name.removeprefix(prefix)
            found[f"{name}{{{','.join(sorted(labels))}}}" if labels else name] = sample.value
    return found
