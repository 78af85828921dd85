"""What running streams feel while pictures are admitted: the gaps before and during, and the cost of one tile.

A round first encodes one such picture whole, on an idle server, for the cost of the largest tile. Then it starts N text
streams, lets them settle, sends M requests with pictures at once, and compares the streams' usual gap with their
largest one until the last picture request has its first token.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import httpx

from server.bench.client import StreamClient
from server.bench.load import Sender
from server.bench.stream import RequestRecord, StreamReader

SETTLED_EVENTS = 24  # text events that each stream must have had before its gaps are called usual
POLL_SECONDS = 0.005

_ENCODE_SECONDS = re.compile(rb"^idefics2:image_encode_seconds_sum\S* (\S+)$", re.MULTILINE)
_ENCODED_TILES = re.compile(rb"^idefics2:tiles_encoded_total\S* (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One admission, all in seconds. `tile` is the largest tile's cost, None for a server that does not tell.

    `usual_gap` is the median and `quiet_gap` the largest before the pictures came, once all streams were running.
    """

    usual_gap: float
    quiet_gap: float
    largest_gap: float
    first_token: float
    tile: float | None

    @property
    def excess(self) -> float:
        """The largest gap less the cost of one tile, in usual gaps."""
        return (self.largest_gap - (self.tile or 0.0)) / self.usual_gap


class AdmissionError(Exception):
    """A request of the round failed or ended too early to say anything."""


async def run_round(
    *,
    url: str,
    headers: Mapping[str, str],
    streams: Sequence[bytes],
    pictures: Sequence[bytes],
    whole: bytes,
    timeout: float,
) -> Round:
    """Measure one round; `whole` is a request with one picture that is not split. Raises AdmissionError."""
    async with StreamClient(url, headers=headers, timeout=timeout) as client:
        before = await _tile_counters(url)
        await Sender(client).send(0, whole)
        tile = _tile_cost(before, await _tile_counters(url))
        watched = [_Watched(client, index, body) for index, body in enumerate(streams)]
        while any(len(stream.record.text_times) < SETTLED_EVENTS for stream in watched):
            if any(stream.task.done() for stream in watched):
                raise AdmissionError("a stream ended before all had settled; raise --output-len")
            await asyncio.sleep(POLL_SECONDS)
        sent = time.perf_counter()
        admitted = await asyncio.gather(*(Sender(client).send(i, body) for i, body in enumerate(pictures)))
        records = [await stream.finish() for stream in watched]
    return _judge(records, admitted, sent=sent, tile=tile)


class _Watched:
    """A stream whose record can be read while it runs."""

    def __init__(self, client: StreamClient, index: int, body: bytes) -> None:
        now = time.perf_counter()
        self.record = RequestRecord(index=index, due=now, start=now)
        self._reader = StreamReader(self.record)
        self.task = asyncio.create_task(client.post(body, self._reader))

    async def finish(self) -> RequestRecord:
        await self.task
        self._reader.close()
        return self.record


def _judge(
    records: Sequence[RequestRecord], admitted: Sequence[RequestRecord], *, sent: float, tile: float | None
) -> Round:
    for record in [*records, *admitted]:
        if record.error is not None:
            raise AdmissionError(record.error)
    answered = max(record.first_token or sent for record in admitted)
    if any(record.text_times[-1] < answered for record in records):
        raise AdmissionError("a stream ended before the pictures were admitted; raise --output-len")
    # Before this the streams' own prompts are computed, of which those that came first feel something.
    running = max(record.text_times[0] for record in records)
    quiet, during = [], []
    for record in records:
        for earlier, later in pairwise(record.text_times):
            if running <= earlier and later <= sent:
                quiet.append(later - earlier)
            elif sent < later and earlier <= answered:
                during.append(later - earlier)
    return Round(
        usual_gap=statistics.median(quiet),
        quiet_gap=max(quiet),
        largest_gap=max(during),
        first_token=answered - sent,
        tile=tile,
    )


async def _tile_counters(chat_url: str) -> tuple[float, float] | None:
    """Seconds spent on encoding and tiles encoded so far, from our own server's metrics."""
    async with httpx.AsyncClient() as http:
        response = await http.get(httpx.URL(chat_url).join("/metrics"))
    seconds, tiles = _ENCODE_SECONDS.search(response.content), _ENCODED_TILES.search(response.content)
    return (float(seconds[1]), float(tiles[1])) if seconds and tiles else None


def _tile_cost(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    if before is None or after is None or after[1] == before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def render(rounds: Sequence[Round]) -> str:
    """A line a round and the medians, in milliseconds."""
    lines = [
        f"{'usual gap':>10} {'largest':>10} {'a tile':>10} {'first token':>12}   largest less a tile, in usual gaps"
    ]
    lines += (_row(item) for item in rounds)
    middle = Round(
        usual_gap=statistics.median(item.usual_gap for item in rounds),
        quiet_gap=statistics.median(item.quiet_gap for item in rounds),
        largest_gap=statistics.median(item.largest_gap for item in rounds),
        first_token=statistics.median(item.first_token for item in rounds),
        tile=statistics.median(item.tile or 0.0 for item in rounds),
    )
    return "\n".join([*lines, f"{_row(middle)}   (medians)"])


def _row(item: Round) -> str:
    tile = f"{1e3 * item.tile:10.1f}" if item.tile is not None else f"{'?':>10}"
    return (
        f"{1e3 * item.usual_gap:10.1f} {1e3 * item.largest_gap:10.1f} {tile} {1e3 * item.first_token:12.1f}   "
        f"{item.excess:.2f}"
    )
