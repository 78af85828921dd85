"""Puts the HTTP surface together. Holds no state and reads no settings of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from importlib import metadata
from typing import TYPE_CHECKING

from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from server.api.access import AccessMiddleware
from server.api.chat.routes import chat_router
from server.api.completions.routes import completions_router
from server.api.errors import ErrorAnswer, install_error_handlers
from server.api.health import health_router
from server.api.hosts import HostMiddleware, HostNames
from server.api.middleware import BodyLimitMiddleware, RequestMiddleware
from server.api.models import models_router
from server.api.playground import playground_paths, playground_router
from server.api.responses.routes import responses_router
from server.api.tokenize import tokenize_router
from server.keys import NO_KEYS, KeyRing

if TYPE_CHECKING:
    from server.config import ServerConfig
    from server.llm import AsyncLLM

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def build_app(
    llm: AsyncLLM, config: ServerConfig, keys: KeyRing = NO_KEYS, *, lifespan: Lifespan | None = None
) -> FastAPI:
    """The application that a server runs. `lifespan` starts and stops what `llm` needs.

    With `keys`, whatever is not open to all needs one of them; without, no key is looked at. Raises ConfigError.
    """
    version = _version()
    app = FastAPI(
        title="Idefics2 server",
        summary="OpenAI-compatible inference for Idefics2.",
        version=version,
        lifespan=lifespan,
        redoc_url=None,
        # A redirect repeats the Host header of the request, which anybody may have written.
        redirect_slashes=False,
        responses={"default": {"model": ErrorAnswer, "description": "Any error."}},
    )
    app.state.parsing = asyncio.Lock()
    install_error_handlers(app)
    app.include_router(chat_router(llm, config))
    app.include_router(completions_router(llm, config))
    app.include_router(responses_router(llm, config))
    app.include_router(tokenize_router(llm, config))
    app.include_router(models_router(llm))
    app.include_router(health_router(llm, version=version))
    if config.playground:
        app.include_router(playground_router())
    # Added last is outermost: also what is refused is named, logged and counted.
    app.add_middleware(BodyLimitMiddleware, max_bytes=int(config.max_body_mb * (1 << 20)), seconds=config.body_timeout)
    if keys:
        app.add_middleware(AccessMiddleware, keys=keys, pages=playground_paths() if config.playground else ())
    app.add_middleware(HostMiddleware, names=HostNames(config.allowed_hosts))
    app.add_middleware(RequestMiddleware, metrics=llm.metrics)
    # The library would cut every open stream at SIGTERM; ours may finish, and how long is not its business.
    AppStatus.enable_automatic_graceful_drain = False
    return app


def _version() -> str:
    try:
        return metadata.version("idefics2-server")
    except metadata.PackageNotFoundError:
        return "0"
