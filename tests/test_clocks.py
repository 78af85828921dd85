"""Time is measured with clocks that nobody sets: a jump of the wall clock must not expire what is waiting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent / "server"
WALL_CLOCKS = {
    ("time", "time"),
    ("time", "time_ns"),
    ("datetime", "now"),
    ("datetime", "utcnow"),
    ("datetime", "today"),
    ("date", "today"),
}
# Where a date is what is wanted: file → what it goes into.
DATES = {
    "api/chat/routes.py": {"created"},
    "api/completions/routes.py": {"created"},
    "api/models.py": {"created"},
    "api/responses/answer.py": {"created_at", "completed_at"},
    "observability/metrics.py": {"self._created"},
}


def uses(file: Path) -> Iterator[str]:
    """The names that readings of the wall clock are given to, wherever one is mentioned."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
            assert not {alias.name for alias in node.names} & {"time", "time_ns"}, f"{file}: hides a clock"
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name | ast.Attribute):
            continue
        module = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
        if (module, node.attr) in WALL_CLOCKS:
            yield receiver(node, parents)


def receiver(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    while node in parents:
        child, node = node, parents[node]
        if isinstance(node, ast.keyword) and node.arg not in (None, "default_factory"):
            return str(node.arg)
        if isinstance(node, ast.Assign):
            return ast.unparse(node.targets[0])
        if isinstance(node, ast.AnnAssign):
            return ast.unparse(node.target)
        if isinstance(node, ast.Dict) and child in node.values:
            key = node.keys[node.values.index(child)]  # type: ignore[arg-type]
            return str(key.value) if isinstance(key, ast.Constant) else "?"
        if isinstance(node, ast.Compare | ast.BinOp):
            return "arithmetic"
    return "?"


def test_the_wall_clock_is_read_for_dates_alone() -> None:
    files = [file.relative_to(ROOT) for file in sorted(ROOT.rglob("*.py"))]
    found = {str(file): set(uses(ROOT / file)) for file in files if file.parts[0] != "bench"}  # a client of servers
    assert {file: names for file, names in found.items() if names} == DATES


def test_what_the_test_sees() -> None:
    source = {
        "x = time.time() + 5": "arithmetic",
        "while time.time() < end: pass": "arithmetic",
        "f(created=int(time.time()))": "created",
        "clock = time.time": "clock",
        "datetime.datetime.now()": "?",
    }
    for code, expected in source.items():
        tree = ast.parse(code)
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        [clock] = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("time", "now")]
        assert receiver(clock, parents) == expected
