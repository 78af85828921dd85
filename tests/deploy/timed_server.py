"""`serve` with the engine of `tests.faulty_engine`, which also notes when each event of a stream leaves it.

The times, by the clock that all processes of a machine share, are in a file named by the request's id, in the folder
that TIMES_FOLDER names.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests import faulty_engine

TIMES_FOLDER = "TIMES_FOLDER"


class Timed:
    """The outermost layer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = dict(scope.get("headers", [])).get(b"x-request-id", b"").decode()
        if scope["type"] != "http" or not name:
            await self._app(scope, receive, send)
            return
        times: list[float] = []

        async def timed(message: Message) -> None:
            events = message.get("body", b"").count(b"data:")
            times.extend([time.monotonic()] * events)
            await send(message)

        await self._app(scope, receive, timed)
        if times:
            file = Path(os.environ[TIMES_FOLDER], name)
            await asyncio.to_thread(file.with_suffix(".part").write_text, json.dumps(times))
            await asyncio.to_thread(file.with_suffix(".part").rename, file)


def main() -> int:
    launch: Any = importlib.import_module("server.launch")
    build_app = launch.build_app

    def build_timed(*args: Any) -> Any:
        app = build_app(*args)
        app.add_middleware(Timed)
        return app

    launch.build_app = build_timed
    return faulty_engine.main()


if __name__ == "__main__":
    sys.exit(main())
