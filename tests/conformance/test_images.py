"""Conformance cases 56 to 79: pictures, the files they come in, the addresses they come from; tokens and metrics.

With random weights no answer about a picture can be right. Instead a picture is compared with another: under a
`cache_salt` that nobody else uses, a prompt's cached tokens go beyond its picture only if an earlier request had the
very same pixels, and a sampled answer with a fixed seed follows from the pixels too.
"""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
import urllib.parse
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image, ImageCms
from prometheus_client.parser import text_string_to_metric_families

from tests.conformance.cards import (
    BLUE,
    GREY,
    RED,
    RGB,
    UPRIGHT,
    WHITE,
    animation,
    card,
    cmyk_jpeg,
    deep_png,
    huge_gif,
    huge_png,
    interlaced_png,
    jpeg,
    mean_colour,
    palette_png,
    png_of,
    scene,
    scene_png,
    turned_jpeg,
    upright_png,
    ycck_jpeg,
)
from tests.conformance.memory import children, resident_bytes
from tests.conformance.sabotage import INSIDE, PUBLIC, web
from tests.conformance.talk import Answer, Api, Json, check_error, data_url, picture, text, user
from tests.inputs.loopback import Handler, Seen, answer, raw, redirect
from tests.inputs.pictures import encoded, png_chunk, raw_png

URL = "messages[0].content[0].image_url.url"
IMAGE_LIMIT = 16


def tells(api: Api, file: bytes | str, salt: str, detail: str = "low") -> Answer:
    """What a model says of a picture, sampled so that small differences show."""
    conversation = [user(picture(file, detail), "What is it?")]
    return api.chat(conversation, cache_salt=salt, temperature=1, seed=1, max_tokens=16, ignore_eos=True)


class Compared:
    """A picture to compare others with, pixel by pixel."""

    def __init__(self, api: Api, reference: bytes) -> None:
        self._api = api
        self._salt = uuid.uuid4().hex
        self._reference = tells(api, reference, self._salt)
        assert self._reference.cached_tokens == 0

    def is_shown_by(self, file: bytes | str) -> None:
        same = tells(self._api, file, self._salt)
        assert same.cached_tokens >= 64, "the pixels are others"
        assert same.text == self._reference.text

    def is_not_shown_by(self, file: bytes | str) -> None:
        other = tells(self._api, file, self._salt)
        assert other.cached_tokens < 64, "the pixels are the same"
        assert other.text != self._reference.text


def refused(api: Api, source: bytes | str, code: str) -> Json:
    return api.refuses_chat([user(picture(source))], code=code, param=URL)


def image_tokens(answer: Answer) -> int:
    return int(answer.usage["prompt_tokens_details"]["image_tokens"])


# --- requests ------------------------------------------------------------------------------------------------------


def test_case_56_detail_decides_what_a_picture_costs(api: Api) -> None:
    file = scene_png(1)
    answers = {d: api.chat([user(picture(file, d), "What?")]) for d in ("low", "high", "auto", "original", None)}
    base = api.chat([user("What?")]).prompt_tokens
    assert answers["high"].prompt_tokens - answers["low"].prompt_tokens == 260
    assert answers["low"].prompt_tokens - base in (65, 66, 67)  # 64 and two at its ends; spaces may join
    assert [image_tokens(answers[d]) for d in ("low", "high", "auto", "original", None)] == [64, 320, 320, 320, 320]
    assert answers["original"].texts == answers["high"].texts == answers["auto"].texts == answers[None].texts
    for bad, code in (
        ("medium", "invalid_value"),
        ("LOW", "invalid_value"),
        (3, "invalid_type"),
        ("", "invalid_value"),
    ):
        part = {"type": "image_url", "image_url": {"url": data_url(file), "detail": bad}}
        api.refuses_chat([user(part)], code=code, param="messages[0].content[0].image_url.detail")


def test_case_57_every_way_to_hand_over_a_picture(api: Api) -> None:
    url = data_url(scene_png(2))
    plain = api.chat([user(picture(url), "What?")])
    spellings: list[Json] = [
        {"type": "image_url", "image_url": url},
        {"image_url": {"url": url}},
        {"image_url": url},
        {"type": "input_image", "image_url": url},
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "image", "image": url},
        {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": url, "detail": None}, "uuid": "1"},
    ]
    for part in spellings:
        assert api.chat([user(part, "What?")]).texts == plain.texts
    for parts in (("What?", picture(url)), ("What", picture(url), "is it?"), (picture(url),)):
        assert image_tokens(api.chat([user(*parts)])) == 320
    api.refuses_chat(
        [user({"type": "input_image", "file_id": "file-1"})],
        code="unsupported_value",
        param="messages[0].content[0].file_id",
    )


def test_case_58_too_many_pictures(api: Api) -> None:
    part = picture(card(RED), "low")
    assert image_tokens(api.chat([user(*[part] * IMAGE_LIMIT, "How many?")])) == 64 * IMAGE_LIMIT
    spread: list[Json] = []
    for index in range(IMAGE_LIMIT + 1):
        spread += [user(part, f"This is {index}."), {"role": "assistant", "content": "I see."}]
    for messages in ([user(*[part] * 20)], [user(*[part] * (IMAGE_LIMIT + 1))], [*spread, user("So?")]):
        error = api.refuses_chat(messages, code="too_many_images", param="messages")
        assert str(IMAGE_LIMIT) in error["message"]
    assert image_tokens(api.chat([*spread[2:], user("So?")])) == 64 * IMAGE_LIMIT


