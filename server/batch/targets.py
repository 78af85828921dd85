"""Who answers a batch: the application in this very process, or a server that listens somewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from server.batch.sender import Target
from server.config import ServerConfig

CONNECT_SECONDS = 10.0

# Settings of a server that listens, or that has clients who may go elsewhere. Here there are none: whatever a file or
# the environment says of them, they have no limits.
LISTENING = frozenset(
    {
        "host",
        "port",
        "ssl_keyfile",
        "ssl_certfile",
        "ssl_ca_certs",
        "allowed_hosts",
        "max_connections",
        "header_timeout",
        "body_timeout",
        "api_key",
        "api_key_file",
        "max_reqs_per_key",
        "max_tokens_per_minute_per_key",
        "max_num_queued_reqs",
        "max_num_queued_tokens",
        "request_timeout",
        "keep_alive_seconds",
        "metrics_compat",
    }
)


@asynccontextmanager
async def local_target(config: ServerConfig) -> AsyncIterator[Target]:
    """The application that `serve` would serve, called without a socket. Loads the model.

    Raises ConfigError or CheckpointError.
    """
    # Imported here: PyTorch takes seconds, and somebody else's server needs none of it.
    from server.api.app import build_app
    from server.launch import build_llm
    from server.observability.logs import configure_logging

    configure_logging("WARNING")  # a line for each request would be a line for each line
    # There is nobody to send away: whatever is in flight may wait.
    endless = {"max_num_queued_reqs": 1 << 20, "max_num_queued_tokens": 1 << 40, "request_timeout": 86400.0}
    defaults = {name: ServerConfig.model_fields[name].default for name in LISTENING}
    config = config.model_copy(update=defaults | endless)
    llm = build_llm(config)
    app = build_app(llm, config)
    urls = {path for path, methods in app.openapi()["paths"].items() if path.startswith("/v1/") and "post" in methods}
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    try:
        await llm.start()
        async with (
            app.router.lifespan_context(app),
            _client("http://offline", transport=transport, timeout=httpx.Timeout(None)) as client,
        ):
            yield Target(client, frozenset(urls), is_dead=lambda: not llm.is_alive)
    finally:
        await llm.close()


@asynccontextmanager
async def remote_target(
    base_url: str, *, api_key: str | None, timeout: float, max_in_flight: int
) -> AsyncIterator[Target]:
    """A server that listens somewhere; `timeout` is its longest silence in seconds."""
    async with _client(
        base_url.rstrip("/").removesuffix("/v1"),
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=max_in_flight),
        timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
    ) as client:
        yield Target(client)


def _client(
    base_url: str,
    *,
    timeout: httpx.Timeout,
    headers: dict[str, str] | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
    limits: httpx.Limits = httpx.Limits(),  # noqa: B008 - is never changed
) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=base_url,
        headers={"Content-Type": "application/json", **(headers or {})},
        transport=transport,
        limits=limits,
        timeout=timeout,
    )
