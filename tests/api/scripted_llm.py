"""A stand-in for AsyncLLM that plays a script, and a real uvicorn on a loopback socket to play it through."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import uvicorn

from server.api.app import build_app
from server.config import ServerConfig
from server.errors import CapacityError, ServerError
from server.observability.metrics import ServerMetrics
from server.types import ChatInput, EngineRequest, FinishReason, Logprob, PromptInput, RequestOutput, Usage

PROMPT_TOKENS = 85
IMAGE_TOKENS = 64


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
    """Plays `script` for every request: outputs, seconds to wait, exceptions to raise, or Hang."""

    script: Sequence[RequestOutput | float | Exception | Hang] = TWO_CATS
    prepare_script: Sequence[float | Exception | Hang] = ()
    capacity_error: ServerError | None = None
    is_ready: bool = True
    is_alive: bool = True
    model_names: tuple[str, ...] = ("idefics2-8b", "HuggingFaceM4/idefics2-8b")
    model_root: str = "HuggingFaceM4/idefics2-8b"
    max_model_len: int = 4096
    vocab_size: int = 32003
    system_fingerprint: str = "fp_test"
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

    def check_capacity(self) -> None:
        self.check_room()

    def check_room(self) -> None:
        if self.capacity_error is not None:
            raise self.capacity_error

    async def prepare(self, item: ChatInput | PromptInput) -> EngineRequest:
        if isinstance(item, ChatInput):
            self.chats.append(item)
        else:
            self.prompts.append(item)
        self.preparing.set()
        try:
            for step in self.prepare_script:
                await self._wait(step)
        finally:
            self.prepare_ended.set()
        return EngineRequest(
            request_id=item.request_id,
            prompt_token_ids=[1] * PROMPT_TOKENS,
            sampling=item.sampling,
            eos_token_ids=(2,),
            n=item.n,
        )

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


@contextlib.contextmanager
def serving(llm: ScriptedLLM, **settings: Any) -> Iterator[str]:
    """The address of a server that runs in a thread until the block ends."""
    app = build_app(llm, ServerConfig(**settings))  # type: ignore[arg-type]
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server does not stop"


def wait_until(condition: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


QUEUE_FULL = CapacityError("the queue is full", retry_after=2.3)