def test_case_58_they_are_counted_before_any_is_fetched(sabotaged: Api) -> None:
    with web({f"/{index}": answer(card(RED)) for index in range(21)}) as pictures:
        parts = [picture(f"http://pictures.example:{pictures.port}/{index}", "low") for index in range(21)]
        sabotaged.refuses_chat([user(*parts)], code="too_many_images", param="messages")
        assert pictures.connections == 0
        assert image_tokens(sabotaged.chat([user(*parts[:20])])) == 64 * 20
        assert pictures.connections == 20


def test_case_59_a_picture_twice(api: Api) -> None:
    same, again = scene_png(3), encoded(scene(3), "PNG", compress_level=1)
    assert same != again  # two files with the same pixels
    fields = {"temperature": 1, "seed": 3, "max_tokens": 20, "ignore_eos": True}
    twice = api.chat([user(picture(same, "low"), "and", picture(same, "low"), "?")], **fields)
    copies = api.chat([user(picture(same, "low"), "and", picture(again, "low"), "?")], **fields, cache_salt="copies")
    assert twice.text == copies.text
    assert image_tokens(twice) == 128
    assert api.chat([user(picture(same, "low"), "?")]).prompt_tokens < twice.prompt_tokens - 64


def test_case_59_a_request_twice(api: Api) -> None:
    conversation = [user(picture(scene_png(4), "high"), "What is on the table?")]
    first, second = (api.chat(conversation, cache_salt="mine") for _ in range(2))
    assert first.cached_tokens == 0
    assert second.cached_tokens > 320
    assert second.text == first.text
    other = api.chat(conversation, cache_salt="yours")
    assert other.cached_tokens == 0
    assert other.text == first.text
    assert api.chat(conversation).cached_tokens == 0
    for salt in ("a@b", "a/b", "a\\b", "x" * 129, ""):
        response = api.post({"messages": conversation, "cache_salt": salt, "max_tokens": 1})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "cache_salt")


def test_case_60_order_decides(api: Api) -> None:
    one, two = picture(scene_png(5), "low"), picture(scene_png(6), "low")
    fields = {"temperature": 1, "seed": 0, "max_tokens": 40, "ignore_eos": True}
    ab, ba = (api.chat([user(*pair, "Which is first?")], **fields) for pair in ((one, two), (two, one)))
    assert ab.text != ba.text
    assert ab.prompt_tokens == ba.prompt_tokens
    afresh = api.chat([user(two, one, "Which is first?")], **fields, cache_salt="afresh")
    assert (afresh.text, afresh.cached_tokens) == (ba.text, 0)


