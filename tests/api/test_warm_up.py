"""What is done before the first request: every route has been through its framework, and nothing was counted."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, FastAPI

from server.api.warm_up import PATHS, warm_up
from server.errors import MediaTypeError


def test_every_route_is_called_inside_of_all_middlewares() -> None:
    called: list[str] = []

    class Outermost:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            raise AssertionError("a middleware was called")

    app = FastAPI()
    app.add_middleware(Outermost)
    router = APIRouter()
    for path in PATHS:

        async def handle(path: str = path) -> None:
            called.append(path)
            raise MediaTypeError("no JSON")

        router.post(path)(handle)
    app.include_router(router)
    asyncio.run(warm_up(app))
    assert called == list(PATHS)
