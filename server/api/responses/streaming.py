"""RequestOutput → the named events of a response, as server-sent events.

A token costs one JSON string and one concatenation; what is constant in its event is encoded once an item. The last
event says by its name how the answer ended, so nothing follows it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from server.api.errors import error_object
from server.api.responses.answer import Answer, end_status
from server.api.responses.items import Closed, EndStatus, Grown, Item, ItemBuilder, MessageItem, Opened, Step
from server.api.streaming import END, encode
from server.api.tool_calls import CallParser
from server.errors import ServerError
from server.types import RequestOutput, Usage

logger = logging.getLogger(__name__)

_NO_LOGPROBS = b',"logprobs":[]}' + END


class ResponseEncoder:
    """Writes the events of one stream and counts them. `parser` reads calls, None where the answer is text."""

    num_choices = 1

    def __init__(self, answer: Answer, parser: CallParser | None) -> None:
        self._answer = answer
        self._items = ItemBuilder(parser)
        self._reads_calls = parser is not None
        self._status: EndStatus = "completed"
        self._next_number = 0
        # Of the deltas of the item that is open: what stands before the number.
        self._delta_start = b""

    def opening(self, first: RequestOutput) -> bytes:
        """The events before any text."""
        response = self._answer.started()
        return (
            self._event("response.created", response=response)
            + self._event("response.in_progress", response=response)
            + self._steps(self._items.open())
        )

    def content(self, output: RequestOutput) -> bytes:
        """No bytes for an output without text: an empty delta is a token to a benchmark."""
        if self._reads_calls or output.logprobs:
            return self._steps(self._items.push(output))
        if not output.text:
            return b""
        self._items.push_text(output.text)
        return self._delta(output.text) + _NO_LOGPROBS

    def finish(self, output: RequestOutput, reason: str) -> bytes:
        """The last output; `reason` is "stop" or "length"."""
        self._status = end_status(reason)
        return self._steps(self._items.push(output)) + self._steps(self._items.end(self._status))

    def end(self, usage: Usage) -> bytes:
        """All of the answer once more. The event's name says whether it is complete, so nothing follows."""
        response = self._answer.ended(self._items.wire(self._status), status=self._status, usage=usage)
        return self._event(f"response.{self._status}", response=response)

    def failure(self, error: ServerError) -> bytes:
        """What ends a stream that cannot go on. OpenAI's client raises the first event, others read the second."""
        details = error_object(error)["error"]
        told = {key: details[key] for key in ("code", "message", "param")}
        raised = self._event("error", **told, error=details)
        return raised + self._event("response.failed", response=self._answer.failed(str(told["message"])))

    def _steps(self, steps: Iterable[Step]) -> bytes:
        return b"".join(map(self._step, steps))

    def _step(self, step: Step) -> bytes:
        match step:
            case Grown(MessageItem(), text, logprobs):
                return self._delta(text) + b',"logprobs":[' + b",".join(logprobs) + b"]}" + END
            case Grown(_, text):
                return self._delta(text) + b"}" + END
            case Opened(item, wire):
                return self._open(item, wire)
            case Closed(item, wire):
                return self._close(item, wire)

    def _delta(self, text: str) -> bytes:
        """Open at the end: log-probabilities follow, except in a call."""
        number = self._next_number
        self._next_number += 1
        return b'%b%d,"delta":%b' % (self._delta_start, number, encode(text))

    def _open(self, item: Item, wire: dict[str, Any]) -> bytes:
        is_message = isinstance(item, MessageItem)
        name = "response.output_text.delta" if is_message else "response.function_call_arguments.delta"
        head = encode({"type": name, **_place(item)})[:-1]
        self._delta_start = b"event: %b\ndata: %b" % (name.encode(), head) + b',"sequence_number":'
        if not is_message:
            return self._event("response.output_item.added", output_index=item.index, item=wire)
        (part,) = wire["content"]
        added = self._event("response.output_item.added", output_index=item.index, item={**wire, "content": []})
        return added + self._event("response.content_part.added", **_place(item), part=part)

    def _close(self, item: Item, wire: dict[str, Any]) -> bytes:
        if isinstance(item, MessageItem):
            (part,) = wire["content"]
            whole = {"text": part["text"], "logprobs": part["logprobs"]}
            events = self._event("response.output_text.done", **_place(item), **whole)
            events += self._event("response.content_part.done", **_place(item), part=part)
        else:
            whole = {"name": item.name, "arguments": wire["arguments"]}
            events = self._event("response.function_call_arguments.done", **_place(item), **whole)
        return events + self._event("response.output_item.done", output_index=item.index, item=wire)

    def _event(self, name: str, /, **data: Any) -> bytes:
        number = self._next_number
        self._next_number += 1
        return b"event: %b\ndata: " % name.encode() + encode({"type": name, "sequence_number": number, **data}) + END


def _place(item: Item) -> dict[str, Any]:
    place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
    return {**place, "content_index": 0} if isinstance(item, MessageItem) else place
