"""The text format: what we write is what prometheus_client would have written, and its parser reads it back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.observability.exposition import Coarser, Family, Histogram, Number, Page, Total

BOUNDS = (0.001, 0.25, 1.0, 2.5, 10.0, 500000.0)


def single(kind: str, member: Number | Total | Histogram | Coarser, **labels: str) -> Family:
    return Family("x:y", kind, "Help.", members={(): member}, labels=labels or {"model_name": "m"})  # type: ignore[arg-type]


def samples(text: str) -> list[tuple[str, float]]:
    """What stands before the number, and the number: one million is written in more than one way."""
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#" and "_created" not in line)
    return [(name, float(value)) for name, value in pairs]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1e6) | st.sampled_from(BOUNDS), max_size=30),
    st.sets(st.sampled_from(BOUNDS), min_size=1).map(sorted),
)
def test_histograms_are_the_librarys(observed: list[float], coarse: Sequence[float]) -> None:
    ours = Histogram(BOUNDS)
    for value in observed:
        ours.observe(value)
    for bounds, member in ((BOUNDS, ours), (coarse, Coarser(ours, coarse))):
        registry = CollectorRegistry()
        library = prometheus_client.Histogram("x:y", "Help.", ("model_name",), buckets=bounds, registry=registry)
        for value in observed:
            library.labels("m").observe(value)
        library.labels("m")  # without one there would be no lines
        assert samples(single("histogram", member).render()) == samples(generate_latest(registry).decode())


def test_an_observation_at_a_bound_is_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(1.0)
    histogram.observe(2.0, 3)
    histogram.observe(math.nextafter(2.0, 3.0))
    assert histogram.counts == [1, 3, 1]
    assert histogram.total == pytest.approx(9.0)
    assert list(histogram.numbers()) == [1, 4, 5, 5, pytest.approx(9.0)]
    assert list(Coarser(histogram, (2.0,)).numbers()) == [4, 5, 5, pytest.approx(9.0)]


def test_bounds_that_are_not_counted() -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        Coarser(Histogram((1.0, 2.0)), (1.5,))
    with pytest.raises(ValueError, match="must ascend"):
        Histogram((2.0, 1.0))
    with pytest.raises(ValueError, match="must ascend"):
        Histogram((1.0, 1.0))


def test_numbers() -> None:
    first, second = Number(), Number(2)
    family = single("counter", Total(first, second))
    assert family.name == "x:y_total"
    first.value += 40
    assert family.render().splitlines() == [
        "# HELP x:y_total Help.",
        "# TYPE x:y_total counter",
        'x:y_total{model_name="m"} 42.0',
    ]
    first.value = 0.125
    assert family.render().splitlines()[2] == 'x:y_total{model_name="m"} 2.125'
    assert single("gauge", second).render().splitlines()[1:] == ["# TYPE x:y gauge", 'x:y{model_name="m"} 2.0']


@pytest.mark.parametrize("text", ['a"b', "a\\b", "a\nb", "a\\nb", "end\\", "100%", "%s%d%%", "{a=b,c}", "é漢🙂", ""])
def test_any_label_value_can_be_read_back(text: str) -> None:
    members: dict[tuple[str, ...], Number] = {(text,): Number(1), ("other",): Number(2)}
    labels = {"model_name": text}
    family = Family("x", "counter", "Full to 100%.", members=members, label_names=("code",), labels=labels)
    [found] = text_string_to_metric_families(family.render())
    assert found.documentation == "Full to 100%."
    assert [(sample.labels, sample.value) for sample in found.samples] == [
        ({"model_name": text, "code": text}, 1),
        ({"model_name": text, "code": "other"}, 2),
    ]


def test_members_may_come_later() -> None:
    members: dict[tuple[str, ...], Histogram] = {}
    family = Family("x", "histogram", "Help.", members=members, label_names=("handler",), labels={}, created=5.0)
    assert [line[0] for line in family.render().splitlines()] == ["#"] * 4
    for handler, value in (("/a", 0.5), ("/b", 1.5)):
        members[handler,] = Histogram((1.0,))
        members[handler,].observe(value)
        assert f'x_bucket{{handler="{handler}",le="1.0"}} {float(value < 1)}\n' in family.render()
        assert f'x_created{{handler="{handler}"}} 5.0\n' in family.render()
    members["/a",].observe(0.1)
    assert 'x_count{handler="/a"} 2.0\n' in family.render()
    assert 'x_count{handler="/b"} 1.0\n' in family.render()


def test_created_lines_are_those_of_the_library() -> None:
    registry = CollectorRegistry()
    prometheus_client.Counter("x:c", "Help.", ("a",), registry=registry).labels("1").inc(3)
    prometheus_client.Histogram("x:h", "Help.", ("a",), registry=registry, buckets=(1.0,)).labels("1").observe(2)
    prometheus_client.Gauge("x:g", "Help.", ("a",), registry=registry).labels("1").set(4)
    histogram = Histogram((1.0,))
    histogram.observe(2)
    page = Page("x:", {"a": "1"}, created=7.5)
    page.add("counter", "c", "Help.", Number(3))
    page.add("histogram", "h", "Help.", histogram)
    page.add("gauge", "g", "Help.", Number(4))

    def shape(text: str) -> list[str]:
        return [line.rsplit(" ", 1)[0] + " " if "_created{" in line else line for line in text.splitlines()]

    ours = "".join(family.render() for family in page.families)
    assert shape(ours) == shape(generate_latest(registry).decode())
    assert ours.count(" 7.5\n") == 2


def test_a_page() -> None:
    page = Page("p:", {"model_name": "m"})
    page.add("gauge", "a", "A.", Number(1))
    page.add_all("gauge", "b", "B.", members={("x",): Number(2)}, label_names=("by",), labels={})
    page.add_info("c", "C.", {"size": "16"})
    samples = [line for family in page.families for line in family.render().splitlines() if line[0] != "#"]
    assert samples == ['p:a{model_name="m"} 1.0', 'p:b{by="x"} 2.0', 'p:c{size="16"} 1.0']
