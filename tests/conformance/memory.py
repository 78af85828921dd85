"""What a server's processes hold, as Linux counts it."""

from __future__ import annotations

import os
from pathlib import Path


def children(pid: int) -> list[int]:
    """Processes that `pid` and its children have started, of all generations."""
    found = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, tasks.read_text().split()):
            found += [child, *children(child)]
    return found


def resident_bytes(pid: int) -> int:
    """Memory of a server and of all that it has started. Pages that two of them share count twice."""
    pages = 0
    for process in (pid, *children(pid)):
        pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
