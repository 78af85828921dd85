"""From the engine's outputs to text for each open request. No queues: deltas merge while a reader is slow."""

from __future__ import annotations

import time
from collections.abc import Callable

from server.errors import RequestFailedError, ServerError
from server.observability.metrics import ServerMetrics
from server.outputs.detokenizer import Detokenizer, TokenTable
from server.outputs.stop import StopMatch, StopMatcher
from server.types import EngineOutput, EngineOutputs, EngineRequest, FinishReason, RequestOutput, Usage


class RequestStream:
    """One request's answer so far: what its reader has not yet taken, and how it ended.

    `notify` is called whenever there is something to take.
    """

    def __init__(
        self, request: EngineRequest, table: TokenTable, metrics: ServerMetrics, notify: Callable[[], None]
    ) -> None:
        self.request = request
        self._metrics = metrics
        self._notify = notify
        sampling = request.sampling
        self._detokenizer = Detokenizer(table, skip_special_tokens=sampling.skip_special_tokens)
        self._stop = StopMatcher(sampling.stop, include_in_output=sampling.include_stop_str_in_output)
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._num_generated = 0
        self._num_cached = 0
        self._first_token_time: float | None = None
        self._last_token_time = 0.0
        self._queue_seconds: float | None = None
        self._stop_reason: str | int | None = None
        self._error: ServerError | None = None
        self.finish_reason: FinishReason | None = None
        self.engine_finished = False  # whether the engine has let go of it too

    def push(self, output: EngineOutput, now: float) -> None:
        """Take one step's output at time.monotonic() `now`."""
        self.engine_finished = output.finish_reason is not None
        if self.finish_reason is not None:
            return  # a stop string ended it here; the engine has not heard yet
        if output.error is not None:
            self.fail(RequestFailedError(output.error))
            return
        self._num_cached = output.num_cached_tokens
        if output.queue_seconds is not None:
            self._queue_seconds = output.queue_seconds
        if output.new_token_ids:
            self._take_tokens(output, now)
        if self.finish_reason is None and output.finish_reason is not None:
            self._text.append(self._rest())
            self._finish(output.finish_reason, now)
            if output.stop_token_id is not None and output.stop_token_id not in self.request.eos_token_ids:
                self._stop_reason = output.stop_token_id
        self._notify()

    def _take_tokens(self, output: EngineOutput, now: float) -> None:
        self._record_time(now)
        self._token_ids += output.new_token_ids
        self._num_generated += len(output.new_token_ids)
        sampling = self.request.sampling
        shown = output.new_token_ids
        if output.stop_token_id is not None and not sampling.include_stop_str_in_output:
            shown = shown[:-1]
        text = self._detokenizer.push(shown)
        if self._num_generated <= sampling.min_tokens:
            self._text.append(text)
            return
        found = self._stop.push(text)
        if isinstance(found, StopMatch):
            self._text.append(found.text)
            self._stop_reason = found.stop
            self._finish(FinishReason.STOP, now)
        else:
            self._text.append(found)

    def _rest(self) -> str:
        """Text that was waiting for more: half a character, or what looked like a stop string."""
        found = self._stop.push(self._detokenizer.flush())
        return found.text if isinstance(found, StopMatch) else found + self._stop.flush()

    def _record_time(self, now: float) -> None:
        if self._first_token_time is None:
            self._first_token_time = now
            self._metrics.record_first_token(now - self.request.arrival_time)
        else:
            self._metrics.record_gap(now - self._last_token_time)
        self._last_token_time = now

    def _finish(self, reason: FinishReason, now: float) -> None:
        self.finish_reason = reason
        decode_seconds = now - self._first_token_time if self._first_token_time is not None else None
        self._metrics.record_finished(
            reason.value,
            e2e_seconds=now - self.request.arrival_time,
            queue_seconds=self._queue_seconds,
            decode_seconds=decode_seconds,
            prompt_tokens=len(self.request.prompt_token_ids),
            generation_tokens=self._num_generated,
        )

    def fail(self, error: ServerError) -> None:
        """End with an error, which the reader gets once it has taken all text before it."""
        if self.finish_reason is None:
            self._error = error
            self._finish(FinishReason.ERROR, time.monotonic())
            self._notify()

    def abandon(self) -> None:
        """The reader left before the end."""
        if self.finish_reason is None:
            self._finish(FinishReason.ABORT, time.monotonic())

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.prompt_token_ids),
            completion_tokens=self._num_generated,
            cached_tokens=self._num_cached,
            image_tokens=self.request.num_image_tokens,
        )

    def take(self) -> RequestOutput | None:
        """Everything since the last call, or None. Raises the error that ended the request."""
        text = "".join(self._text)
        self._text.clear()
        if not text and self._error is not None:
            raise self._error
        ended = self.finish_reason if self._error is None else None
        if not text and ended is None:
            return None
        token_ids, self._token_ids = self._token_ids, []
        return RequestOutput(
            request_id=self.request.request_id,
            text=text,
            token_ids=token_ids,
            usage=self.usage,
            finish_reason=ended,
            stop_reason=self._stop_reason if ended is not None else None,
        )


class OutputProcessor:
    """The open streams, by the engine's request ids."""

    def __init__(self, table: TokenTable, metrics: ServerMetrics) -> None:
        self._table = table
        self._metrics = metrics
        self._streams: dict[str, RequestStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, request: EngineRequest, notify: Callable[[], None]) -> RequestStream:
        stream = RequestStream(request, self._table, self._metrics, notify)
        self._streams[request.request_id] = stream
        return stream

    def close(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def process(self, outputs: EngineOutputs) -> list[str]:
        """Hand a step's outputs to their streams. Returns the ids that ended here and not in the engine."""
        self._metrics.record_step(outputs.stats)
        now = time.monotonic()
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

    def fail_all(self, error: ServerError) -> None:
        for stream in list(self._streams.values()):
            stream.fail(error)
