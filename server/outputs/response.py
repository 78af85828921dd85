"""All answers of one response, as one stream: several choices, several prompts, or just one of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from server.observability.metrics import ServerMetrics
from server.outputs.detokenizer import TokenTable
from server.outputs.stream import RequestStream
from server.types import EngineRequest, RequestOutput, Usage


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
        self.streams: dict[str, RequestStream] = {}
        self._notify = notify
        self._indices: dict[RequestStream, range] = {}
        self._leaders: list[RequestStream] = []
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
                    self._leaders.append(stream)
        self._is_single = index == 1

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
            if stream.has_error:
                self._ready[stream] = None  # it waits behind the text
            if self._is_single:
                return output
            usage = self.usage
            for index in self._indices[stream]:
                self._copies.append(msgspec.structs.replace(output, index=index, usage=usage))
            return self._copies.popleft()
        return None

    @property
    def usage(self) -> Usage:
        """Each prompt counts once, each answer for itself."""
        return Usage(
            prompt_tokens=sum(len(stream.request.prompt_token_ids) for stream in self._leaders),
            completion_tokens=sum(stream.num_generated * len(indices) for stream, indices in self._indices.items()),
            cached_tokens=sum(stream.num_cached for stream in self._leaders),
            image_tokens=sum(stream.request.num_image_tokens for stream in self._leaders),
        )

    def longest_answers(self) -> list[tuple[EngineRequest, int]]:
        """Each request with the tokens of its longest answer."""
        longest: dict[str, tuple[EngineRequest, int]] = {}
        for stream in self.streams.values():
            _, before = longest.get(stream.request.request_id, (stream.request, 0))
            longest[stream.request.request_id] = (stream.request, max(before, stream.num_generated))
        return list(longest.values())

    @property
    def is_finished(self) -> bool:
        """Whether all has been taken."""
        return not self._copies and not self._ready and all(stream.finish_reason for stream in self.streams.values())
