"""The items that an answer consists of, as it grows: messages and function calls.

Whoever sends an answer whole looks at the items in the end; whoever streams it tells each step. Both are built here,
so that they cannot differ.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import msgspec
from pydantic import BaseModel, Field

from server.api.chat.details import encode_logprobs
from server.api.chat.protocol import TokenLogprob
from server.api.tool_calls import CallArguments, CallParser, CallStart, Content, Piece
from server.types import RequestOutput

EndStatus = Literal["completed", "incomplete"]
Status = Literal["in_progress"] | EndStatus


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[dict[str, Any]] = Field([], max_length=0, description="There are none.")
    logprobs: list[TokenLogprob] = Field(description="Empty unless asked for.")


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class FunctionCall(BaseModel):
    id: str
    type: Literal["function_call"] = "function_call"
    status: Status
    call_id: str
    name: str
    arguments: str = Field(description="JSON, as the model wrote it.")


@dataclass
class MessageItem:
    index: int
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    texts: list[str] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)

    def wire(self, status: Status) -> dict[str, Any]:
        logprobs = json_array(self.logprobs)
        content = {"type": "output_text", "text": "".join(self.texts), "annotations": [], "logprobs": logprobs}
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": [content]}


@dataclass
class CallItem:
    index: int
    call_id: str
    name: str
    id: str = field(default_factory=lambda: f"fc_{uuid.uuid4().hex}")
    texts: list[str] = field(default_factory=list)

    def wire(self, status: Status) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self.call_id,
            "name": self.name,
            "arguments": "".join(self.texts),
        }


Item = MessageItem | CallItem


# Steps hold what is true when they happen: their item goes on growing.


class Opened(NamedTuple):
    """`wire` is the item as it is sent, which is empty yet."""

    item: Item
    wire: dict[str, Any]


class Grown(NamedTuple):
    """`text` is never empty. `logprobs` are encoded entries."""

    item: Item
    text: str
    logprobs: list[bytes]


class Closed(NamedTuple):
    """`wire` is the item as it is sent, whole."""

    item: Item
    wire: dict[str, Any]


Step = Opened | Grown | Closed


class ItemBuilder:
    """Reads the outputs of one answer. Without a `parser` all of it is one message."""

    def __init__(self, parser: CallParser | None) -> None:
        self._parser = parser
        self._items: list[Item] = []
        # Those of tokens whose text has not been told yet.
        self._held_logprobs: list[bytes] = []

    def open(self) -> list[Step]:
        """What can be told before any text."""
        return [self._open(MessageItem(index=0))] if self._parser is None else []

    def push_text(self, text: str) -> None:
        """A shorter way, for an answer without a parser and an output without log-probabilities: all of it grows."""
        self._items[-1].texts.append(text)

    def push(self, output: RequestOutput) -> list[Step]:
        if self._items and isinstance(self._items[-1], CallItem):
            # A call's tokens have no place to be told in, unless words follow in the same output.
            self._held_logprobs.clear()
        if output.logprobs:
            # At once: for all tokens of a long answer together it would hold up everybody's stream.
            self._held_logprobs.append(encode_logprobs(output.logprobs))
        if self._parser is None:
            return self._read(Content(output.text))
        return [step for piece in self._parser.push(output.text) for step in self._read(piece)]

    def end(self, status: EndStatus) -> list[Step]:
        """After the last output. An answer has at least one item."""
        steps: list[Step] = []
        if self._parser is not None:
            steps = [step for piece in self._parser.flush() for step in self._read(piece)]
        if not self._items:
            steps.append(self._open(MessageItem(index=0)))
        last = self._items[-1]
        if isinstance(last, MessageItem):
            last.logprobs += self._held_logprobs
        return [*steps, Closed(last, last.wire(status))]

    def wire(self, status: EndStatus) -> list[dict[str, Any]]:
        """All items after the end. Only the last can be incomplete."""
        return [*(item.wire("completed") for item in self._items[:-1]), self._items[-1].wire(status)]

    def _read(self, piece: Piece) -> list[Step]:
        match piece:
            case CallStart(id=call_id, name=name):
                return self._next(CallItem(index=len(self._items), call_id=call_id, name=name))
            case CallArguments(text=text):
                return self._grow(text, [])
            case Content(text=text):
                steps: list[Step] = []
                if not self._items or not isinstance(self._items[-1], MessageItem):
                    steps = self._next(MessageItem(index=len(self._items)))
                return [*steps, *self._grow_message(text)]

    def _grow_message(self, text: str) -> list[Step]:
        item = self._items[-1]
        if not text or not isinstance(item, MessageItem):
            return []
        logprobs, self._held_logprobs = self._held_logprobs, []
        item.logprobs += logprobs
        return self._grow(text, logprobs)

    def _grow(self, text: str, logprobs: list[bytes]) -> list[Step]:
        item = self._items[-1]
        item.texts.append(text)
        return [Grown(item, text, logprobs)]

    def _next(self, item: Item) -> list[Step]:
        closed: list[Step] = [Closed(last, last.wire("completed")) for last in self._items[-1:]]
        return [*closed, self._open(item)]

    def _open(self, item: Item) -> Opened:
        self._items.append(item)
        return Opened(item, item.wire("in_progress"))


def json_array(entries: list[bytes]) -> msgspec.Raw:
    """Encoded entries, of which each may be several, as an array."""
    return msgspec.Raw(b"[" + b",".join(entries) + b"]")
