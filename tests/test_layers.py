"""Imports only point down. The layers are ARCHITECTURE.md's; this walks every import in server/."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "server"

# From the top down. A module may import its own package and anything in a lower layer; the roots may import each
# other, and so may the ground.
LAYERS = [
    {"cli", "__main__", "launch", "connections", "batch", "bench", "chat", "demo"},
    {"api"},
    {"llm"},
    {"fleet"},
    {"inputs", "outputs", "engine", "admission"},
    {"runner"},
    {"model", "grammar"},
    {"config", "types", "errors", "keys", "sandbox", "observability"},
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}

# The one doorway upwards: the runner speaks the engine's plain step messages.
DOORWAYS = {("runner", "server.engine.step")}

# Libraries that only these rooms may import.
OWNERS = {
    "fastapi": {"api"},
    "starlette": {"api"},
    "sse_starlette": {"api"},
    "prometheus_client": {"observability"},
    "uvicorn": {"connections"},
    "httptools": {"connections", "bench"},
    "torch": {"launch", "runner", "model", "demo"},
    "asyncio": {"launch", "connections", "api", "llm", "inputs", "grammar", "observability", "batch", "bench", "demo"},
    "httpx": {"inputs", "batch", "bench", "chat", "model"},
    "PIL": {"inputs", "bench", "demo"},
    "jinja2": {"inputs"},
    "llguidance": {"grammar"},
    "transformers": {"inputs", "model", "demo", "bench"},
    "safetensors": {"model", "demo"},
    "triton": {"model"},
}

# Nothing that a file or a client says may become code (HTTP clients and checkpoints are untrusted).
FORBIDDEN = {"pickle", "marshal", "shelve", "dill"}


def files() -> list[Path]:
    found = sorted(ROOT.rglob("*.py"))
    assert len(found) > 40
    return found


def room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """Full names of everything a file imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            yield node.module


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    here = room(file)
    if here == "__init__":
        return
    for name in imports(file):
        top, *rest = name.split(".")
        if top == "server" and rest:
            there = rest[0]
            allowed = there == here or RANK[there] > RANK[here] or RANK[there] == RANK[here] in (0, len(LAYERS) - 1)
            assert allowed or (here, name) in DOORWAYS, f"{here} may not import {name}"
        elif top in OWNERS:
            assert here in OWNERS[top], f"{here} may not import {top}"
        assert top not in FORBIDDEN, f"{name} turns data into code"


def test_only_one_file_fetches() -> None:
    """One guarded fetcher in the whole server: no other file under inputs/ or api/ opens a connection."""
    clients = ("batch", "bench", "chat")
    fetching = {str(f.relative_to(ROOT)) for f in files() if "httpx" in imports(f) and room(f) not in clients}
    fetching -= {"model/loader.py"}  # catches the errors of the hub's library
    assert fetching == {"inputs/image_fetch.py"}
    for file in files():
        text = file.read_text(encoding="utf-8")
        found = re.search(r"urlopen\(|load_image\(|trust_remote_code=True|torch\.load\(|(?<![.\w])eval\(", text)
        assert found is None, f"{file}: {found}"
