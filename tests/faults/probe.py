"""One client in a process of its own, so that its clock is not held up by the load beside it.

`python -m tests.faults.probe` reads a JSON object from stdin: url, count or seconds, pause, and what is asked for:
path, headers, body (none: a GET). It asks again and again, and prints a JSON array of [status, seconds to the first
token or to the end of the head, seconds to the end].
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Probe:
    status: int
    first: float
    total: float


async def probe(
    url: str,
    path: str,
    *,
    pause: float,
    count: int | None = None,
    seconds: float | None = None,
    headers: Mapping[str, str] | None = None,
    body: Mapping[str, Any] | None = None,
) -> list[Probe]:
    """Ask `count` times, or for so many seconds, with a pause between."""
    wanted = {"url": url, "path": path, "pause": pause, "count": count, "seconds": seconds}
    wanted |= {"headers": dict(headers or {}), "body": body}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.faults.probe", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate(json.dumps(wanted).encode())
    return [Probe(*item) for item in json.loads(output)]


def main() -> None:
    wanted = json.load(sys.stdin)
    connection = http.client.HTTPConnection(wanted["url"].removeprefix("http://"), timeout=60)
    until = time.perf_counter() + (wanted["seconds"] or float("inf"))
    found = []
    for _ in range(wanted["count"]) if wanted["count"] else itertools.count():
        if time.perf_counter() >= until:
            break
        found.append(_ask(connection, wanted))
        time.sleep(wanted["pause"])
    json.dump(found, sys.stdout)


def _ask(connection: http.client.HTTPConnection, wanted: dict[str, Any]) -> tuple[int, float, float]:
    began = time.perf_counter()
    if wanted["body"] is None:
        connection.request("GET", wanted["path"], headers=wanted["headers"])
    else:
        headers = {"content-type": "application/json", **wanted["headers"]}
        connection.request("POST", wanted["path"], json.dumps(wanted["body"]), headers)
    answer = connection.getresponse()
    first = time.perf_counter() - began
    is_stream = (answer.getheader("content-type") or "").startswith("text/event-stream")
    while line := answer.readline():
        if is_stream and b'"content":"' in line and b'"content":""' not in line:
            first = time.perf_counter() - began
            break
    answer.read()
    return answer.status, first, time.perf_counter() - began


if __name__ == "__main__":
    main()
