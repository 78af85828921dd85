"""`AsyncLLM`: the facade between HTTP and the engine. `prepare` a conversation, then iterate over `generate`.

One cancel path: whoever stops iterating early closes the generator, and its `finally` aborts in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from server.admission import Admission
from server.engine.client import EngineClient
from server.engine.core import AbortRequests, EngineInfo
from server.engine.supervisor import EngineListener, EngineLoss, EngineSupervisor
from server.errors import CapacityError, DeadlineError, EngineDeadError, UnavailableError
from server.fleet import Engine, Fleet
from server.inputs.processor import InputProcessor
from server.observability.loop_lag import LoopLag
from server.observability.metrics import ServerMetrics
from server.outputs.processor import OutputProcessor
from server.outputs.response import ResponseStream
from server.types import (
    ChatInput,
    EngineOutputs,
    EngineRequest,
    PromptInput,
    RequestOrigin,
    RequestOutput,
    StepStats,
)

logger = logging.getLogger(__name__)

VERSION = "0.1.0"

# Waiting prompts are worth so many full contexts unless the operator says otherwise.
QUEUED_CONTEXTS = 8
# Until somebody else has restarted a server that has given up.
DEAD_RETRY_SECONDS = 5.0


class AsyncLLM:
    """Everything a front end needs of an engine. Lives in one event loop, between `start` and `close`.

    Engines come and go. While there is none, what has come in waits for the next one, as far as no engine has told
    anything of it; what comes new is refused.
    """

    def __init__(
        self,
        *,
        admission: Admission,
        engines: Sequence[EngineSupervisor],
        inputs: InputProcessor,
        outputs: OutputProcessor,
        metrics: ServerMetrics,
        model_names: tuple[str, ...],
        model_root: str,
        vocab_size: int,
        fingerprint: str,
    ) -> None:
        """`fingerprint` tells configurations apart whose answers may differ."""
        self.model_names = model_names
        self.model_root = model_root
        self.vocab_size = vocab_size
        self.system_fingerprint = f"idefics2-server-{VERSION}-{fingerprint}"
        self.metrics = metrics
        self._loop_lag = LoopLag(metrics)
        self._fleet = Fleet(engines)
        self._inputs = inputs
        self._outputs = outputs
        self._admission = admission
        self._draining = False
        self._closed = False

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        """Start the engines and wait until all are ready. Raises ConfigError or CheckpointError when one cannot."""
        self._loop_lag.start()
        loop = asyncio.get_running_loop()

        def in_loop(callback: Callable[..., None], engine: Engine) -> Callable[..., None]:
            def hand_over(*args: Any) -> None:
                loop.call_soon_threadsafe(callback, engine, *args)

            return hand_over

        def listener(engine: Engine) -> EngineListener:
            return EngineListener(
                on_outputs=in_loop(self._on_outputs, engine),
                on_ready=in_loop(self._on_ready, engine),
                on_lost=in_loop(self._on_lost, engine),
            )

        await self._inputs.start()
        engines = self._fleet.engines
        await asyncio.gather(*(asyncio.to_thread(engine.supervisor.start, listener(engine)) for engine in engines))
        return self.info

    def drain(self) -> None:
        """Refuse new work; what was accepted goes on."""
        self._draining = True

    def end_all(self) -> None:
        """End what is still open with an error, and refuse whatever comes."""
        self._draining = self._closed = True
        self._outputs.fail_all(UnavailableError("the server is shutting down", retry_after=1.0))

    async def close(self) -> None:
        """End what is still open with an error, and stop the engine."""
        self.end_all()
        self._loop_lag.stop()
        await self._inputs.close()
        await asyncio.gather(*(asyncio.to_thread(engine.supervisor.close) for engine in self._fleet.engines))

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        info = self._fleet.info
        if info is None:
            raise UnavailableError("the model is still loading", code="model_loading", retry_after=5.0)
        return info

    @property
    def max_model_len(self) -> int:
        return self.info.max_model_len

    @property
    def is_alive(self) -> bool:
        """Whether there is, or will be, an engine."""
        return self._fleet.is_alive

    @property
    def has_started(self) -> bool:
        """Whether it has ever been ready."""
        return self._fleet.info is not None

    @property
    def is_ready(self) -> bool:
        """Whether at least one engine takes requests, and all have been ready once."""
        return self.has_started and self._fleet.num_up > 0 and not self._draining and self._inputs.is_healthy

    @property
    def num_in_flight(self) -> int:
        return self._admission.num_in_flight

    def check_capacity(self, origin: RequestOrigin) -> None:
        """Raise CapacityError or UnavailableError when a request from there cannot be taken now; that is counted."""
        with self._counting_refusals():
            self.check_ready()
            self._admission.check(origin.key)

    @contextlib.contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except (CapacityError, UnavailableError) as error:
            self.metrics.record_rejection(error.code)
            raise

    def check_ready(self) -> None:
        """Raise UnavailableError while no request can be taken from anybody."""
        self._check_open()
        if self._draining:
            raise UnavailableError("the server is shutting down", retry_after=1.0)
        _ = self.info  # refuses while loading
        if self._fleet.num_up == 0:
            raise EngineDeadError(
                "the engine has stopped and is being restarted",
                code="engine_restarting",
                retry_after=self._fleet.seconds_until_back or DEAD_RETRY_SECONDS,
            )

    def _check_open(self) -> None:
        if not self.is_alive:
            raise EngineDeadError("the engine is not running", retry_after=DEAD_RETRY_SECONDS)
        if self._closed:
            raise UnavailableError("the server is shutting down", retry_after=1.0)

    # -- one request ---------------------------------------------------------------------------------------------

    async def prepare(self, item: ChatInput | PromptInput) -> EngineRequest:
        """Template, limits, tokens, grammar and pictures; nothing has reached the engine yet.

        Raises ClientError, DeadlineError, or CapacityError when others were faster: a body takes its time after the
        first check.
        """
        self.check_capacity(item.origin)
        with self._admission.hold(item.origin.key) as hold, self._counting_refusals():
            try:
                async with asyncio.timeout(_seconds_until(item.origin.deadline)):
                    return await self._inputs.process(item, max_model_len=self.info.max_model_len, admit=hold.wait)
            except TimeoutError:
                raise _too_late() from None

    async def generate(self, *requests: EngineRequest) -> AsyncIterator[RequestOutput]:
        """Outputs of all answers to these requests, as they come, until each has had its finish_reason.

        Raises ServerError when the engine fails one of them, and DeadlineError when their time is over.
        """
        self._check_open()  # much may have happened while the requests were prepared
        num_answers = sum(len(request.choice_ids) for request in requests)
        origin = requests[0].origin
        with self._counting_refusals():  # others may have come in since these were prepared
            self._admission.check(origin.key)
            self._admission.check_answers(num_answers)
        wake = asyncio.Event()
        response = self._outputs.open(requests, wake.set)
        with self._admission.hold(origin.key, answers=num_answers) as hold, self._until(origin.deadline, response):
            try:
                hold.wait(sum(len(request.prompt_token_ids) for request in requests), check=False)
                self._fleet.place(response)
                while True:
                    output = response.take()
                    if output is None:
                        await wake.wait()
                        wake.clear()
                        continue
                    hold.stop_waiting()
                    is_last = response.is_finished
                    if is_last:  # now, for after the last output nobody asks again
                        self._admission.note_end(num_answers)
                    yield output
                    if is_last:
                        return
            finally:
                self._admission.charge(origin.key, response.num_computed_tokens)
                self._fleet.release(response, self._outputs.close(response))

    @contextlib.contextmanager
    def _until(self, deadline: float, response: ResponseStream) -> Iterator[None]:
        """Fail a response that is not complete at its deadline."""
        timer = None
        seconds = _seconds_until(deadline)
        if seconds is not None:
            timer = asyncio.get_running_loop().call_later(seconds, lambda: response.fail(_too_late()))
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    # -- words and ids -------------------------------------------------------------------------------------------

    async def tokenize(self, item: ChatInput | PromptInput) -> list[int]:
        """The ids that `prepare` would make, pictures' placeholders included. Loads no picture. Raises ClientError."""
        return (await self._inputs.encode_input(item, max_model_len=self.info.max_model_len)).token_ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their names."""
        return self._inputs.tokenizer.decode(token_ids)

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Each id's piece of the vocabulary."""
        return self._inputs.tokenizer.token_strings(token_ids)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of special tokens, which add nothing to a text."""
        return frozenset(self._inputs.tokenizer.special_tokens.values())

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        """Ids that stand for pictures, which no client may write."""
        tokenizer = self._inputs.tokenizer
        return (tokenizer.fake_token_id, tokenizer.image_token_id)

    # -- from the engine -----------------------------------------------------------------------------------------

    def _on_ready(self, engine: Engine, client: EngineClient, info: EngineInfo) -> None:
        engine.client, engine.info, engine.loss = client, info, None
        if self._admission.max_queued_tokens is None:
            self._admission.max_queued_tokens = QUEUED_CONTEXTS * info.max_model_len * len(self._fleet.engines)
        self.metrics.record_engine(
            max_model_len=info.max_model_len,
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            num_tile_slots=info.num_tile_slots,
        )
        self.metrics.record_engine_up(self._fleet.num_up)
        self.metrics.watch_engine_memory(self._fleet.resident_bytes)
        self._place_untold()

    def _place_untold(self) -> None:
        """Give engines, as far as there are any, what no engine has and none has told anything of."""
        for response in self._outputs.untold:
            if not self._fleet.is_placed(response):
                self._fleet.place(response)

    def _on_outputs(self, engine: Engine, outputs: EngineOutputs) -> None:
        if outputs.stats.num_prompt_tokens:
            self._admission.note_computed(outputs.stats.num_prompt_tokens)
        ended_here = self._outputs.process(outputs, stats=self._fleet.merged(engine, outputs.stats))
        if ended_here:
            engine.submit(AbortRequests(ended_here))

    def _on_lost(self, engine: Engine, loss: EngineLoss) -> None:
        engine.client, engine.loss = None, loss
        self.metrics.record_engine_up(self._fleet.num_up)
        self.metrics.record_step(self._fleet.merged(engine, StepStats()))  # nothing runs or waits there any more
        if loss.back_at is not None:
            self.metrics.record_engine_restart(loss.cause)
        retry_after = self._fleet.seconds_until_back or DEAD_RETRY_SECONDS
        for response in self._fleet.lose(engine):
            response.lose_engine(retry_after=retry_after)
        if self.is_alive:
            self._place_untold()
        else:
            self._outputs.fail_all(EngineDeadError("the engine is not running", retry_after=DEAD_RETRY_SECONDS))


def _seconds_until(deadline: float) -> float | None:
    """What is left until a time of `time.monotonic()`, never below 0; None: for ever."""
    return None if deadline == math.inf else max(deadline - time.monotonic(), 0.0)


def _too_late() -> DeadlineError:
    return DeadlineError("the request was not answered within its time")
