"""From a data URL to the bytes of an image file: its own parser, in slices, which stops at the limit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from urllib.parse import unquote_to_bytes

import pybase64

from server.errors import ClientError

_MAX_HEAD = 8192  # characters before the comma
_WHITESPACE = " \t\n\r\f"
_BAD_ESCAPE = re.compile(rb"%(?![0-9a-fA-F]{2})")
_SLICE = 256 << 10  # decoding holds the interpreter lock: in slices, other threads get their turn


def is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


def parse_data_url(url: str, *, max_bytes: int, param: str) -> bytes:
    """The bytes in a data URL, never empty and at most `max_bytes` long; what it says about their type is ignored.

    Takes tens of milliseconds for a large URL: call it in a thread. Raises ClientError with `param`:
    `invalid_image_url` (not a data URL, or a bad percent escape), `invalid_base64_image` (alphabet or padding),
    `image_file_too_large`, `empty_image_file`.
    """
    try:
        return _data_url_bytes(url, max_bytes)
    except ClientError as error:
        error.param = param
        raise


def _data_url_bytes(url: str, max_bytes: int) -> bytes:
    comma = url.find(",", 0, _MAX_HEAD)
    if not is_data_url(url) or comma < 0:
        raise _invalid("the image URL is not a data URL of the form data:[type][;base64],data")
    start = comma + 1
    _, *parameters = url[5:comma].lower().split(";")
    is_base64 = any(parameter.strip() == "base64" for parameter in parameters)
    pieces = _unescaped(url, start)
    try:
        data = _joined(_from_base64(pieces) if is_base64 else pieces, max_bytes)
    except ValueError:  # characters outside ASCII, outside the alphabet, or bad padding
        if not is_base64:
            raise _invalid("the data URL holds characters that must be percent-encoded") from None
        raise ClientError("the data URL is not valid base64", code="invalid_base64_image") from None
    if not data:
        raise ClientError("the image file is empty", code="empty_image_file")
    return data


def _joined(pieces: Iterable[bytes], max_bytes: int) -> bytes:
    """All pieces. Raises ClientError once they are too many bytes, and leaves the rest as it is."""
    joined = bytearray()
    for piece in pieces:
        joined += piece
        if len(joined) > max_bytes:
            raise ClientError(
                f"the image file is larger than the limit of {max_bytes} bytes", code="image_file_too_large"
            )
    return bytes(joined)


def _unescaped(url: str, start: int) -> Iterator[bytes]:
    """The bytes of `url` from `start` on, percent escapes undone. Raises ClientError, or ValueError if not ASCII."""
    held = b""
    for position in range(start, len(url), _SLICE):
        piece = held + url[position : position + _SLICE].encode("ascii")
        held = b""
        split_escape = piece.rfind(b"%", len(piece) - 2) if position + _SLICE < len(url) else -1
        if split_escape >= 0:
            piece, held = piece[:split_escape], piece[split_escape:]
        if b"%" in piece:
            if _BAD_ESCAPE.search(piece):
                raise _invalid("the data URL holds a malformed percent escape")
            piece = unquote_to_bytes(piece)
        yield piece


def _from_base64(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Raises ValueError for anything but the standard alphabet, ASCII whitespace and exact padding at the end."""
    held = b""
    ended = False
    for piece in pieces:
        symbols = held + piece.translate(None, _WHITESPACE.encode())
        whole = len(symbols) // 4 * 4
        symbols, held = symbols[:whole], symbols[whole:]
        if ended and symbols:
            raise ValueError("data after padding")
        yield pybase64.b64decode(symbols, validate=True)
        ended = ended or symbols.endswith(b"=")
    if held:
        raise ValueError("not a multiple of four symbols")


def _invalid(message: str) -> ClientError:
    return ClientError(message, code="invalid_image_url")
