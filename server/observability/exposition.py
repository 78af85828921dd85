"""Numbers that grow, and how Prometheus' text format tells them. Knows no metric by name.

A number and its names are apart: one histogram can be told twice, under two names and with two sets of buckets, and is
counted once. The text of a family is a template, built once and filled at each scrape, because a scrape happens on the
event loop that all streams share. Nothing here locks: whoever counts and renders sees to that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Kind = Literal["counter", "gauge", "histogram"]


class Place(NamedTuple):
    """A line: what its name adds to the family's, the `le` of a bucket, and the %-format of its number."""

    suffix: str
    le: str | None
    format: str


class Member(Protocol):
    """What a family has one or more of."""

    def places(self) -> Sequence[Place]:
        """Where its numbers go; the same at every call."""

    def numbers(self) -> Sequence[float]:
        """As they are now, in the order of the places."""


class Number:
    """A counter or a gauge: whoever holds it adds to `value` or sets it, and nobody lowers a counter."""

    __slots__ = ("value",)

    def __init__(self, value: float = 0.0) -> None:
        self.value = float(value)

    def places(self) -> Sequence[Place]:
        return (Place("", None, "%r"),)

    def numbers(self) -> Sequence[float]:
        return (self.value,)


class Peak(Number):
    """A gauge of the highest value since it was last told."""

    __slots__ = ()

    def numbers(self) -> Sequence[float]:
        highest, self.value = self.value, 0.0
        return (highest,)


class Asked:
    """A gauge whose value is asked for when it is told; 0 until there is somebody to ask."""

    def __init__(self) -> None:
        self.ask: Callable[[], float] = float

    def places(self) -> Sequence[Place]:
        return (Place("", None, "%r"),)

    def numbers(self) -> Sequence[float]:
        return (float(self.ask()),)


class Total:
    """The sum of numbers, for a name that means several of ours together."""

    def __init__(self, *numbers: Number) -> None:
        self._numbers = numbers

    def places(self) -> Sequence[Place]:
        return (Place("", None, "%r"),)

    def numbers(self) -> Sequence[float]:
        return (sum(number.value for number in self._numbers),)


class Histogram:
    """How many observations fell up to each bound, and their sum. `bounds` ascend; +Inf is implied."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        if list(bounds) != sorted(set(bounds)):
            raise ValueError("the bounds of a histogram must ascend")
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)  # not cumulative: one addition an observation
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def places(self) -> Sequence[Place]:
        return _bucket_places(self.bounds)

    def numbers(self) -> Sequence[float]:
        buckets = list(accumulate(self.counts))
        return (*buckets, buckets[-1], self.total)


class Coarser:
    """A histogram told with fewer buckets than are counted."""

    def __init__(self, histogram: Histogram, bounds: Sequence[float]) -> None:
        """Raises ValueError if a bound is not among those that are counted."""
        self._histogram = histogram
        self._bounds = bounds
        self._indices = [*(histogram.bounds.index(bound) for bound in bounds), -1]

    def places(self) -> Sequence[Place]:
        return _bucket_places(self._bounds)

    def numbers(self) -> Sequence[float]:
        buckets = list(accumulate(self._histogram.counts))
        return (*(buckets[index] for index in self._indices), buckets[-1], self._histogram.total)


def _bucket_places(bounds: Sequence[float]) -> Sequence[Place]:
    ends = [*(repr(float(bound)) for bound in bounds), "+Inf"]
    return [*(Place("_bucket", end, "%d.0") for end in ends), Place("_count", None, "%d.0"), Place("_sum", None, "%r")]


class Family:
    """A metric as it is told. `members` are found by the values of `label_names`, and may grow."""

    def __init__(
        self,
        name: str,
        kind: Kind,
        documentation: str,
        *,
        members: Mapping[tuple[str, ...], Member],
        label_names: tuple[str, ...] = (),
        labels: Mapping[str, str],
        created: float | None = None,
    ) -> None:
        """`labels` are those of all members. `created` (Unix seconds) adds `_created` lines, if it is not a gauge."""
        self.name = f"{name}_total" if kind == "counter" else name
        self._kind = kind
        self._documentation = documentation
        self._members = members
        self._label_names = label_names
        self._labels = labels
        self._created = (f"{name}_created", created) if created is not None and kind != "gauge" else None
        self._template = ""
        self._num_told = -1  # members that the template has lines for

    def render(self) -> str:
        """All lines, each ended."""
        if self._num_told != len(self._members):
            self._num_told = len(self._members)
            self._template = self._build()
        numbers: list[float] = []
        for member in self._members.values():
            numbers += member.numbers()
        return self._template % tuple(numbers)

    def _build(self) -> str:
        lines = self._head(self.name, self._kind)
        for values, member in self._members.items():
            for suffix, le, form in member.places():
                lines.append(f"{self._sample(self.name + suffix, values, le)} {form}")
        if self._created is not None:
            name, seconds = self._created
            lines += self._head(name, "gauge")
            lines += [f"{self._sample(name, values)} {seconds!r}" for values in self._members]
        return "".join(f"{line}\n" for line in lines)

    def _head(self, name: str, kind: str) -> list[str]:
        return [f"# HELP {name} {self._documentation}".replace("%", "%%"), f"# TYPE {name} {kind}"]

    def _sample(self, name: str, values: tuple[str, ...], le: str | None = None) -> str:
        """A line up to its number, with % doubled for the template."""
        labels = {**self._labels, **dict(zip(self._label_names, values, strict=True))}
        if le is not None:
            labels["le"] = le
        text = ",".join(f'{label}="{_escaped(value)}"' for label, value in sorted(labels.items()))
        return f"{name}{{{text}}}".replace("%", "%%")


class Page:
    """Families whose names begin alike and that share labels, in the order in which they were added."""

    def __init__(self, prefix: str, labels: Mapping[str, str], *, created: float | None = None) -> None:
        self.families: list[Family] = []
        self._prefix = prefix
        self._labels = labels
        self._created = created

    def add(self, kind: Kind, name: str, documentation: str, member: Member) -> None:
        """A family of one."""
        self.add_all(kind, name, documentation, members={(): member})

    def add_all(
        self,
        kind: Kind,
        name: str,
        documentation: str,
        *,
        members: Mapping[tuple[str, ...], Member],
        label_names: tuple[str, ...] = (),
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """`labels` replace those of the page."""
        self.families.append(
            Family(
                self._prefix + name,
                kind,
                documentation,
                members=members,
                label_names=label_names,
                labels=self._labels if labels is None else labels,
                created=self._created,
            )
        )

    def add_info(self, name: str, documentation: str, labels: Mapping[str, str], *, value: float = 1.0) -> None:
        """A gauge that says what it says in its labels."""
        self.add_all("gauge", name, documentation, members={(): Number(value)}, labels=labels)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
