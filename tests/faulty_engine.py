"""`serve` as it is, but for an engine that computes nothing and breaks on demand; it is there within a second.

Run as `python -m tests.faulty_engine serve …`: real processes, real HTTP, real tokens of a real checkpoint. What an
answer says follows from its prompt alone. A request with one of the seeds below makes the engine break in the first
step that it is in; the others are answered, a token every STEP_SECONDS. What the file named by START_FILE holds decides
what becomes of an engine that starts: "wait" lets it wait, "fail" and "crash" end it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.engine.core import EngineCore, EngineInfo
from server.engine.limits import SchedulerLimits
from server.engine.scheduler import Scheduler
from server.engine.step import ModelRunnerOutput, SchedulerOutput
from server.errors import ConfigError, EngineBrokenError
from tests.factories import FakeExecutor

if TYPE_CHECKING:
    from server.config import ServerConfig

KILLS, HANGS, SPINS, BREAKS = range(1001, 1005)
SPIN_SECONDS = 5.0
STEP_SECONDS = 0.005
START_FILE = "FAULTY_ENGINE_START"


class FaultyExecutor(FakeExecutor):
    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        for new in step.new_requests:
            self._break(new.sampling.seed)
        time.sleep(STEP_SECONDS)
        return super().execute(step)

    def _break(self, seed: int | None) -> None:
        if seed == KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        elif seed == HANGS:
            threading.Event().wait()
        elif seed == SPINS:
            end = time.monotonic() + SPIN_SECONDS
            while time.monotonic() < end:
                pass
        elif seed == BREAKS:
            raise EngineBrokenError("a device that is lost")

    @staticmethod
    def next_token(tokens: Sequence[int]) -> int:
        """Words of the middle of Mistral's vocabulary."""
        return 5000 + int.from_bytes(hashlib.sha256(repr(list(tokens)).encode()).digest()[:2], "little") % 20000


def build_faulty_core(config: ServerConfig, folder: Path, *, index: int) -> EngineCore:
    """Runs in the engine's own process."""
    _wait_to_start()
    limits = SchedulerLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=256,
        max_num_batched_pixels=1,
        max_model_len=2048,
        block_size=16,
        num_blocks=1024,
        num_tile_slots=8,
        enable_prefix_caching=True,
    )
    info = EngineInfo(
        max_model_len=2048,
        num_blocks=1024,
        block_size=16,
        num_tile_slots=8,
        device="none",
        dtype="none",
        num_parameters=0,
        load_seconds=0.0,
    )
    return EngineCore(Scheduler(limits), FaultyExecutor(block_size=16), info)


def _wait_to_start() -> None:
    file = os.environ.get(START_FILE)
    while file is not None and (what := Path(file).read_text()):
        if what == "fail":
            raise ConfigError("the model is not there any more")
        if what == "crash":
            os._exit(3)
        time.sleep(0.02)


def main() -> int:
    from server import cli
    from tests import faulty_engine  # by its name, which the engine's process can import; not as __main__

    launch: Any = importlib.import_module("server.launch")
    launch.build_core = faulty_engine.build_faulty_core
    supervisor: Any = importlib.import_module("server.engine.supervisor")
    supervisor.MAX_PAUSE_SECONDS = 0.1  # one server lives through the faults of many tests
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