def test_case_60_batch_mates_never_exchange_pictures(api: Api, sabotaged: Api) -> None:
    """64 cards at once on one server, each compared with itself alone on another."""
    colours: list[RGB] = [(i % 4 * 80, i // 4 % 4 * 80, i // 16 * 80) for i in range(64)]

    def look(server: Api, colour: RGB) -> str:
        conversation = [user(picture(card(colour, (16, 16)), "low"), "Which colour?")]
        return server.chat(conversation, temperature=1, seed=2, max_tokens=24, ignore_eos=True).text

    with ThreadPoolExecutor(64) as pool:
        crowd = list(pool.map(lambda colour: look(api, colour), colours))
    assert len(set(crowd)) == 64
    for index in range(0, 64, 7):
        assert look(sabotaged, colours[index]) == crowd[index]


# --- files ---------------------------------------------------------------------------------------------------------

HALF_RED: RGB = (255, 127, 127)  # on white

PNGS: dict[str, tuple[bytes, RGB]] = {
    "RGBA, opaque": (encoded(Image.new("RGBA", (8, 8), (*RED, 255)), "PNG"), RED),
    "RGBA, clear": (encoded(Image.new("RGBA", (8, 8), (*RED, 0)), "PNG"), WHITE),
    "RGBA, half clear": (encoded(Image.new("RGBA", (8, 8), (*RED, 128)), "PNG"), HALF_RED),
    "LA": (encoded(Image.new("LA", (8, 8), (100, 255)), "PNG"), GREY),
    "palette": (palette_png(RED), RED),
    "palette, opaque by tRNS": (palette_png(RED, alpha=255), RED),
    "palette, clear by tRNS": (palette_png(RED, alpha=0), WHITE),
    "1 bit": (encoded(Image.new("1", (8, 8), 1), "PNG"), WHITE),
    "16-bit grey": (deep_png(100), GREY),
    "16-bit RGB": (deep_png(RED), RED),
    "interlaced": (interlaced_png(RED), RED),
}


@pytest.mark.parametrize(("file", "colour"), PNGS.values(), ids=PNGS)
def test_case_61_kinds_of_png(api: Api, file: bytes, colour: RGB) -> None:
    compared = Compared(api, card(colour))
    compared.is_shown_by(file)
    compared.is_not_shown_by(card(BLUE))


def test_case_61_sixteen_bits_are_scaled_and_not_clipped(api: Api) -> None:
    ramp = [0, 255, 256, 0x8080, 0xFFFF, 0x1234, 0x4321, 0xFEDC]
    deep = raw_png((8, 8), depth=16, colour=0, rows=[struct.pack(">8H", *ramp)] * 8)
    shallow = raw_png((8, 8), depth=8, colour=0, rows=[bytes(round(sample / 257) for sample in ramp)] * 8)
    Compared(api, shallow).is_shown_by(deep)


def profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


JPEGS: dict[str, tuple[bytes, RGB]] = {
    "CMYK": (cmyk_jpeg(RED), RED),
    "YCCK": (ycck_jpeg(RED), RED),
    "grey": (jpeg(Image.new("L", (16, 16), 100)), GREY),
    "progressive": (jpeg(Image.new("RGB", (16, 16), RED), progressive=True), RED),
    "with a profile": (jpeg(Image.new("RGB", (16, 16), RED), icc_profile=profile()), RED),
    "4:2:0": (jpeg(Image.new("RGB", (16, 16), RED), subsampling=2), RED),
}


@pytest.mark.parametrize(("file", "colour"), JPEGS.values(), ids=JPEGS)
def test_case_62_kinds_of_jpeg(api: Api, file: bytes, colour: RGB) -> None:
    seen = mean_colour(file)
    assert all(abs(got - wanted) <= 4 for got, wanted in zip(seen, colour, strict=True))
    compared = Compared(api, png_of(file))
    compared.is_shown_by(file)
    compared.is_not_shown_by(card(BLUE, (16, 16)))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_case_62_orientation_is_honoured(api: Api, orientation: int) -> None:
    file = turned_jpeg(scene(7), orientation)
    compared = Compared(api, upright_png(file, orientation))
    compared.is_shown_by(file)
    if orientation != 1:
        compared.is_not_shown_by(turned_jpeg(scene(7), 1))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_case_63_the_first_frame_of_an_animation(api: Api, file_format: str) -> None:
    compared = Compared(api, card(RED))
    compared.is_shown_by(animation(file_format, RED, BLUE))
    compared.is_not_shown_by(animation(file_format, BLUE, RED))


@pytest.mark.parametrize("file_format", ["BMP", "TIFF", "ICO", "PPM", "TGA", "JPEG2000", "AVIF"])
def test_case_63_formats_that_are_not_served(api: Api, file_format: str) -> None:
    error = refused(api, encoded(Image.new("RGB", (32, 32), RED), file_format), "invalid_image_format")
    assert all(served in error["message"].upper() for served in ("JPEG", "PNG", "WEBP", "GIF"))


def damaged_png() -> bytes:
    file = bytearray(scene_png(8))
    file[-20] ^= 0xFF  # in the checksum of the pixels, or close to it
    return bytes(file)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "a truncated JPEG": (jpeg(scene(8))[:-300], "image_parse_error"),
    "half a JPEG": (jpeg(scene(8))[:400], "image_parse_error"),
    "a truncated PNG": (scene_png(8)[:-100], "image_parse_error"),
    "a PNG with a bad checksum": (damaged_png(), "image_parse_error"),
    "a PNG's signature": (scene_png(8)[:8], "image_parse_error"),
    "a truncated WEBP": (encoded(scene(8), "WEBP")[:200], "image_parse_error"),
    "a truncated GIF": (encoded(scene(8), "GIF")[:200], "image_parse_error"),
    "three bytes of a JPEG": (b"\xff\xd8\xff", "image_parse_error"),
    "HTML": (b"<!DOCTYPE html><html><body>Not found</body></html>", "invalid_image_format"),
    "noise": (bytes(range(256)) * 4, "invalid_image_format"),
    "one byte": (b"\x89", "invalid_image_format"),
    "nothing": (b"", "empty_image_file"),
}


@pytest.mark.parametrize(("file", "code"), DAMAGED.values(), ids=DAMAGED)
def test_case_64_damaged_files(api: Api, file: bytes, code: str) -> None:
    for stream in (False, True):
        api.refuses_chat([user(picture(file))], code=code, param=URL, stream=stream)


FOREIGN = {
    "SVG": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n%%EOF",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/etc/passwd) (r) file\nshowpage\n%%EOF",
    "a URL": b"[InternetShortcut]\nURL=http://127.0.0.1/",
    "MVG": b"push graphic-context\nimage over 0,0 0,0 'https://127.0.0.1/x'\npop graphic-context",
}


def test_case_65_foreign_formats_start_no_program(api: Api) -> None:
    before = children(api.server.process.pid)
    assert before
    for file in FOREIGN.values():
        for kind in ("image/png", "image/svg+xml", "application/pdf", "image/heic"):
            refused(api, data_url(file, kind), "invalid_image_format")
    assert children(api.server.process.pid) == before  # nor has one crashed and been replaced


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 10000), (10000, 1), (379, 377), (980, 1), (3, 981)])
@pytest.mark.parametrize("detail", ["low", "high"])
def test_case_66_odd_sizes(api: Api, size: tuple[int, int], detail: str) -> None:
    told = api.chat([user(picture(card(RED, size), detail), "What?")], max_tokens=4, ignore_eos=True)
    assert told.completion_tokens == 4
    assert image_tokens(told) == (64 if detail == "low" else 320)


