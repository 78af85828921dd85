"""What a server's processes hold: files, threads, memory. Read from /proc, so on Linux and on this machine only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What a process's command line holds → what it is called. The first that fits.
_ROLES = {"image_worker": "image worker", "check_worker": "grammar child", "spawn_main": "engine"}


@dataclass(frozen=True)
class Held:
    """By one process. Memory in MiB; processor time in seconds, of this process alone."""

    pid: int
    role: str
    files: int
    threads: int
    memory: float
    seconds: float


def held_by(pid: int) -> list[Held]:
    """The server's process, then all below it. Those that end meanwhile are left out."""
    found = []
    for one in (pid, *_descendants(pid)):
        try:
            found.append(_held(one, is_server=one == pid))
        except OSError:
            continue
    return found


def _held(pid: int, *, is_server: bool) -> Held:
    folder = Path(f"/proc/{pid}")
    command = (folder / "cmdline").read_bytes().decode(errors="replace")
    role = next((name for text, name in _ROLES.items() if text in command), "other")
    clock = (folder / "stat").read_text().rpartition(")")[2].split()
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
    return Held(
        pid=pid,
        role="server" if is_server else role,
        files=len(os.listdir(folder / "fd")),
        threads=int(status["Threads"]),
        memory=int(status.get("VmRSS", "0 kB").split()[0]) / 1024,
        seconds=(int(clock[11]) + int(clock[12])) / os.sysconf("SC_CLK_TCK"),
    )


def _descendants(pid: int) -> Iterator[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for task in tasks:
        try:
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        except OSError:
            continue
        for child in map(int, children):
            yield child
            yield from _descendants(child)
