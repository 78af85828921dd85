"""Whatever a dashboard or an alert asks for is told by a server, with the labels that it is asked for by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.observability.metrics import ServerMetrics
from server.types import StepStats

DEPLOY = Path(__file__).parents[2] / "deploy"
SELECTOR = re.compile(r"\b(idefics2:\w+|process_\w+)(?:\{([^}]*)\})?")
GIVEN = {"job", "instance"}  # by whoever scrapes


def panels() -> Iterator[tuple[str, str]]:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def alerts() -> list[dict[str, Any]]:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    return [rule for group in rules["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def told() -> dict[str, set[str]]:
    """The labels of every sample's name that a server tells."""
    metrics = ServerMetrics("m")
    metrics.record_engine(max_model_len=4096, num_blocks=1, block_size=1, num_tile_slots=1)
    metrics.record_step(StepStats(step_seconds=0.1))
    metrics.record_http(handler="/v1/chat/completions", method="POST", status=200, seconds=0.1)
    names: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names


ASKED = [*panels(), *((rule["alert"], rule["expr"]) for rule in alerts())]


@pytest.mark.parametrize(("title", "expr"), ASKED, ids=[title for title, _ in ASKED])
def test_every_metric_that_is_asked_for_exists(told: dict[str, set[str]], title: str, expr: str) -> None:
    found = SELECTOR.findall(expr)
    assert found or expr.startswith("up{")
    for name, selector in found:
        assert name in told, f"{title}: no server tells {name}"
        asked = set(re.findall(r"(\w+)\s*[=!]~?", selector)) - GIVEN
        assert asked <= told[name], f"{title}: {name} has no label {asked - told[name]}"
    grouped = {label.strip() for labels in re.findall(r"\bby \(([^)]*)\)", expr) for label in labels.split(",")}
    known = GIVEN.union(*(told[name] for name, _ in found)) if found else GIVEN
    assert grouped <= known, f"{title}: grouped by {grouped - known}"


def test_each_alert_says_what_to_do_and_how_urgent_it_is() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        assert len(rule["annotations"]["action"]) > 20


def test_the_parts_of_the_dashboard_lie_side_by_side() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
