"""The chunks of a plain chat answer: text, and token counts where they are asked for.

What is constant in a chunk is encoded once a stream, and a token costs one JSON string and one concatenation. Answers
with more than text are `details.py`'s.
"""

from __future__ import annotations

from typing import Any

import msgspec

from server.api.protocol import StreamOptions
from server.api.streaming import DONE, END, EVENT, encode, encode_error, encode_usage
from server.errors import ServerError
from server.types import RequestOutput, Usage


class ChunkEncoder:
    """Writes the chunks of a chat answer of text. `head` holds what all share: id, object, created, model."""

    def __init__(self, head: dict[str, Any], options: StreamOptions, *, num_choices: int = 1) -> None:
        self.num_choices = num_choices
        self._usage_at_end = options.include_usage
        self._usage_always = options.include_usage and options.continuous_usage_stats
        self._usage_null = b',"usage":null' if options.include_usage else b""
        # Open at the end: the choices follow.
        self._head = EVENT + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._content_starts = [self._head + b'{"index":%d,"delta":{"content":' % index for index in range(num_choices)]
        self._content_end = b'},"logprobs":null,"finish_reason":null}]' + self._usage_null + b"}" + END

    def opening(self, first: RequestOutput) -> bytes:
        """One chunk for each choice, in order: clients count them."""
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        before_first_token = msgspec.structs.replace(first.usage, completion_tokens=0)
        rest = delta + self._usage(before_first_token) + b"}" + END
        return b"".join(self._head + b'{"index":%d,' % index + rest for index in range(self.num_choices))

    def content(self, output: RequestOutput) -> bytes:
        """No bytes for an output without text: an empty delta is a token to a benchmark."""
        if not output.text:
            return b""
        if self._usage_always:
            delta = encode(output.text) + b'},"logprobs":null,"finish_reason":null}]'
            return self._content_starts[output.index] + delta + self._usage(output.usage) + b"}" + END
        return self._content_starts[output.index] + encode(output.text) + self._content_end

    def finish(self, output: RequestOutput, reason: str) -> bytes:
        """`stop_reason` is told only where there is one, so that an ordinary stream is OpenAI's to the byte."""
        delta = b'{"content":' + encode(output.text) + b"}" if output.text else b"{}"
        stop = b"" if output.stop_reason is None else b',"stop_reason":' + encode(output.stop_reason)
        choice = b'{"index":%d,"delta":%b,"logprobs":null,"finish_reason":"%b"%b}]' % (
            *(output.index, delta, reason.encode(), stop),
        )
        return self._head + choice + self._usage(output.usage) + b"}" + END

    def end(self, usage: Usage) -> bytes:
        if not self._usage_at_end:
            return DONE
        return self._head + b'],"usage":' + encode_usage(usage) + b"}" + END + DONE

    def failure(self, error: ServerError) -> bytes:
        return encode_error(error)

    def _usage(self, usage: Usage) -> bytes:
        return b',"usage":' + encode_usage(usage) if self._usage_always else self._usage_null
