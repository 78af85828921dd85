from __future__ import annotations

import base64
import random
import re

import pytest

from server.errors import ClientError
from server.inputs.image_data_url import parse_data_url
from tests.inputs.fetching import BODY, PARAM

ENCODED = base64.b64encode(BODY).decode()


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + ENCODED,
        "DATA:image/png;BASE64," + ENCODED,
        "data:;base64," + ENCODED,
        "data:image/*;base64," + ENCODED,
        "data:text/html;charset=x;base64," + ENCODED,
        "data:image/png; base64," + ENCODED,
        "data:image/png;base64,\n " + "\r\n".join(ENCODED[i : i + 76] for i in range(0, len(ENCODED), 76)) + "\t\f\n",
        "data:image/png;base64," + ENCODED.replace("=", "%3D").replace("+", "%2B").replace("/", "%2f"),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in BODY),
        "data:," + "".join(chr(byte) if 48 <= byte < 58 else f"%{byte:02X}" for byte in BODY),
    ],
)
def test_data_urls(url: str) -> None:
    assert parse_data_url(url, max_bytes=len(BODY), param=PARAM) == BODY


@pytest.mark.parametrize("length", [*range(1, 9), 196_606, 196_607, 196_608, 196_609, 393_216, 500_001])
def test_data_urls_longer_than_a_slice(length: int) -> None:
    body = random.Random(length).randbytes(length)
    plain = "data:;base64," + base64.b64encode(body).decode()
    assert parse_data_url(plain, max_bytes=length, param=PARAM) == body
    spaced = re.sub(r"(.{61})", "\\1\n", plain)
    assert parse_data_url(spaced, max_bytes=length, param=PARAM) == body
    escaped = "data:," + "".join(f"%{byte:02x}" for byte in body)
    assert parse_data_url(escaped, max_bytes=length, param=PARAM) == body


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64", "invalid_image_url"),  # no comma
        ("data:", "invalid_image_url"),
        ("data:image/png;base64" + "x" * 50_000 + ",AAAA", "invalid_image_url"),
        ("http://pictures.example/x,y", "invalid_image_url"),
        ("", "invalid_image_url"),
        ("data:image/png,%zz", "invalid_image_url"),
        ("data:image/png,%4", "invalid_image_url"),
        ("data:image/png,é", "invalid_image_url"),
        ("data:image/png;base64,", "empty_image_file"),
        ("data:,", "empty_image_file"),
        ("data:image/png;base64, \n", "empty_image_file"),
        ("data:image/png;base64,AAA", "invalid_base64_image"),
        ("data:image/png;base64,AAAAA", "invalid_base64_image"),
        ("data:image/png;base64,A===", "invalid_base64_image"),
        ("data:image/png;base64,AAAA=", "invalid_base64_image"),
        ("data:image/png;base64,AA==AAAA", "invalid_base64_image"),
        ("data:image/png;base64,=AAA", "invalid_base64_image"),
        ("data:image/png;base64,-_-_", "invalid_base64_image"),  # the URL-safe alphabet
        ("data:image/png;base64,AA!A", "invalid_base64_image"),
        ("data:image/png;base64,AAé=", "invalid_base64_image"),
        ("data:image/png;base64,AA\u00a0A", "invalid_base64_image"),
        ("data:image/png;base64,AA\x00A", "invalid_base64_image"),
        ("data:image/png;base64," + "A" * ((256 << 10) - 2) + "==" + "AAAA", "invalid_base64_image"),
    ],
)
def test_bad_data_urls(url: str, code: str) -> None:
    with pytest.raises(ClientError) as caught:
        parse_data_url(url, max_bytes=1 << 20, param=PARAM)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, PARAM)


def test_a_data_url_is_not_decoded_beyond_the_limit() -> None:
    body = base64.b64encode(bytes(1 << 20)).decode()
    for url, limit in (
        (f"data:;base64,{body}", 1 << 19),
        (f"data:;base64,{body}", (1 << 20) - 1),
        (f"data:;base64,{body} !", 1 << 19),  # bad as well, which nobody gets to see
        ("data:," + "%00" * 1001, 1000),
    ):
        with pytest.raises(ClientError) as caught:
            parse_data_url(url, max_bytes=limit, param=PARAM)
        assert caught.value.code == "image_file_too_large"
        assert f"larger than the limit of {limit} bytes" in caught.value.message
    assert parse_data_url(f"data:;base64,{body}", max_bytes=1 << 20, param=PARAM) == bytes(1 << 20)
