"""Strange methods, paths, headers and content types, and bytes that are no HTTP at all."""

from __future__ import annotations

import gzip
import random
from collections.abc import Mapping

from tests.campaigns.hostile_values import CANARY

USUAL_METHODS = ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "POST")
METHODS = (*USUAL_METHODS[:-1], "TRACE", "CONNECT", "PROPFIND", "POST ", "post", "\u20ac")
PATHS = (
    *("/", "//", "/v1", "/v1/", "/v1/chat/completions/", "//v1/chat/completions", "/v1/../v1/completions"),
    "/V1/MODELS",
    *("/v1/%2e%2e/metrics", "/v1/models/%00", "/v1/models/..%2f..%2fetc", "/v1/chat%2Fcompletions", "/%ff%fe"),
    "/" + "a" * 3_000,
    *("/v1/chat/completions;x=1", "/.env", "/docs?x", "/health/live/../../metrics", "/tokenize%20"),
    "/v1/responses/resp_1",
    *("http://127.0.0.1/v1/models", "*", "/\u20ac", "/v1/models/" + "%41" * 900),
)
QUERIES = (CANARY, f"a={CANARY}&a=2", "%00", "x" * 5_000, "&&==", "a=%ff", f"stream=true#{CANARY}")
HEADERS: tuple[Mapping[str, str], ...] = (
    {"Authorization": f"Bearer {CANARY}"},
    {"Authorization": CANARY * 50},
    {"X-Request-Id": "a b\tc"},
    *({"X-Request-Timeout": value} for value in ("0", "-1", "nan", "1e999", CANARY, "0.001", "9" * 400)),
    *({"Host": value} for value in ("", "a/?x=", "evil.example:99999", CANARY)),
    {"Cookie": CANARY * 100},
    {"Expect": "100-continue"},
    {"Accept": "image/png", "Accept-Encoding": "gzip, br"},
    {"X-Forwarded-For": CANARY, "Forwarded": CANARY},
)
# Which the server may answer by hanging up.
RUDE_HEADERS: tuple[Mapping[str, str], ...] = (
    {"Upgrade": "websocket", "Connection": "Upgrade"},
    {f"X-{index}": "y" * 50 for index in range(120)},
    {"X-Long": "y" * 70_000},
)
_TOKENIZE, _CHUNKED = b"POST /tokenize HTTP/1.1\r\nHost: x", b"Transfer-Encoding: chunked"
NO_HTTP = tuple(
    b"\r\n".join(lines)
    for lines in (
        (b"POST", b"", b""),
        (b"GET / HTTP/9.9", b"", b""),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"", b""),
        (b"PRI * HTTP/2.0", b"", b"SM", b"", b""),
        (_TOKENIZE, b"Content-Length: 5", b"Content-Length: 6", b"", b"hello"),
        (_TOKENIZE, b"Content-Length: -1", b"", b""),
        (_TOKENIZE, _CHUNKED, b"", b"zz", b""),
        (_TOKENIZE, _CHUNKED, b"", b"f" * 18, b""),
        (b"GET /v1/models HTTP/1.1", b"Host x", b"", b""),
        (b"GET /v1/models HTTP/1.1", b" folded: x", b"", b""),
        (b"GET /v1/models", b"", b""),
    )
)
CONTENT_TYPES = (
    *("application/json", "application/json", "application/json; charset=utf-16", "text/plain", "", "x" * 500),
    *(
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "application/xml",
        "application/json\x80",
    ),
)


def no_json(chance: random.Random, good: bytes) -> bytes:
    """A body that is none, or not one alone; `good` is one."""
    bodies = (
        *(b"", b"{", b"}", b"null", b"[]", b'"x"', b"1", b"\0", b"{'a':1}", b"a=1&b=2", b"\xff\xfe{\x00}\x00"),
        *(b"\xef\xbb\xbf" + good, good + b"}", good + good, gzip.compress(good), good.replace(b'"', b"\x80")),
        *(good[: chance.randrange(len(good))], b"[" * 5_000, b'{"a":' * 5_000),
        b'{"a":"' + bytes(chance.choices(range(256), k=200)) + b'"}',
        b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--x--\r\n',
    )
    return chance.choice(bodies)


def head(method: str, path: str, length: int, headers: Mapping[str, str]) -> bytes:
    """A request up to its body."""
    lines = [f"{method} {path} HTTP/1.1", *([] if "Host" in headers else ["Host: x"]), f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape")
