"""Ways to write a guarded path so that something takes it for an open one, and a client that sends them as they are."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

# None of them is one of the paths that are open to all.
GUARDED = (
    *("//v1/models", "///v1/models", "/v1//models", "/./v1/models", "/v1/./models", "/V1/models", "/v1/models/"),
    *("/health/../v1/models", "/health/..;/v1/models", "/health/%2e%2e/v1/models", "/health%2f..%2fv1/models"),
    *("/v1/%2e%2e/health", "/v1/../health", "/%2e%2e/health", "/v1/models/../../health", "/../health"),
    *("/health/", "/health/live/", "//health", "/health//live", "/./health", "/health/.", "/HEALTH", "/Health"),
    *("/health%2flive", "/%68ealth", "/healt%68", "/%2fhealth", "/health%00", "/health%20", "/health%0a"),
    *("/health%23", "/health%3f", "/health;x", "/health;/v1/models", "/health&x", "/health,", "/health:80"),
    "/health\\",
    *("/healthz", "/health/ready/x", "/ping/", "/pingx", "/metrics", "/metrics?/health", "/v1/models?/health"),
    *("/v1/models?x=/health", "/v1/models#/health", "/v1/models;/health", "/%76%31/models", "*", "/x", "/x?/health"),
    *("/playground", "/playground/", "/playground/x", "/playground/../v1/models", "/playground/%2e%2e/metrics", "/%2f"),
    *("http://x/v1/models", "http://x//v1/models", "http://x/health/../v1/models", "http://x/%68ealth"),
    *("http://health/v1/models", "http://x/x?/health", "http://user@x/v1/models", "https://x/metrics"),
)

# No request at all, or one that no path answers.
NO_PATHS = (
    *("/health\0", "/health\0/../v1/models", "/health \0", "/health\x7f", "/health\xff", "/health\r"),
    *("v1/models", "health", "", "\\health", "http://", "http://x", "://x/health", "/health /v1/models", "x:443"),
)


def ask(url: str, request_line: str, *headers: str, host: str = "Host: x") -> tuple[int, bytes]:
    """Status and body of a request whose head is sent as it is; 0 when the connection is closed without a word."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as made:
        head = "\r\n".join([f"{request_line} HTTP/1.1", host, *headers, "Connection: close", "", ""])
        made.sendall(head.encode("latin-1"))
        data = b""
        while received := made.recv(65536):
            data += received
    start, _, body = data.partition(b"\r\n\r\n")
    return (int(start.split()[1]) if start else 0), body
