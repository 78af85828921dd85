"""All answers of one response, as one stream: several choices, several prompts, or just one of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from server.errors import EngineDeadError, RequestFailedError, ServerError
from server.observability.metrics import ServerMetrics
from server.outputs.detokenizer import TokenTable
from server.outputs.stream import RequestStream
from server.types import EngineRequest, RequestOutput, Usage

# A request that was being computed when so many engines ended is not given to another.
MAX_ENDED_ENGINES = 2


class ResponseStream:
    """The streams of one response and whose turn it is. Choices of the first request have the first indices.

    Where all of a request's answers are equal by nature (greedy), one is computed and told `n` times.
    """

    def __init__(
        self,
        requests: Sequence[EngineRequest],
        table: TokenTable,
        metrics: ServerMetrics,
        notify: Callable[[], None],
    ) -> None:
        self.requests = tuple(requests)
        self.streams: dict[str, RequestStream] = {}
        self._num_ended_engines = 0
        self._notify = notify
        self._indices: dict[RequestStream, range] = {}
        self._leaders: set[RequestStream] = set()
        self._ready: dict[RequestStream, None] = {}  # in order, each once however slow the reader is
        self._copies: deque[RequestOutput] = deque()
        index = 0
        for request in requests:
            ids = request.choice_ids
            copies = request.n // len(ids)
            leader = None
            for answer_id in ids:
                stream = RequestStream(request, table, metrics, leader=leader)
                stream.notify = self._waker(stream)
                self.streams[answer_id] = stream
                self._indices[stream] = range(index, index + copies)
                index += copies
                leader = leader or stream
                if leader is stream:
                    self._leaders.add(stream)
        self._is_single = index == 1
        # Sums over what was taken, kept as it grows: there may be hundreds of answers, each with an output a step.
        self._usage = Usage(
            prompt_tokens=sum(len(request.prompt_token_ids) for request in requests),
            completion_tokens=0,
            cached_tokens=0,
            image_tokens=sum(request.num_image_tokens for request in requests),
        )

    def _waker(self, stream: RequestStream) -> Callable[[], None]:
        def wake() -> None:
            self._ready[stream] = None
            self._notify()

        return wake

    def take(self) -> RequestOutput | None:
        """The next output of whichever answer has one, or None. Raises the error that ended an answer."""
        if self._copies:
            return self._copies.popleft()
        while self._ready:
            stream = next(iter(self._ready))
            del self._ready[stream]
            output = stream.take()
            if output is None:
                continue  # half a character, or what may become a stop string
            if stream.has_more:
                self._ready[stream] = None
            if self._is_single:
                return output
            self._count(stream, output)
            for index in self._indices[stream]:
                self._copies.append(msgspec.structs.replace(output, index=index, usage=self._usage))
            return self._copies.popleft()
        return None

    def _count(self, stream: RequestStream, output: RequestOutput) -> None:
        """Each prompt counts once, each answer for itself."""
        is_new_prompt = output.prompt_token_ids is not None and stream in self._leaders
        self._usage = msgspec.structs.replace(
            self._usage,
            completion_tokens=self._usage.completion_tokens + len(output.token_ids) * len(self._indices[stream]),
            cached_tokens=self._usage.cached_tokens + (stream.num_cached if is_new_prompt else 0),
        )

    def longest_answers(self) -> list[tuple[EngineRequest, int]]:
        """Each request with the tokens of its longest answer."""
        longest: dict[str, tuple[EngineRequest, int]] = {}
        for stream in self.streams.values():
            _, before = longest.get(stream.request.request_id, (stream.request, 0))
            longest[stream.request.request_id] = (stream.request, max(before, stream.num_generated))
        return list(longest.values())

    def fail(self, error: ServerError) -> None:
        """End all answers that have not ended."""
        for stream in self.streams.values():
            stream.fail(error)

    def lose_engine(self, *, retry_after: float) -> None:
        """The engine that had this is gone. If it had told part of it, this ends; else another engine may have it.

        What was being computed each time may be the reason. It is told a 500, as proxies hand a 503 to other servers.
        """
        if self.has_output:
            self.fail(EngineDeadError("the engine stopped while computing this request", retry_after=retry_after))
            return
        self._num_ended_engines += any(stream.is_started for stream in self.streams.values())
        if self._num_ended_engines == MAX_ENDED_ENGINES:
            self.fail(RequestFailedError("the engine stopped more than once while computing this request"))
        for stream in self.streams.values():
            stream.is_started = False

    @property
    def has_output(self) -> bool:
        """Whether the engine has told anything of it."""
        return any(stream.has_output for stream in self.streams.values())

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come of it, though not all may have been taken."""
        return all(stream.finish_reason for stream in self.streams.values())

    @property
    def num_computed_tokens(self) -> int:
        """Prompt tokens that were computed for this response and not found, and all tokens of its answers."""
        answers = sum(stream.num_generated for stream in self.streams.values())
        prompts = sum(
            len(stream.request.prompt_token_ids) - stream.num_cached for stream in self._leaders if stream.num_generated
        )
        return answers + prompts

    @property
    def is_finished(self) -> bool:
        """Whether all has been taken."""
        return not self._copies and not self._ready and self.has_ended
