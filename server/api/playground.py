"""GET /: a page on which to try the model, and the files that it is made of.

All files are read once and found by their exact names, so that nothing a client writes ever meets a file system. The
page holds no secrets and needs no key; what it does goes through the public API, with the key that it asks for.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.errors import NotFoundError

FOLDER = Path(__file__).parent.parent / "web"
PAGE = "index.html"
# Where all files but the page lie. The page's own references are relative, so that a proxy may put a path before it.
PREFIX = "/playground/"

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
# The page asks nobody but this server, runs and shows nothing but its own files and the pictures that it was given, and
# can make no markup of a text.
_CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": _CONTENT_SECURITY_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # Kept, and asked for anew each time: a page and a script of two versions would not fit each other.
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class Asset:
    """A file as it is sent."""

    content: bytes
    media_type: str
    etag: str


@functools.cache
def assets() -> Mapping[str, Asset]:
    """Path → what is answered there. Raises KeyError for a file of a type that is not known here."""
    files = (file for file in sorted(FOLDER.rglob("*")) if file.is_file())
    names = {file.relative_to(FOLDER).as_posix(): file for file in files}
    return {"/" if name == PAGE else PREFIX + name: _read(file) for name, file in names.items()}


def playground_paths() -> frozenset[bytes]:
    """All paths that the page needs, as they stand in a request."""
    return frozenset(path.encode() for path in assets())


def playground_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.head("/")
    @router.get("/")
    async def page(request: Request) -> Response:
        return _answer(assets()["/"], request)

    @router.head(PREFIX + "{name:path}")
    @router.get(PREFIX + "{name:path}")
    async def file(name: str, request: Request) -> Response:
        asset = assets().get(PREFIX + name)
        if asset is None:
            raise NotFoundError("there is nothing at this path")
        return _answer(asset, request)

    return router


def _read(file: Path) -> Asset:
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:32]
    return Asset(content=content, media_type=_MEDIA_TYPES[file.suffix], etag=f'"{digest}"')


def _answer(asset: Asset, request: Request) -> Response:
    headers = {**HEADERS, "etag": asset.etag}
    if _is_known(asset, request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=headers)
    return Response(asset.content, media_type=asset.media_type, headers=headers)


def _is_known(asset: Asset, condition: str) -> bool:
    """`condition`: tags separated by commas, compared weakly, or * (RFC 9110, section 13.1.2)."""
    tags = (tag.strip().removeprefix("W/") for tag in condition.split(","))
    return any(tag in ("*", asset.etag) for tag in tags)