def with_text_bomb(chunk: bytes, head: bytes) -> bytes:
    """A small PNG with 128 MiB of compressed zeros beside its pixels."""
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(1 << 20)) for _ in range(128)) + packer.flush()
    file = card(RED)
    end_of_header = 8 + 25
    return file[:end_of_header] + png_chunk(chunk, head + body) + file[end_of_header:]


BOMBS: dict[str, tuple[bytes, str]] = {
    "PNG of 50,000 × 50,000": (huge_png(50_000, 50_000), "image_too_large"),
    "PNG of 2^31 - 1": (huge_png(2**31 - 1, 2**31 - 1), "image_too_large"),
    "PNG of 40,000,001 pixels": (huge_png(8001, 5000), "image_too_large"),
    "PNG, 20,000 × 1": (huge_png(20_000, 1), "image_too_large"),
    "GIF with a huge screen": (huge_gif(), "image_too_large"),
    "zTXt": (with_text_bomb(b"zTXt", b"Comment\0\0"), "image_parse_error"),
    "iTXt": (with_text_bomb(b"iTXt", b"Comment\0\1\0\0\0"), "image_parse_error"),
    "iCCP": (with_text_bomb(b"iCCP", b"sRGB\0\0"), "image_parse_error"),
}


@pytest.mark.parametrize(("file", "code"), BOMBS.values(), ids=BOMBS)
def test_case_67_bombs(api: Api, file: bytes, code: str) -> None:
    tells(api, card(RED), "warm")
    assert len(file) < 200_000
    before = resident_bytes(api.server.process.pid)
    started = time.monotonic()
    refused(api, file, code)
    assert time.monotonic() - started < 10
    assert resident_bytes(api.server.process.pid) - before < 48 << 20


# --- data URLs -----------------------------------------------------------------------------------------------------

CARD = scene_png(9, 40, 30)
PAYLOAD = base64.b64encode(CARD).decode()
assert {"+", "/"} & set(PAYLOAD)
assert PAYLOAD.endswith("=")


def in_lines(payload: str, end: str) -> str:
    return end.join(payload[start : start + 76] for start in range(0, len(payload), 76)) + end


GOOD_URLS = {
    "usual": f"data:image/png;base64,{PAYLOAD}",
    "upper case": f"DATA:IMAGE/PNG;BASE64,{PAYLOAD}",
    "parameters": f"data:image/png;charset=utf-8;base64,{PAYLOAD}",
    "parameters without a type": f"data:;name=x.png;base64,{PAYLOAD}",
    "no type": f"data:;base64,{PAYLOAD}",
    "another type": f"data:image/jpeg;base64,{PAYLOAD}",
    "any image": f"data:image/*;base64,{PAYLOAD}",
    "a type that is none": f"data:text/html;base64,{PAYLOAD}",
    "lines": f"data:image/png;base64,{in_lines(PAYLOAD, chr(13) + chr(10))}",
    "spaces": f"data:image/png;base64, {in_lines(PAYLOAD, ' ')}",
    "percent escapes": f"data:image/png;base64,{urllib.parse.quote(PAYLOAD, safe='')}",
    "no base64 at all": f"data:image/png,{urllib.parse.quote_from_bytes(CARD)}",
}
BAD_URLS = {
    "no comma": ("data:image/png;base64", "invalid_image_url"),
    "no comma, a payload": (f"data:image/png;base64;{PAYLOAD}", "invalid_image_url"),
    "only a scheme": ("data:", "invalid_image_url"),
    "nothing": ("data:,", "empty_image_file"),
    "nothing in base64": ("data:image/png;base64,", "empty_image_file"),
    "only padding": ("data:image/png;base64,====", "invalid_base64_image"),
    "the URL-safe alphabet": (
        f"data:image/png;base64,{base64.urlsafe_b64encode(CARD).decode()}",
        "invalid_base64_image",
    ),
    "padding missing": (f"data:image/png;base64,{PAYLOAD.rstrip('=')}", "invalid_base64_image"),
    "padding too long": (f"data:image/png;base64,{PAYLOAD}=", "invalid_base64_image"),
    "padding in the middle": (f"data:image/png;base64,{PAYLOAD}{PAYLOAD}", "invalid_base64_image"),
    "not the alphabet": ("data:image/png;base64,@@@@", "invalid_base64_image"),
    "beyond ASCII": ("data:image/png;base64,äöü=", "invalid_base64_image"),
    "a bad escape": ("data:image/png,%zz", "invalid_image_url"),
    "plain text": ("data:image/png,hello", "invalid_image_format"),
    "a NUL": ("data:image/png;base64,AA\x00AA", "invalid_base64_image"),
}


@pytest.mark.parametrize("url", GOOD_URLS.values(), ids=GOOD_URLS)
def test_case_68_data_urls_that_are_read(api: Api, url: str) -> None:
    Compared(api, CARD).is_shown_by(url)


