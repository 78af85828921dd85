"""A stand-in for AsyncLLM that plays a script, and a real uvicorn on a loopback socket to play it through."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from server.api.app import build_app
from server.api.streaming import EventEncoder, OpenStream, stream_events
from server.config import ServerConfig
from server.errors import CapacityError, ClientError, ServerError
from server.keys import load_keys
from server.observability.metrics import ServerMetrics
from server.types import (
    ChatInput,
    EngineRequest,
    FinishReason,
    Logprob,
    PromptInput,
    RequestOrigin,
    RequestOutput,
    Usage,
)
from tests.listening import listening

PROMPT_TOKENS = 85
IMAGE_TOKENS = 64
UNCOMPILABLE = "unheard-of"


class Hang:
    """A step of a script at which nothing happens any more."""


def say(
    text: str,
    finish: FinishReason | None = None,
    *,
    stop_reason: str | int | None = None,
    index: int = 0,
    token_ids: Sequence[int] = (7,),
    logprobs: Sequence[Logprob] = (),
) -> RequestOutput:
    """One output of choice `index`; the count of tokens is filled in when it is played."""
    usage = Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=0, cached_tokens=16, image_tokens=IMAGE_TOKENS)
    return RequestOutput(
        request_id="",
        index=index,
        text=text,
        token_ids=list(token_ids),
        usage=usage,
        finish_reason=finish,
        stop_reason=stop_reason,
        logprobs=list(logprobs),
    )


TWO_CATS = (say("Two"), say(" cats."), say("", FinishReason.STOP))


@dataclass
class ScriptedLLM:
    """Plays `script` for every request: outputs, seconds to wait, exceptions to raise, or Hang.

    Grammars that speak of UNCOMPILABLE are refused, as an engine does that cannot compile them.
    """

    script: Sequence[RequestOutput | float | Exception | Hang] = TWO_CATS
    prepare_script: Sequence[float | Exception | Hang] = ()
    capacity_error: ServerError | None = None
    is_ready: bool = True
    is_alive: bool = True
    has_started: bool = True
    model_names: tuple[str, ...] = ("idefics2-8b", "HuggingFaceM4/idefics2-8b")
    model_root: str = "HuggingFaceM4/idefics2-8b"
    max_model_len: int = 4096
    vocab_size: int = 32003
    system_fingerprint: str = "fp_test"
    num_in_flight: int = 0
    metrics: ServerMetrics = field(default_factory=lambda: ServerMetrics("idefics2-8b"))

    # What happened, for tests in another thread.
    chats: list[ChatInput] = field(default_factory=list)
    prompts: list[PromptInput] = field(default_factory=list)
    generators: list[AsyncIterator[RequestOutput]] = field(default_factory=list)
    preparing: threading.Event = field(default_factory=threading.Event)
    prepare_ended: threading.Event = field(default_factory=threading.Event)
    hanging: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)

    def reset(self) -> None:
        """Forget everything but the metrics, which the running server holds."""
        fresh = vars(type(self)(metrics=self.metrics))
        vars(self).clear()
        vars(self).update(fresh)

    def http_count(self, **labels: str) -> float:
        """How many answers with exactly these labels have been counted."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.metrics.render()[0].decode())
            for sample in family.samples
            if sample.name == "idefics2:http_requests_total" and sample.labels == labels
        )

    def check_capacity(self, origin: RequestOrigin) -> None:
        self.check_ready()

    def check_ready(self) -> None:
        if self.capacity_error is not None:
            raise self.capacity_error

    async def prepare(self, item: ChatInput | PromptInput) -> EngineRequest:
        if isinstance(item, ChatInput):
            self.chats.append(item)
        else:
            self.prompts.append(item)
        await self._play_preparation()
        grammar = item.sampling.grammar
        if grammar is not None and UNCOMPILABLE in grammar.source:
            raise ClientError(f"'{grammar.param}' does not compile", param=grammar.param)
        return EngineRequest(
            request_id=item.request_id,
            prompt_token_ids=[1] * PROMPT_TOKENS,
            sampling=item.sampling,
            eos_token_ids=(2,),
            n=item.n,
        )

    async def _play_preparation(self) -> None:
        self.preparing.set()
        try:
            for step in self.prepare_script:
                await self._wait(step)
        finally:
            self.prepare_ended.set()

    def generate(self, *requests: EngineRequest) -> AsyncIterator[RequestOutput]:
        # Held on to, so that whoever leaves it to the garbage collector to close it is found out.
        self.generators.append(self._generate(requests))
        return self.generators[-1]

    async def _generate(self, requests: Sequence[EngineRequest]) -> AsyncIterator[RequestOutput]:
        num_tokens = 0
        begun: set[int] = set()
        try:
            for step in self.script:
                if not isinstance(step, RequestOutput):
                    await self._wait(step)
                    continue
                num_tokens += len(step.token_ids)
                request = requests[step.index // requests[0].n]
                ids = None if step.index in begun else request.prompt_token_ids
                begun.add(step.index)
                yield played(step, request.request_id, num_tokens, prompt_token_ids=ids)
        finally:
            self.closed.set()

    async def _wait(self, step: float | Exception | Hang) -> None:
        if isinstance(step, Exception):
            raise step
        if isinstance(step, Hang):
            self.hanging.set()
            await asyncio.Event().wait()
        else:
            await asyncio.sleep(step)


def played(
    output: RequestOutput, request_id: str, num_tokens: int, *, prompt_token_ids: list[int] | None = None
) -> RequestOutput:
    usage = msgspec.structs.replace(output.usage, completion_tokens=num_tokens)
    return msgspec.structs.replace(output, request_id=request_id, usage=usage, prompt_token_ids=prompt_token_ids)


def written(script: Sequence[RequestOutput | Exception], encoder: EventEncoder) -> list[bytes]:
    """The events of a stream, without a server: one item for each write."""

    async def outputs() -> AsyncIterator[RequestOutput]:
        for index, step in enumerate(script, start=1):
            if isinstance(step, Exception):
                raise step
            yield played(step, "r", index)

    async def collect() -> list[bytes]:
        return [event async for event in stream_events(OpenStream(outputs()), encoder)]

    return asyncio.run(collect())


def serving(llm: ScriptedLLM, **settings: Any) -> AbstractContextManager[str]:
    """The address of a server that runs in a thread until the block ends."""
    config = ServerConfig(**settings)
    app = build_app(llm, config, load_keys(config))  # type: ignore[arg-type]
    return listening(app, log_config=None, access_log=False)


QUEUE_FULL = CapacityError("the queue is full", retry_after=2.3)
