"""`AsyncLLM`: the facade between HTTP and the engine. `prepare` a conversation, then iterate over `generate`.

One cancel path: whoever stops iterating early closes the generator, and its `finally` aborts in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence

from server.config import ServerConfig
from server.engine.client import EngineClient
from server.engine.core import AbortRequests, EngineInfo
from server.errors import CapacityError, EngineDeadError, UnavailableError
from server.inputs.processor import InputProcessor
from server.observability.metrics import ServerMetrics
from server.outputs.processor import OutputProcessor
from server.types import ChatInput, EngineOutputs, EngineRequest, PromptInput, RequestOutput

logger = logging.getLogger(__name__)

VERSION = "0.1.0"


class AsyncLLM:
    """Everything a front end needs of an engine. Lives in one event loop, between `start` and `close`."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        client: EngineClient,
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
        self._client = client
        self._inputs = inputs
        self._outputs = outputs
        self._max_in_flight = config.max_num_seqs + config.max_num_queued_reqs
        self._max_num_seqs = config.max_num_seqs
        self._preparing = 0
        self._info: EngineInfo | None = None
        self._death: str | None = None
        self._draining = False
        self._closed = False
        self._recent_seconds = 1.0  # smoothed time a request takes, for Retry-After

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it is ready. Raises ConfigError or CheckpointError when it cannot start."""
        loop = asyncio.get_running_loop()

        def on_outputs(outputs: EngineOutputs) -> None:
            loop.call_soon_threadsafe(self._on_outputs, outputs)

        def on_death(reason: str) -> None:
            loop.call_soon_threadsafe(self._on_death, reason)

        await self._inputs.start()
        info = self._info = await asyncio.to_thread(self._client.start, on_outputs, on_death)
        self.metrics.record_engine(
            max_model_len=info.max_model_len,
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            num_tile_slots=info.num_tile_slots,
        )
        return info

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
        await self._inputs.close()
        await asyncio.to_thread(self._client.close)

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise UnavailableError("the model is still loading", code="model_loading", retry_after=5.0)
        return self._info

    @property
    def max_model_len(self) -> int:
        return self.info.max_model_len

    @property
    def is_alive(self) -> bool:
        return self._death is None

    @property
    def is_ready(self) -> bool:
        return self._info is not None and self.is_alive and not self._draining

    @property
    def num_in_flight(self) -> int:
        return self._preparing + len(self._outputs)

    def check_capacity(self) -> None:
        """As `check_room`, for a request that is here; a refusal is counted."""
        try:
            self.check_room()
        except (CapacityError, UnavailableError) as error:
            self.metrics.record_rejection(error.code)
            raise

    def check_room(self) -> None:
        """Raise CapacityError or UnavailableError when a request cannot be taken now."""
        self._check_open()
        if self._draining:
            raise UnavailableError("the server is shutting down", retry_after=1.0)
        _ = self.info  # refuses while loading
        if self.num_in_flight >= self._max_in_flight:
            waves = self.num_in_flight / self._max_num_seqs
            raise CapacityError(
                f"the queue is full: {self.num_in_flight} requests are running or waiting, the limit is "
                f"{self._max_in_flight}",
                retry_after=min(max(waves * self._recent_seconds / 2, 1.0), 60.0),
            )

    def _check_answers(self, count: int) -> None:
        """Raise CapacityError where a response of many answers would crowd out those that are here."""
        here = len(self._outputs)
        if count > 1 and here and here + count > self._max_in_flight:
            self.metrics.record_rejection(CapacityError.default_code)
            raise CapacityError(
                f"the queue is full: {here} answers are running or waiting, {count} more are asked for, the limit is "
                f"{self._max_in_flight}",
                retry_after=self._recent_seconds,
            )

    def _check_open(self) -> None:
        if self._death is not None:
            raise EngineDeadError("the engine is not running", retry_after=5.0)
        if self._closed:
            raise UnavailableError("the server is shutting down", retry_after=1.0)

    # -- one request ---------------------------------------------------------------------------------------------

    async def prepare(self, item: ChatInput | PromptInput) -> EngineRequest:
        """Template, limits, tokens, grammar and pictures; nothing has reached the engine yet.

        Raises ClientError, or CapacityError when others were faster: a body takes its time after the first check.
        """
        self.check_capacity()
        self._preparing += 1
        try:
            return await self._inputs.process(item, max_model_len=self.info.max_model_len)
        finally:
            self._preparing -= 1

    async def generate(self, *requests: EngineRequest) -> AsyncIterator[RequestOutput]:
        """Outputs of all answers to these requests, as they come, until each has had its finish_reason.

        Raises ServerError when the engine fails one of them.
        """
        self._check_open()  # much may have happened while the requests were prepared
        self._check_answers(sum(len(request.choice_ids) for request in requests))
        wake = asyncio.Event()
        response = self._outputs.open(requests, wake.set)
        try:
            for request in requests:
                self._client.submit(request)
            while True:
                output = response.take()
                if output is None:
                    await wake.wait()
                    wake.clear()
                    continue
                is_last = response.is_finished
                if is_last:  # now, for after the last output nobody asks again
                    arrival = min(request.arrival_time for request in requests)
                    self._recent_seconds += 0.1 * (time.monotonic() - arrival - self._recent_seconds)
                yield output
                if is_last:
                    return
        finally:
            unfinished = self._outputs.close(response)
            if unfinished:
                self._abort(unfinished)

    def _abort(self, request_ids: list[str]) -> None:
        with contextlib.suppress(EngineDeadError):  # then nothing is left to abort in
            self._client.submit(AbortRequests(request_ids))

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

    def _on_outputs(self, outputs: EngineOutputs) -> None:
        ended_here = self._outputs.process(outputs)
        if ended_here:
            self._abort(ended_here)

    def _on_death(self, reason: str) -> None:
        logger.error("engine death: %s", reason)
        self._death = reason
        self._outputs.fail_all(EngineDeadError("the engine stopped while computing this request", retry_after=5.0))