@pytest.mark.parametrize(("url", "code"), BAD_URLS.values(), ids=BAD_URLS)
def test_case_68_data_urls_that_are_refused(api: Api, url: str, code: str) -> None:
    refused(api, url, code)


@pytest.mark.parametrize(
    "url",
    [
        PAYLOAD,
        "file:///etc/passwd",
        "ftp://example.com/x.png",
        "javascript:alert(1)",
        "blob:https://example.com/1",
        "gopher://example.com/",
        "../x.png",
        "/etc/passwd",
        "x.png",
        "",
        " ",
        "//example.com/x.png",
        "http:///x.png",
        "http://",
        "http:example.com",
        "https://exa mple.com/x",
        "http://example.com\\@10.0.0.1/",
        "http://example.com:99999/",
        "http://example.com:80:80/",
        "http://[::1",
        "http://example.com/\r\nHost: x",
        "http://" + "a" * 3_000_000,
        "x" * 3_000_000,
    ],
    ids=lambda url: url[:24] or "nothing",
)
def test_case_69_what_is_no_address_of_a_picture(api: Api, url: str) -> None:
    started = time.monotonic()
    error = refused(api, url, "invalid_image_url")
    assert time.monotonic() - started < 5
    assert "passwd" not in error["message"]
    assert "aaaa" not in error["message"]


def test_case_69_urls_of_another_type(api: Api) -> None:
    values: list[Any] = [3, True, [], {}]
    for value in values:
        part = {"type": "image_url", "image_url": {"url": value}}
        api.refuses_chat([user(part)], code="invalid_type", param=URL)
    missing = {"type": "image_url", "image_url": {"url": None}}
    api.refuses_chat([user(missing)], code="missing_required_parameter", param=URL)
    for value in values[:3]:
        part = {"type": "image_url", "image_url": value}
        api.refuses_chat([user(part)], code="invalid_type", param="messages[0].content[0].image_url")


# --- addresses -----------------------------------------------------------------------------------------------------
# By `sabotaged`, whose one difference to a plain server is that 127.0.0.2 counts as a public address.

