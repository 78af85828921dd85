"""The engines behind one API, as its event loop sees them: which take requests, what each does, who has which response.

With one engine it is that engine. Knows no text, no HTTP and no prompt; decides nothing but who gets what.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from server.engine.client import EngineClient
from server.engine.core import AbortRequests, EngineInfo
from server.engine.placement import Placement
from server.engine.supervisor import EngineLoss, EngineSupervisor
from server.errors import EngineDeadError
from server.outputs.response import ResponseStream
from server.types import EngineRequest, StepStats

# Gauges of StepStats: of a fleet, the sum over its engines.
_GAUGES = ("num_running", "num_waiting", "num_held", "num_blocks", "num_used_blocks")


@dataclass
class Engine:
    """One of them. `client` is None while there is none that takes requests; then `loss` may say why."""

    index: int
    supervisor: EngineSupervisor
    client: EngineClient | None = None
    info: EngineInfo | None = None  # of this one, or of the last
    loss: EngineLoss | None = None  # of the last one, until there is another
    stats: StepStats = field(default_factory=StepStats)  # of the last step

    @property
    def is_coming(self) -> bool:
        """Whether there is, or will be, one that takes requests."""
        return self.loss is None or self.loss.back_at is not None

    def submit(self, message: EngineRequest | AbortRequests) -> None:
        """Tell it, if it is there. Whoever waits for another is submitted to that."""
        if self.client is not None:
            with contextlib.suppress(EngineDeadError):  # its loss is on its way
                self.client.submit(message)


class Fleet:
    """Lives in one event loop."""

    def __init__(self, supervisors: Sequence[EngineSupervisor]) -> None:
        self.engines = [Engine(index, supervisor) for index, supervisor in enumerate(supervisors)]
        self._placement = Placement(len(self.engines))
        self._placed: dict[ResponseStream, Engine] = {}

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo | None:
        """What may be counted on: of the engine with the shortest context. None until all have been ready once."""
        infos = [engine.info for engine in self.engines if engine.info is not None]
        return min(infos, key=lambda info: info.max_model_len) if len(infos) == len(self.engines) else None

    @property
    def is_alive(self) -> bool:
        """Whether there is, or will be, an engine."""
        return any(engine.is_coming for engine in self.engines)

    @property
    def num_up(self) -> int:
        return sum(engine.client is not None for engine in self.engines)

    @property
    def seconds_until_back(self) -> float | None:
        """Until the first of those that are gone is expected; None: none is."""
        times = [engine.loss.back_at for engine in self.engines if engine.loss and engine.loss.back_at is not None]
        return max(min(times) - time.monotonic(), 1.0) if times else None

    def resident_bytes(self) -> int:
        """Main memory of the engines' own processes."""
        return sum(engine.client.resident_bytes() for engine in self.engines if engine.client is not None)

    def merged(self, engine: Engine, stats: StepStats) -> StepStats:
        """An engine's stats, its gauges replaced by those of the fleet."""
        engine.stats = stats
        if len(self.engines) == 1:
            return stats
        sums = {name: sum(getattr(one.stats, name) for one in self.engines) for name in _GAUGES}
        return msgspec.structs.replace(stats, **sums)

    # -- who has what --------------------------------------------------------------------------------------------

    def place(self, response: ResponseStream) -> None:
        """Give a response to an engine; while there is none, to the next that comes."""
        available = [engine.index for engine in self.engines if engine.client is not None]
        if not available:
            return
        index = self._placement.place(response.requests[0], available, num_answers=len(response.streams))
        self._placed[response] = self.engines[index]
        for request in response.requests:
            self.engines[index].submit(request)

    def release(self, response: ResponseStream, unfinished: Sequence[str]) -> None:
        """A response is over; its engine is to let go of these answers."""
        engine = self._displace(response)
        if engine is not None and unfinished:
            engine.submit(AbortRequests(list(unfinished)))

    def lose(self, engine: Engine) -> list[ResponseStream]:
        """What an engine that is gone had, in the order in which it was placed; none of it is placed any more."""
        lost = [response for response, owner in self._placed.items() if owner is engine]
        for response in lost:
            self._displace(response)
        return lost

    def is_placed(self, response: ResponseStream) -> bool:
        return response in self._placed

    def _displace(self, response: ResponseStream) -> Engine | None:
        engine = self._placed.pop(response, None)
        if engine is not None:
            self._placement.release(engine.index, num_answers=len(response.streams))
        return engine
