"""Pieces of text completions → chunks, as server-sent events. A chunk has the shape of the whole answer."""

from __future__ import annotations

from typing import Any

import msgspec

from server.api.completions.choices import Choices, Piece
from server.api.protocol import StreamOptions
from server.api.streaming import DONE, END, EVENT, encode, encode_error, encode_usage
from server.errors import ServerError
from server.types import RequestOutput, Usage


class CompletionEncoder:
    """Writes the chunks of one answer. `head` holds what all share: id, object, created, model."""

    def __init__(self, head: dict[str, Any], options: StreamOptions, choices: Choices) -> None:
        self.num_choices = choices.count
        self._choices = choices
        self._usage_at_end = options.include_usage
        self._usage_always = options.include_usage and options.continuous_usage_stats
        self._usage_null = b',"usage":null' if options.include_usage else b""
        # Open at the end: the choices follow.
        self._head = EVENT + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._plain_end = b',"logprobs":null,"finish_reason":null}]' + self._usage_null + b"}" + END
        self._starts = [self._head + b'{"index":%d,"text":' % index for index in range(choices.count)]

    def opening(self, first: RequestOutput) -> bytes:
        """Nothing: an echoed prompt comes in its choice's first chunk."""
        return b""

    def content(self, output: RequestOutput) -> bytes:
        """No bytes for an output without text: an empty one is a token to a benchmark."""
        piece = self._choices.write(output)
        if piece.logprobs is None and piece.token_ids is None:
            if not piece.text:
                return b""
            if not self._usage_always:
                return self._starts[piece.index] + encode(piece.text) + self._plain_end
        return self._chunk(piece, output.usage)

    def finish(self, output: RequestOutput, reason: str) -> bytes:
        """A piece knows its own reason: where nothing was to be generated, it is another one."""
        return self._chunk(self._choices.write(output), output.usage)

    def end(self, usage: Usage) -> bytes:
        if not self._usage_at_end:
            return DONE
        return self._head + b'],"usage":' + encode_usage(self._choices.usage(usage)) + b"}" + END + DONE

    def failure(self, error: ServerError) -> bytes:
        return encode_error(error)

    def _chunk(self, piece: Piece, usage: Usage) -> bytes:
        logprobs = b"null" if piece.logprobs is None else encode(piece.logprobs.model_dump())
        choice = encode(piece.text) + b',"logprobs":' + logprobs + b',"finish_reason":' + encode(piece.finish_reason)
        # Told only where there is something to tell, so that an ordinary stream is OpenAI's to the byte.
        for name in ("stop_reason", "prompt_token_ids", "token_ids"):
            value = getattr(piece, name)
            if value is not None:
                choice += b',"%b":' % name.encode() + encode(value)
        told = self._usage_null
        if self._usage_always:
            told = b',"usage":' + encode_usage(self._choices.usage(usage))
        return self._starts[piece.index] + choice + b"}]" + told + b"}" + END
