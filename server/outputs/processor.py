"""From the engine's outputs to the open streams, once a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from server.errors import ServerError
from server.observability.metrics import ServerMetrics
from server.outputs.detokenizer import TokenTable
from server.outputs.response import ResponseStream
from server.outputs.stream import RequestStream
from server.types import EngineOutputs, EngineRequest, StepStats


class OutputProcessor:
    """The open streams, by the engine's ids of their answers."""

    def __init__(self, table: TokenTable, metrics: ServerMetrics) -> None:
        self._table = table
        self._metrics = metrics
        self._streams: dict[str, RequestStream] = {}
        self._responses: dict[ResponseStream, None] = {}  # in the order in which they were opened

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, requests: Sequence[EngineRequest], notify: Callable[[], None]) -> ResponseStream:
        """A stream for each answer to these requests; `notify` is called whenever there is something to take."""
        response = ResponseStream(requests, self._table, self._metrics, notify)
        self._streams |= response.streams
        self._responses[response] = None
        return response

    def close(self, response: ResponseStream) -> list[str]:
        """Forget a response, wherever it stands. Returns the ids that the engine has not let go of."""
        del self._responses[response]
        unfinished = []
        for answer_id, stream in response.streams.items():
            stream.abandon()
            del self._streams[answer_id]
            if not stream.engine_finished:
                unfinished.append(answer_id)
        for request, longest in response.longest_answers():
            self._metrics.record_request(n=request.n, max_tokens=request.max_tokens, longest_answer=longest)
        return unfinished

    def process(self, outputs: EngineOutputs, *, stats: StepStats | None = None) -> list[str]:
        """Hand a step's outputs to their streams. Returns the ids that ended here and not in the engine.

        `stats` are told in place of theirs where there are several engines.
        """
        stats = outputs.stats if stats is None else stats
        self._metrics.record_step(stats, num_deferred=stats.num_held)
        now = time.monotonic()
        for answer_id in outputs.started:
            if answer_id in self._streams:
                self._streams[answer_id].is_started = True
        ended_here = []
        for output in outputs.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            was_open = stream.finish_reason is None
            stream.push(output, now)
            if was_open and stream.finish_reason is not None and not stream.engine_finished:
                ended_here.append(output.request_id)
        return ended_here

    @property
    def open_responses(self) -> list[ResponseStream]:
        """In the order of their arrival."""
        return list(self._responses)

    @property
    def untold(self) -> list[ResponseStream]:
        """Responses of which an engine has yet to tell anything, in the order of their arrival."""
        return [response for response in self.open_responses if not (response.has_output or response.has_ended)]

    def fail_all(self, error: ServerError) -> None:
        for stream in list(self._streams.values()):
            stream.fail(error)
