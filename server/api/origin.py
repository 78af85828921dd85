"""Whose request it is, and how long its client will wait: from its headers and what the access middleware found out."""

from __future__ import annotations

import math
import time

from fastapi import Request

from server.errors import ClientError
from server.types import RequestOrigin

# Where the access middleware leaves the name of the key, in the ASGI scope.
KEY_NAME = "idefics2.key"

TIMEOUT_HEADER = "x-request-timeout"


def request_origin(request: Request, *, timeout: float) -> RequestOrigin:
    """`timeout` is the server's bound in seconds; a client may set a shorter one. Raises ClientError.

    Call it when the request arrives: its time runs from here.
    """
    given = request.headers.get(TIMEOUT_HEADER)
    if given is not None:
        timeout = min(timeout, _seconds(given))
    return RequestOrigin(key=request.scope.get(KEY_NAME, ""), deadline=time.monotonic() + timeout)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ClientError(f"the header {TIMEOUT_HEADER} must be a positive number of seconds", param=TIMEOUT_HEADER)
    return seconds
