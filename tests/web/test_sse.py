"""The page's reader of event streams, run in the browser on streams that are cut anywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.web.playground import Playground

pytestmark = pytest.mark.web

WORDS = "\u00e4 \u20ac \U0001f600 \u2028\u0085 e\u0301"  # one to four bytes each, and line ends that are none here

# A stream → what it says, by the rules of the HTML standard.
STREAMS: list[tuple[str, list[tuple[str, str]]]] = [
    ("data: a\n\ndata: b\n\n", [("message", "a"), ("message", "b")]),
    ("data: a\r\n\r\ndata: b\r\n\r\n", [("message", "a"), ("message", "b")]),
    ("data: a\r\rdata: b\r\r", [("message", "a"), ("message", "b")]),
    ("data: a\r\n\ndata: b\n\r\n", [("message", "a"), ("message", "b")]),
    ("data: one\ndata: two\r\ndata:\rdata: four\n\n", [("message", "one\ntwo\n\nfour")]),
    (": keep-alive\n\n:\n\ndata: a\n: between\ndata: b\n\n", [("message", "a\nb")]),
    ("data:a\n\ndata:  b\n\n", [("message", "a"), ("message", " b")]),
    ("data\n\ndata:\n\n", [("message", ""), ("message", "")]),
    ("event: error\ndata: x\n\ndata: y\n\n", [("error", "x"), ("message", "y")]),
    ("event: lost\n\nid: 7\nretry: 10\nunknown: x\ndata: a:b: c\n\n", [("message", "a:b: c")]),
    ("\ufeffdata: a\n\n", [("message", "a")]),
    (f"data: {WORDS}\n\n", [("message", WORDS)]),
    ("data: [DONE]\n\n", [("message", "[DONE]")]),
    ("\n\n\n\r\n\r\r", []),
    ("data: whole\n\ndata: not ended\n", [("message", "whole")]),
    ("data: not even a line", []),
    ("", []),
]

# Reads each list of pieces, each a list of bytes.
READ = """
async (cases) => {
  const { readEvents } = await import("./playground/sse.js");
  const results = [];
  for (const pieces of cases) {
    const stream = new ReadableStream({
      start(controller) {
        for (const piece of pieces) controller.enqueue(new Uint8Array(piece));
        controller.close();
      },
    });
    const events = [];
    for await (const { type, data } of readEvents(stream)) events.push([type, data]);
    results.push(events);
  }
  return results;
}
"""


def read(page: Playground, cases: list[list[bytes]]) -> Any:
    return page.page.evaluate(READ, [[list(piece) for piece in pieces] for pieces in cases])


@pytest.mark.parametrize(("text", "events"), STREAMS, ids=[json.dumps(text)[:40] for text, _ in STREAMS])
def test_wherever_a_stream_is_cut_it_says_the_same(page: Playground, text: str, events: list[tuple[str, str]]) -> None:
    data = text.encode()
    cuts = [[data], [data[i : i + 1] for i in range(len(data))], [data[i : i + 3] for i in range(0, len(data), 3)]]
    cuts += [[data[:i], b"", data[i:]] for i in range(len(data) + 1)]
    cuts += [[data[:i], data[i : i + 1], data[i + 1 :]] for i in range(len(data))]
    expected = [list(event) for event in events]
    assert read(page, cuts) == [expected] * len(cuts)


def test_a_reader_that_leaves_ends_the_stream(page: Playground) -> None:
    leave = """
    async () => {
      const { readEvents } = await import("./playground/sse.js");
      let cancelled = false;
      const stream = new ReadableStream({
        pull(controller) { controller.enqueue(new TextEncoder().encode("data: x\\n\\n")); },
        cancel() { cancelled = true; },
      });
      for await (const _ of readEvents(stream)) break;
      return cancelled;
    }
    """
    assert page.page.evaluate(leave) is True
