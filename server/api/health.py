"""What machines ask: is it alive, may it get requests, what does it measure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel

from server.errors import EngineDeadError, UnavailableError

if TYPE_CHECKING:
    from server.llm import AsyncLLM


class Health(BaseModel):
    status: str = "ok"


def health_router(llm: AsyncLLM) -> APIRouter:
    router = APIRouter(tags=["Operations"])

    @router.get("/health/live")
    async def live() -> Health:
        """503: the engine makes no progress any more, so restart it. A server that drains is alive."""
        if not llm.is_alive:
            raise EngineDeadError("the engine is not running")
        return Health()

    @router.get("/health/ready")
    @router.get("/health")
    async def ready() -> Health:
        """503: send requests elsewhere."""
        if not llm.is_alive:
            raise EngineDeadError("the engine is not running")
        if not llm.is_ready:
            llm.check_capacity()  # knows whether it is loading or draining, and says so
            raise UnavailableError("the server is loading its model or shutting down")
        return Health()

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """In Prometheus' text format."""
        content, content_type = llm.metrics.render()
        return Response(content, media_type=content_type)

    return router
