from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

from server.chat import images
from server.chat.errors import ChatError
from server.chat.images import find_picture

HEADS = {
    "image/jpeg": b"\xff\xd8\xff\xe0 rest",
    "image/png": b"\x89PNG\r\n\x1a\n rest",
    "image/webp": b"RIFF\x10\x00\x00\x00WEBPVP8 ",
    "image/gif": b"GIF89a rest",
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_type_is_that_of_the_bytes_whatever_the_name(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "picture.txt"
    file.write_bytes(HEADS[kind])
    picture = find_picture(str(file), "high")
    assert picture.url == f"data:{kind};base64,{base64.b64encode(HEADS[kind]).decode()}"
    assert picture.part() == {"type": "image_url", "image_url": {"url": picture.url, "detail": "high"}}
    assert str(picture) == f"picture.txt (detail high, {len(HEADS[kind])} bytes)"


def test_the_detail_auto_is_not_sent() -> None:
    assert find_picture("http://a/b").part() == {"type": "image_url", "image_url": {"url": "http://a/b"}}


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.png").write_bytes(HEADS["image/png"])
    assert find_picture("~/a b.png").name == "a b.png"


@pytest.mark.parametrize("url", ["http://a/b.png", "HTTPS://a/b", "data:image/png;base64,aaaa"])
def test_addresses_are_the_servers_business(url: str) -> None:
    picture = find_picture(url)
    assert picture.url == url
    assert picture.size is None


def test_a_long_address_is_cut_only_for_the_eye() -> None:
    url = "http://a/" + "b" * 1000
    picture = find_picture(url)
    assert picture.url == url
    assert len(picture.name) == 60


def test_what_cannot_be_sent_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 1 << 20)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "large.png").write_bytes(HEADS["image/png"] + bytes(2 << 20))
    (tmp_path / "edge.png").write_bytes(HEADS["image/png"].ljust(1 << 20))
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in {
        "missing.png": "cannot read {}: No such file or directory",
        "": "{} is a folder",
        "pipe.png": "{} is not a regular file",
        "empty.png": "{} is empty",
        "text.png": "{} is not a JPEG, PNG, WebP or GIF file",
        "large.png": "{} is too large: 2.0 MiB, the limit is 1.0 MiB",
        "a\0b": "cannot read {}: embedded null byte",
    }.items():
        place = str(tmp_path / name)
        with pytest.raises(ChatError) as caught:
            find_picture(place)
        assert str(caught.value) == message.format(place)
    assert find_picture(str(tmp_path / "edge.png")).size == 1 << 20


def test_a_detail_that_is_none_is_refused() -> None:
    with pytest.raises(ChatError, match="detail must be one of auto, low, high, not 'max'"):
        find_picture("http://a/b", "max")
