"""Every one of the 80 conformance cases has a test, under its own number and in its own file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

NUM_CASES = 80
FILES = {
    "test_protocol.py": range(1, 17),
    "test_generation.py": range(17, 41),
    "test_structured.py": range(41, 47),
    "test_streaming.py": range(47, 56),
    "test_images.py": range(56, 80),
    "test_aftermath.py": range(80, 81),
}


def cases_in(file: Path) -> set[int]:
    """Numbers in the names of a file's test functions, which pytest collects because they stand at its top level."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            match = re.fullmatch(r"test_case_(\d\d)_\w+", node.name)
            assert match, f"{file.name}: {node.name} has no case's number"
            skipped = [ast.unparse(mark) for mark in node.decorator_list if re.search("skip|xfail", ast.unparse(mark))]
            assert not skipped, f"{file.name}: {node.name} would not run"
            found.add(int(match[1]))
    return found


def test_every_case_has_a_test() -> None:
    here = Path(__file__).parent
    missing = set(range(1, NUM_CASES + 1))
    for name, numbers in FILES.items():
        found = cases_in(here / name)
        assert found <= set(numbers), f"{name}: cases {sorted(found - set(numbers))} belong elsewhere"
        missing -= found
    assert not missing, f"cases without a test: {sorted(missing)}"