PRIVATE = (
    *("127.0.0.1", "localhost", "localhost.", "LOCALHOST", "127.1", "2130706433", "0x7f.1", "0x7f000001"),
    *("017700000001", "0177.0.0.1", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[0:0:0:0:0:ffff:7f00:1]", "0.0.0.0", "0"),
    *("169.254.169.254", "[fe80::1]", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "[fc00::1]"),
    *("[64:ff9b::7f00:1]", "[2002:7f00:1::]", "224.0.0.1", "255.255.255.255", "inside.example", "mixed.example"),
    *("cloud.example", "user@127.0.0.1", "user:pass@pictures.example", "pictures.example@127.0.0.1"),
    *("127.0.0.1%2f@pictures.example", "①②⑦.⓪.⓪.①", "127。0。0。1", "[::1%25lo]", "127.0.0.2@127.0.0.1"),
)


@pytest.mark.parametrize("host", PRIVATE)
def test_case_70_private_addresses_are_not_even_dialled(sabotaged: Api, host: str) -> None:
    with web({"/x.png": answer(CARD)}, host=INSIDE) as inside:
        error = refused(sabotaged, f"http://{host}:{inside.port}/x.png", "invalid_image_url")
        assert inside.connections == 0
    assert host not in error["message"]


def test_case_70_only_the_ports_of_the_web(api: Api) -> None:
    for url in ("http://93.184.216.34:8080/x.png", "https://93.184.216.34:22/", "http://127.0.0.2/x.png"):
        refused(api, url, "invalid_image_url")


def test_case_71_redirects(sabotaged: Api) -> None:
    trap: dict[str, Handler] = {"/x.png": answer(CARD)}
    with web(trap, host=INSIDE) as inside:
        handlers: dict[str, Handler] = {
            "/x.png": answer(CARD),
            "/1": redirect("/x.png"),
            "/2": redirect("/1", status="307 Temporary Redirect"),
            "/3": redirect("/2", status="301 Moved Permanently"),
            "/4": redirect("/3"),
            "/loop": redirect("/loop"),
            "/inside": redirect(f"http://{INSIDE}:{inside.port}/x.png"),
            "/by-name": redirect(f"http://inside.example:{inside.port}/x.png"),
            "/user": redirect(f"http://user@{PUBLIC}/x.png"),
            "/file": redirect("file:///etc/passwd"),
            "/data": redirect(data_url(CARD)),
            "/cloud": redirect("//169.254.169.254/latest/meta-data"),
        }
        with web(handlers) as pictures:
            base = f"http://pictures.example:{pictures.port}"
            compared = Compared(sabotaged, CARD)
            for path in ("/x.png", "/1", "/2", "/3"):
                compared.is_shown_by(base + path)
            for path in ("/inside", "/by-name", "/user", "/file", "/data", "/cloud"):
                refused(sabotaged, base + path, "invalid_image_url")
            for path in ("/4", "/loop"):
                before = pictures.connections
                refused(sabotaged, base + path, "failed_to_download_image")
                assert pictures.connections == before + 4
        assert inside.connections == 0


@pytest.mark.parametrize(
    ("path", "handler"),
    [
        ("/404", answer(b"Not found", status="404 Not Found")),
        ("/401", answer(status="401 Unauthorized", headers=('WWW-Authenticate: Basic realm="x"',))),
        ("/429", answer(status="429 Too Many Requests", headers=("Retry-After: 1",))),
        ("/500", answer(CARD, status="500 Internal Server Error")),
        ("/503", answer(status="503 Service Unavailable", headers=("Retry-After: 0",))),
        ("/204", answer(status="204 No Content", length=-1)),
        ("/206", answer(CARD, status="206 Partial Content")),
        ("/no-location", answer(status="302 Found")),
        ("/no-http", raw(b"SSH-2.0-OpenSSH_9.6\r\n")),
    ],
)
def test_case_72_a_host_that_has_no_picture(sabotaged: Api, path: str, handler: Handler) -> None:
    with web({path: handler}) as pictures:
        url = f"http://pictures.example:{pictures.port}{path}"
        refused(sabotaged, url, "failed_to_download_image")
        assert pictures.connections == 1  # nobody tries again but the client, if it likes


def test_case_72_a_host_that_cannot_be_reached(sabotaged: Api, api: Api) -> None:
    with web({"/": answer(CARD)}) as pictures:
        port = pictures.port
        refused(sabotaged, f"https://pictures.example:{port}/", "failed_to_download_image")  # which speaks no TLS
        assert pictures.connections == 1
    refused(sabotaged, f"http://pictures.example:{port}/", "failed_to_download_image")  # nobody listens any more
    for server in (sabotaged, api):
        error = refused(server, "http://nothing.invalid/x.png", "failed_to_download_image")
        assert "invalid/" not in error["message"]


SLOW: dict[str, tuple[Handler, str]] = {
    "never answers": (raw(b""), "failed_to_download_image"),
    "one byte at a time": (
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", b"x", pause=0.2, endless=True),
        "failed_to_download_image",
    ),
    "headers without an end": (
        raw(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n", pause=0.05, endless=True),
        "failed_to_download_image",
    ),
    "a body without an end": (raw(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536, endless=True), "image_file_too_large"),
    "a length far too large": (
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", b"x" * 65536, endless=True),
        "image_file_too_large",
    ),
    "less than it says": (answer(CARD[:-9], length=len(CARD)), "failed_to_download_image"),
    "more than it says": (answer(CARD, length=len(CARD) - 40), "image_parse_error"),
    "a gzip bomb": (
        answer(zlib.compress(bytes(50 << 20), 9, 31), headers=("Content-Encoding: gzip",)),
        "failed_to_download_image",
    ),
    "bad chunks": (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "failed_to_download_image"),
    "nothing": (answer(b""), "empty_image_file"),
}


@pytest.mark.parametrize(("handler", "code"), SLOW.values(), ids=SLOW)
def test_case_73_a_host_that_is_slow_or_lies(sabotaged: Api, handler: Handler, code: str) -> None:
    """The server gives a picture one second; nobody else waits for it, and what it held is let go of."""
    whole = sabotaged.chat("Meanwhile", max_tokens=20, ignore_eos=True).text
    before = resident_bytes(sabotaged.server.process.pid)
    with web({"/x.png": handler}) as pictures, ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        url = f"http://pictures.example:{pictures.port}/x.png"
        waiting = pool.submit(refused, sabotaged, url, code)
        first = sabotaged.stream("Meanwhile", max_tokens=20, ignore_eos=True)
        assert first.text() == whole
        waiting.result(10)
        assert time.monotonic() - started < 5
    assert pictures.connections == 1
    assert resident_bytes(sabotaged.server.process.pid) - before < 48 << 20


def test_case_74_one_url_is_fetched_once_a_request(sabotaged: Api) -> None:
    with web({"/x.png": answer(CARD)}) as pictures:
        part = picture(f"http://pictures.example:{pictures.port}/x.png", "low")
        told = sabotaged.chat([user(*[part] * 20)])
        assert image_tokens(told) == 64 * 20
        assert pictures.connections == 1
        assert sabotaged.chat([user(*[picture(CARD, "low")] * 20)]).texts == told.texts


def test_case_74_what_a_url_leads_to_may_change(sabotaged: Api) -> None:
    shown = [card(RED)]

    async def handle(seen: Seen, writer: Any) -> None:
        await answer(shown[0])(seen, writer)

    with web({"/x.png": handle}) as pictures:
        url = f"http://pictures.example:{pictures.port}/x.png"
        for file, other in ((card(RED), card(BLUE)), (card(BLUE), card(RED))):
            shown[0] = file
            compared = Compared(sabotaged, file)
            compared.is_shown_by(url)
            shown[0] = other
            compared.is_not_shown_by(url)


# --- where pictures may stand --------------------------------------------------------------------------------------


def test_case_75_only_users_have_pictures(api: Api) -> None:
    part = picture(card(RED))
    for role in ("system", "developer", "assistant", "tool", "function"):
        message = {"role": role, "content": [text("x"), part], "tool_call_id": "1", "name": "f"}
        api.refuses_chat([user("x"), message], code="invalid_value", param="messages[1].content[1]")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": "data:,"}},
        {"type": "video_url", "video_url": {"url": "data:,"}},
        {"type": "file", "file": {"file_id": "f"}},
        {"type": "input_file", "file_id": "f"},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "audio_embeds", "audio_embeds": "AAAA"},
        {"type": "prompt_embeds", "prompt_embeds": "AAAA"},
        {"type": "image_pil", "image_pil": "AAAA"},
        {"type": "TEXT", "text": "x"},
    ],
    ids=lambda part: part["type"],
)
def test_case_75_parts_that_are_not_served(api: Api, part: Json) -> None:
    api.refuses_chat(
        [user("x"), {"role": "assistant", "content": "y"}, user("z", part)],
        code="unsupported_value",
        param="messages[2].content[1].type",
    )


