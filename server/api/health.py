"""What machines ask: is it alive, may it get requests, what does it measure, which one is it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel, Field

from server.api.schemas import error_answers
from server.errors import EngineDeadError, UnavailableError

if TYPE_CHECKING:
    from server.llm import AsyncLLM


LOADING_RETRY_SECONDS = 5.0


class Health(BaseModel):
    status: str = "ok"


class Version(BaseModel):
    version: str


class Load(BaseModel):
    server_load: int = Field(description="Requests that run, wait or are being prepared.")


def health_router(llm: AsyncLLM, *, version: str) -> APIRouter:
    router = APIRouter(tags=["Operations"])
    unavailable = error_answers(503)

    # Load balancers also ask for the headers alone, which the page need not say.
    @router.head("/health/live", include_in_schema=False)
    @router.get("/health/live", responses=unavailable)
    async def live() -> Health:
        """503: there is no engine, nor will there be one, so restart the server.

        One that loads, restarts its engine or drains is alive.
        """
        if not llm.is_alive:
            raise EngineDeadError("the engine is not running")
        return Health()

    @router.head("/health/ready", include_in_schema=False)
    @router.get("/health/ready", responses=unavailable)
    @router.head("/health", include_in_schema=False)
    @router.get("/health", responses=unavailable)
    @router.head("/ping", include_in_schema=False)
    @router.post("/ping", responses=unavailable)
    @router.get("/ping", responses=unavailable)
    async def ready() -> Health:
        """503: send requests elsewhere."""
        if not llm.is_alive:
            raise EngineDeadError("the engine is not running")
        if not llm.is_ready:
            llm.check_ready()  # knows whether it is loading, restarting its engine or draining, and says so
            raise UnavailableError("no picture can be decoded at the moment", code="image_worker_unavailable")
        return Health()

    @router.head("/health/startup", include_in_schema=False)
    @router.get("/health/startup", responses=unavailable)
    async def startup() -> Health:
        """503 until the server is ready for the first time; then 200 for ever."""
        if not llm.has_started:
            message = "the model is still loading"
            raise UnavailableError(message, code="model_loading", retry_after=LOADING_RETRY_SECONDS)
        return Health()

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """In Prometheus' text format."""
        content, content_type = llm.metrics.render()
        return Response(content, media_type=content_type)

    @router.get("/version")
    async def tell_version() -> Version:
        return Version(version=version)

    @router.get("/load")
    async def load() -> Load:
        """How busy the server is, for those that spread requests over several."""
        return Load(server_load=llm.num_in_flight)

    return router
