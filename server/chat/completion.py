"""What Tab gives: names of commands, and paths as the command's parser reads them, with quotes or backslashes."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

_QUOTED = re.compile(r"""[\s"'\\]""")


def complete(line: str, *, names: Collection[str], with_paths: Collection[str]) -> list[str]:
    """All lines that `line`, which ends at the cursor, may become. Both collections hold names with their slash."""
    command, space, rest = line.partition(" ")
    if not space:
        return sorted(f"{name} " for name in names if line.startswith("/") and name.startswith(line))
    if command not in with_paths:
        return []
    return [f"{command} {path}" for path in complete_path(rest)]


def complete_path(typed: str) -> list[str]:
    """Paths that begin as what was typed does; folders end in a slash, a closing quote is put behind a file."""
    quote = typed[0] if typed[:1] in ("'", '"') else ""
    plain = typed[1:] if quote else re.sub(r"\\(.)", r"\1", typed)
    if not quote and re.search(r"(?<!\\)\s", typed):
        return []  # the word behind a path
    folder, name = os.path.split(plain)
    try:
        found = sorted(Path(folder or ".").expanduser().iterdir())
    except (OSError, RuntimeError, ValueError):
        return []
    matches = []
    for entry in found:
        if not entry.name.startswith(name) or (entry.name.startswith(".") and not name):
            continue
        path = plain[: len(plain) - len(name)] + entry.name
        is_folder = entry.is_dir()
        written = path if quote else _QUOTED.sub(r"\\\g<0>", path)
        matches.append(f"{quote}{written}{'/' if is_folder else quote}")
    return matches