def test_case_76_a_uuid_is_not_believed(api: Api) -> None:
    salt = uuid.uuid4().hex

    def look(file: bytes) -> Answer:
        part = picture(file, "low") | {"uuid": "the same"}
        return api.chat([user(part, "What?")], cache_salt=salt, temperature=1, seed=1, max_tokens=16)

    red, blue, red_again = look(card(RED)), look(card(BLUE)), look(card(RED))
    assert red.text != blue.text
    assert red.text == red_again.text
    assert (blue.cached_tokens, red_again.cached_tokens >= 64) == (0, True)
    part = {"type": "image_url", "image_url": None, "uuid": "the same"}
    api.refuses_chat([user(part)], code="missing_required_parameter", param="messages[0].content[0].image_url")


# --- tokens and metrics --------------------------------------------------------------------------------------------


def tokenized(api: Api, body: Json) -> Json:
    response = api.post(body, path="/tokenize")
    assert response.status_code == 200, response.text
    tokens: Json = response.json()
    assert tokens["count"] == len(tokens["tokens"])
    return tokens


@pytest.mark.parametrize(
    "messages",
    [
        [user("Hi")],
        [user("")],
        [user(picture(card(RED), "low"), "What?")],
        [user(picture(card(RED), "high"), "What?")],
        [user("A", picture(card(RED), "low"), "B", picture(card(BLUE), "high"), "C")],
        [user(picture(card(RED), "low"), picture(card(BLUE), "low"))],
        [user(picture(card(RED), "high"), picture(card(BLUE)), picture(card(BLUE), "low"), "three")],
        [user("x <image> y", picture(card(RED), "low")), {"role": "assistant", "content": "</s>"}, user("z")],
    ],
    ids=["text", "nothing", "one", "one, split", "two", "two adjacent", "three adjacent", "a conversation"],
)
def test_case_77_tokenize_counts_as_the_answer_does(api: Api, messages: list[Json]) -> None:
    answered = api.chat(messages, max_tokens=1, return_token_ids=True)
    tokens = tokenized(api, {"messages": messages})
    assert tokens["count"] == answered.prompt_tokens
    assert tokens["tokens"] == answered.body["prompt_token_ids"]
    assert tokens["tokens"].count(32001) == image_tokens(answered)
    assert tokens["max_model_len"] == 4096


def test_case_77_tokenize_and_back(api: Api) -> None:
    for content in ("Hello, world", "東京 😀", "a\nb", "<image> </s>"):
        tokens = tokenized(api, {"prompt": content})
        assert tokens["tokens"][0] == 1
        bare = tokenized(api, {"prompt": content, "add_special_tokens": False})
        assert tokens["tokens"][1:] == bare["tokens"]
        assert 32001 not in bare["tokens"]
        assert 2 not in bare["tokens"]
        response = api.post({"tokens": bare["tokens"]}, path="/detokenize")
        assert response.json()["prompt"] == content
    api.refuses({}, path="/tokenize", code="missing_required_parameter", param="prompt")
    api.refuses({"tokens": [99999999]}, path="/detokenize", code="invalid_value", param="tokens[0]")
    api.refuses({"tokens": "x"}, path="/detokenize", code="invalid_type", param="tokens")


def test_case_78_a_mixed_batch_is_its_parts(api: Api) -> None:
    pictures = [picture(scene_png(20 + index), "low") for index in range(8)]
    long: Json = {"max_tokens": 30, "ignore_eos": True}
    requests: list[tuple[list[Json], Json]] = []
    for index in range(4):
        requests += [
            ([user(f"Text {index}")], long),
            ([user(pictures[index], f"One {index}")], long),
            ([user(*pictures[: 8 - index], f"Many {index}")], long),
            ([user(pictures[7 - index], f"Four {index}")], {**long, "n": 4, "temperature": 1, "seed": index}),
        ]
    stop = threading.Event()

    def abort_some() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            body = {
                "messages": [user(pictures[number % 8], f"Aborted {number}")],
                "max_tokens": 2000,
                "ignore_eos": True,
            }
            try:
                httpx.post(f"{api.server.base_url}/v1/chat/completions", json=body, timeout=0.2)
            except httpx.TimeoutException:
                continue

    aborter = threading.Thread(target=abort_some)
    aborter.start()
    try:
        crowd = api.all_at_once(requests)
    finally:
        stop.set()
        aborter.join()
    api.server.wait_until_idle()
    for (conversation, fields), together in zip(requests, crowd, strict=True):
        assert api.chat(conversation, **fields).texts == together.texts


