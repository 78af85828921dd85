"""`serve` as it is, but for two things that no setting allows: an engine that fails, and pictures from this machine.

Run as `python -m tests.conformance.sabotage serve …`: a real server process, of which only this is changed:

- A request with the seed CRASH_SEED makes the engine's executor raise in the middle of its answer. The step has been
  computed by then, as when a device reports late what went wrong.
- The checkpoint's row of POISON is not a number, so whichever answer comes to that token breaks down, alone.
- PUBLIC, an address of this machine, counts as public, on any port, and the names in NAMES are known. Every other
  address of this machine stays forbidden.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import ipaddress
import shutil
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.inputs.loopback import Handler, WebServer, web_server

if TYPE_CHECKING:
    from server.config import ServerConfig
    from server.engine.core import EngineCore
    from server.engine.step import ModelRunnerOutput, SchedulerOutput

CRASH_SEED = 13
CRASH_AFTER_STEPS = 6
POISON = 31999
SECRET = "/home/operator/weights at 0x7f0000000000"  # what an exception may say and no client may read

PUBLIC, INSIDE = "127.0.0.2", "127.0.0.1"
NAMES: Mapping[str, Sequence[str]] = {
    "pictures.example": (PUBLIC,),
    "inside.example": (INSIDE,),
    "mixed.example": (PUBLIC, INSIDE),
    "cloud.example": ("169.254.169.254",),
}


class CrashingExecutor:
    """The real executor, which raises after a step that a request with CRASH_SEED is in for the last time."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self._steps_left: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        for new in step.new_requests:
            if new.sampling.seed == CRASH_SEED:
                self._steps_left[new.request_id] = CRASH_AFTER_STEPS
        result: ModelRunnerOutput = self._executor.execute(step)
        for item in step.scheduled:
            if item.request_id in self._steps_left:
                self._steps_left[item.request_id] -= 1
                if not self._steps_left[item.request_id]:
                    del self._steps_left[item.request_id]
                    raise RuntimeError(SECRET)
        return result


def build_crashing_core(config: ServerConfig, folder: Path, *, index: int) -> EngineCore:
    """Runs in the engine's own process."""
    from server.launch import build_core

    core = build_core(config, folder, index=index)
    core.executor = CrashingExecutor(core.executor)
    return core


async def resolve(host: str, port: int) -> Sequence[str]:
    if host in NAMES:
        return NAMES[host]
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def main() -> int:
    from server import cli
    from tests.conformance import sabotage  # by its name, which the engine's process can import; not as __main__

    # The module's own names are what it builds from.
    launch: Any = importlib.import_module("server.launch")
    launch.build_core = sabotage.build_crashing_core
    launch.ImageFetcher = functools.partial(
        launch.ImageFetcher,
        resolver=resolve,
        extra_networks=[ipaddress.ip_network(PUBLIC)],
        extra_ports=range(1024, 1 << 16),
    )
    return cli.main()


# --- for the tests -------------------------------------------------------------------------------------------------


def poisoned_copy(checkpoint: Path, out: Path) -> Path:
    """The same checkpoint with one row of its embedding that is not a number."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, out)
    weights = load_file(out / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    weights[name][POISON] = torch.nan
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@contextmanager
def web(handlers: Mapping[str, Handler], *, host: str = PUBLIC) -> Iterator[WebServer]:
    """A web server in a thread of its own; on leaving, waits until every connection has ended."""
    ready: threading.Event = threading.Event()
    made: list[tuple[WebServer, asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        async with web_server(dict(handlers), host=host) as state:
            leave = asyncio.Event()
            made.append((state, asyncio.get_running_loop(), leave))
            ready.set()
            await leave.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    ((state, loop, leave),) = made
    try:
        yield state
    finally:
        loop.call_soon_threadsafe(leave.set)
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
