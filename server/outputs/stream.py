"""One answer as it grows: ids to text, stop strings, times; merges what a slow reader has not taken."""

from __future__ import annotations

import time
from collections.abc import Callable

from server.errors import RequestFailedError, ServerError, UnavailableError
from server.observability.metrics import ServerMetrics
from server.outputs.detokenizer import Detokenizer, TokenTable
from server.outputs.logprobs import LogprobWriter, PendingLogprobs
from server.outputs.stop import StopMatch, StopMatcher
from server.types import EngineOutput, EngineRequest, FinishReason, Logprob, RequestOutput, TokenLogprobs, Usage

# What one output may hold where each token has its alternatives, which are 2 KiB of JSON: else all that a slow reader
# has not taken would be written at once.
MAX_LOGPROB_TOKENS = 32
RETRY_SECONDS = 5.0  # after a lack of memory, which lasts about as long as what takes it


def _ignore() -> None:
    """Nobody waits."""


class RequestStream:
    """One answer so far: what its reader has not yet taken, and how it ended.

    `notify` is called whenever there is something to take. The first answer of a request is the `leader` of the others:
    what the engine tells of their prompt comes through it.
    """

    def __init__(
        self,
        request: EngineRequest,
        table: TokenTable,
        metrics: ServerMetrics,
        notify: Callable[[], None] = _ignore,
        *,
        leader: RequestStream | None = None,
    ) -> None:
        self.request = request
        self._table = table
        self._metrics = metrics
        self.notify = notify
        sampling = request.sampling
        at_start = not request.continues_text
        self._detokenizer = Detokenizer(table, skip_special_tokens=sampling.skip_special_tokens, at_start=at_start)
        self._logprob_writer = LogprobWriter(table, skip_special_tokens=sampling.skip_special_tokens, at_start=at_start)
        self._logprobs = PendingLogprobs()
        self._prompt_logprobs: list[TokenLogprobs] = [] if leader is None else leader._prompt_logprobs
        self._has_begun = False
        self.is_started = False  # work on it has begun in the engine, and nothing has come of it yet
        self.has_output = False
        self._stop = StopMatcher(sampling.stop, include_in_output=sampling.include_stop_str_in_output)
        self._text: list[str] = []
        self._lengths: list[int] = []  # of each text: the tokens that it came with
        self._token_ids: list[int] = []
        self.num_generated = 0
        self.num_cached = 0
        self._num_preemptions = 0
        self._first_token_time: float | None = None
        self._last_token_time = 0.0
        self._queue_seconds: float | None = None
        self._stop_reason: str | int | None = None
        self._error: ServerError | None = None
        self.finish_reason: FinishReason | None = None
        self.engine_finished = False  # whether the engine has let go of it too

    def push(self, output: EngineOutput, now: float) -> None:
        """Take one step's output at time.monotonic() `now`."""
        self.has_output = True
        self.engine_finished = output.finish_reason is not None
        if self.finish_reason is not None:
            return  # a stop string ended it here; the engine has not heard yet
        if output.error is not None:
            self.fail(_failure(output.error, output.error_code))
            return
        self.num_cached = output.num_cached_tokens
        self._num_preemptions = output.num_preemptions
        if output.queue_seconds is not None:
            self._queue_seconds = output.queue_seconds
        self._prompt_logprobs += output.prompt_logprobs
        if output.new_token_ids:
            self._take_tokens(output, now)
        if self.finish_reason is None and output.finish_reason is not None:
            self._text.append(self._rest())
            self._lengths.append(0)
            self._finish(output.finish_reason, now)
            # Under `ignore_eos` the end is a token like others, and ends an answer only where a client named it.
            is_eos = output.stop_token_id in self.request.eos_token_ids and not self.request.sampling.ignore_eos
            if output.stop_token_id is not None and not is_eos:
                self._stop_reason = output.stop_token_id
        self.notify()

    def _take_tokens(self, output: EngineOutput, now: float) -> None:
        self._record_time(now)
        self._token_ids += output.new_token_ids
        self.num_generated += len(output.new_token_ids)
        if output.logprobs:
            self._logprobs.add(output.logprobs)
        sampling = self.request.sampling
        shown = output.new_token_ids
        if output.stop_token_id is not None and not sampling.include_stop_str_in_output:
            shown = shown[:-1]
        self._lengths.append(len(output.new_token_ids))
        text = self._detokenizer.push(shown)
        if self.num_generated <= sampling.min_tokens:
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
        first = self._first_token_time
        self._metrics.record_finished(
            reason.value,
            e2e_seconds=now - self.request.arrival_time,
            queue_seconds=self._queue_seconds,
            first_token_seconds=None if first is None else first - self.request.arrival_time,
            decode_seconds=None if first is None else self._last_token_time - first,
            prompt_tokens=len(self.request.prompt_token_ids),
            generation_tokens=self.num_generated,
            cached_tokens=self.num_cached,
            num_preemptions=self._num_preemptions,
        )

    def fail(self, error: ServerError) -> None:
        """End with an error, which the reader gets once it has taken all text before it."""
        if self.finish_reason is None:
            self._error = error
            self._finish(FinishReason.ERROR, time.monotonic())
            self.notify()

    def abandon(self) -> None:
        """The reader left before the end."""
        if self.finish_reason is None:
            self._finish(FinishReason.ABORT, time.monotonic())

    @property
    def usage(self) -> Usage:
        """Of this answer and its prompt."""
        return Usage(
            prompt_tokens=len(self.request.prompt_token_ids),
            completion_tokens=self.num_generated,
            cached_tokens=self.num_cached,
            image_tokens=self.request.num_image_tokens,
        )

    def take(self) -> RequestOutput | None:
        """Everything since the last call, or None; with many log-probabilities the first part of it.

        Raises the error that ended the answer.
        """
        num_parts = self._num_parts()
        text = "".join(self._text[:num_parts])
        is_all = num_parts == len(self._text)
        if not text and self._error is not None:
            raise self._error
        ended = self.finish_reason if self._error is None and is_all else None
        if not text and ended is None:
            return None
        num_tokens = sum(self._lengths[:num_parts])
        token_ids, self._token_ids = self._token_ids[:num_tokens], self._token_ids[num_tokens:]
        del self._text[:num_parts], self._lengths[:num_parts]
        prompt_token_ids = prompt_logprobs = None
        if not self._has_begun:
            self._has_begun = True
            prompt_token_ids, prompt_logprobs = self.request.prompt_token_ids, self._written_prompt_logprobs()
        return RequestOutput(
            request_id=self.request.request_id,
            text=text,
            token_ids=token_ids,
            usage=self.usage,
            finish_reason=ended,
            stop_reason=self._stop_reason if ended is not None else None,
            logprobs=self._logprob_writer.write(self._logprobs.take(num_tokens)),
            prompt_token_ids=prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
        )

    def _num_parts(self) -> int:
        """How many texts are taken at once: all, or enough for so many tokens and for any text at all."""
        if self.request.sampling.num_logprobs is None or sum(self._lengths) <= MAX_LOGPROB_TOKENS:
            return len(self._text)
        num_tokens, has_text = 0, False
        for index, (text, length) in enumerate(zip(self._text, self._lengths, strict=True)):
            num_tokens += length
            has_text |= text != ""
            if has_text and num_tokens >= MAX_LOGPROB_TOKENS:
                return index + 1
        return len(self._text)

    def _written_prompt_logprobs(self) -> list[Logprob] | None:
        if self.request.sampling.num_prompt_logprobs is None:
            return None
        # The prompt's first token has no probability of its own, but may be the one whose space is dropped.
        first = TokenLogprobs(self.request.prompt_token_ids[0], 0.0)
        writer = LogprobWriter(self._table, skip_special_tokens=True, at_start=True)
        return writer.write([first, *self._prompt_logprobs])[1:]

    @property
    def has_more(self) -> bool:
        """Whether a rest or an error waits behind the text that was taken."""
        return self._error is not None or bool(self._text)


def _failure(message: str, code: str | None) -> ServerError:
    """What the engine says of a request's end, as the error that its client gets."""
    if code is None:
        return RequestFailedError(message)
    return UnavailableError(message, code=code, retry_after=RETRY_SECONDS)