COMPATIBLE = {
    "gauge": (
        *("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc"),
        *("lora_requests_info", "cache_config_info"),
    ),
    "counter": (
        *("prompt_tokens", "generation_tokens", "prompt_tokens_cached", "prefix_cache_queries", "prefix_cache_hits"),
        *("mm_cache_queries", "mm_cache_hits", "num_preemptions", "request_success", "admission_rejections"),
    ),
    "histogram": (
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
        *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds"),
        *("request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens"),
        *("request_generation_tokens", "request_params_max_tokens", "request_params_n", "iteration_tokens_total"),
    ),
}
OURS = (
    *("image_fetch_seconds", "image_decode_seconds", "image_preprocess_seconds", "image_encode_seconds", "images"),
    *("image_errors", "images_per_request", "http_requests", "kv_cache_usage_perc", "num_requests_running"),
)


def families(api: Api) -> dict[str, Any]:
    response = api.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def counters(api: Api) -> dict[tuple[str, str], float]:
    """Everything that may only grow, by name and labels."""
    grown = {}
    for family in families(api).values():
        for sample in family.samples:
            if family.type == "counter" or (family.type == "histogram" and not sample.name.endswith("_created")):
                grown[sample.name, json.dumps(sample.labels, sort_keys=True)] = sample.value
    return grown


def test_case_79_metrics_have_the_names_that_dashboards_know(api: Api) -> None:
    api.chat([user(picture(card(RED)), "x")])
    found = families(api)
    for kind, names in COMPATIBLE.items():
        for name in names:
            family = found[f"vllm:{name}"]
            assert family.type == kind, name
            assert all(
                sample.labels["model_name"] == "tiny" for sample in family.samples if "model_name" in sample.labels
            )
    for name in OURS:
        assert f"idefics2:{name}" in found, name
    (config,) = [s for s in found["vllm:cache_config_info"].samples if not s.name.endswith("_created")]
    assert int(config.labels["block_size"]) == 16
    assert int(config.labels["num_gpu_blocks"]) > 0
    assert {s.labels["engine"] for s in found["vllm:num_requests_running"].samples} == {"0"}


def test_case_79_counters_only_grow_and_count_right(api: Api) -> None:
    before = counters(api)
    answered = api.chat([user(picture(scene_png(50), "high"), "Count me")], max_tokens=9, ignore_eos=True)
    api.post(b"{")
    refused(api, b"", "empty_image_file")
    after = counters(api)
    assert all(after[key] >= value for key, value in before.items())

    def grown(name: str, **labels: str) -> float:
        return sum(
            value - before.get(key, 0)
            for key, value in after.items()
            if key[0] == name and labels.items() <= json.loads(key[1]).items()
        )

    for prefix in ("vllm:", "idefics2:"):
        assert grown(f"{prefix}generation_tokens_total") == 9
        assert grown(f"{prefix}prompt_tokens_total") == answered.prompt_tokens
    assert grown("vllm:request_success_total", finished_reason="length") == 1
    assert grown("vllm:e2e_request_latency_seconds_count") == 1
    assert grown("vllm:inter_token_latency_seconds_count") == 8
    assert grown("idefics2:image_errors_total", code="empty_image_file") == 1
    assert grown("idefics2:images_total") == 1
    assert grown("idefics2:http_requests_total", status="400") == 2


def test_case_79_scraping_is_not_felt(api: Api) -> None:
    """20 times a second, under load: quick, and the streams are as before."""
    requests: list[tuple[str, Json]] = [(f"Load {i}", {"max_tokens": 150, "ignore_eos": True}) for i in range(8)]
    alone = [answered.text for answered in api.all_at_once(requests)]
    started = time.monotonic()
    api.all_at_once(requests)
    without = time.monotonic() - started
    times: list[float] = []
    done = threading.Event()

    def scrape() -> None:
        while not done.is_set():
            begin = time.monotonic()
            assert api.http.get("/metrics").status_code == 200
            times.append(time.monotonic() - begin)
            done.wait(0.05)

    scraper = threading.Thread(target=scrape)
    scraper.start()
    started = time.monotonic()
    try:
        crowd = api.all_at_once(requests)
    finally:
        scraped = time.monotonic() - started
        done.set()
        scraper.join()
    assert [answered.text for answered in crowd] == alone
    assert len(times) >= 3
    assert sorted(times)[len(times) // 2] < 0.2
    assert scraped < 3 * without + 1


def test_case_79_metrics_name_no_user(api: Api) -> None:
    secret = "who-am-i-4711"
    api.post({"messages": [user(secret)], "user": secret, "max_tokens": 1}, headers={"x-request-id": secret})
    api.get(f"/v1/models/{secret}")
    api.get(f"/{secret}")
    check_error(api.send("PURGE", f"/{secret}"), status=404, code="not_found", param=None)
    assert secret not in api.get("/metrics").text
