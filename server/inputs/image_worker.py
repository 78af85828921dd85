"""A process that decodes and resizes images: `python -m server.inputs.image_worker MEMORY_BYTES`.

Hostile files are opened here and nowhere else, so that a decoder that hangs, crashes or eats memory costs one
process and one image. Reads jobs from stdin and writes replies to stdout, one at a time, until stdin closes.

A frame is four bytes of length (big-endian) and a msgpack message.
    in:  frame(Job), then `data_length` bytes, the image file
    out: frame(Reply), then the pixels of each of its tiles in order; first of all an empty Reply, for "ready"

A hostile file may take this process over, so the parent believes nothing that it can check, and names tiles itself.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Sequence
from typing import BinaryIO

import msgspec
from PIL import Image

from server import sandbox
from server.errors import ClientError
from server.inputs.image_decode import decode_rgb
from server.inputs.image_processor import cut_and_resize
from server.types import ImageSettings


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One image file to turn into tiles; `data_length` is its size in bytes."""

    data_length: int
    split: bool
    max_pixels: int
    settings: ImageSettings


class TileSize(msgspec.Struct, frozen=True):
    """A tile without its pixels, of which there are height × width × 3 bytes."""

    height: int
    width: int


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """Tiles and what they took, or the code and message of the error that the client gets instead.

    `decode_seconds` are those from the file to upright pixels, `preprocess_seconds` those from there to tiles.
    """

    tiles: tuple[TileSize, ...] = ()
    decode_seconds: float = 0.0
    preprocess_seconds: float = 0.0
    code: str | None = None
    message: str = ""


def main() -> None:
    """Serve until stdin closes."""
    replies = sandbox.enter()
    _widen_pipe(replies.fileno())
    sandbox.limit_memory(int(sys.argv[1]))
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        _send(replies, Reply(), ())
        _serve(sys.stdin.buffer, replies)


def _serve(jobs: BinaryIO, replies: BinaryIO) -> None:
    gc.freeze()
    while _serve_one(jobs, replies):
        # Pillow's files refer to themselves, and would keep their pixels until the next collection. The reply is out,
        # and what was there at the start is frozen, so this costs nobody anything.
        gc.collect()


def _serve_one(jobs: BinaryIO, replies: BinaryIO) -> bool:
    """False at the end of the input, which may come in mid-sentence if the parent dies."""
    length = jobs.read(4)
    if not length:
        return False
    job = msgspec.msgpack.decode(jobs.read(int.from_bytes(length, "big")), type=Job)
    data = jobs.read(job.data_length)
    if len(data) < job.data_length:
        return False
    reply, pictures = _answer(job, data)
    _send(replies, reply, pictures)
    return True


def _answer(job: Job, data: bytes) -> tuple[Reply, list[Image.Image]]:
    # Pillow's own bomb check, a second wall behind ours, also looks at crops; by default it is stricter than what
    # a server may allow.
    Image.MAX_IMAGE_PIXELS = job.max_pixels
    started = time.perf_counter()
    try:
        image = decode_rgb(data, max_pixels=job.max_pixels)
        decoded = time.perf_counter()
        pictures = cut_and_resize(image, split=job.split, settings=job.settings)
    except ClientError as error:
        return Reply(code=error.code, message=error.message), []
    except MemoryError:
        return Reply(code="image_too_large", message="the image needs more memory than one image may take"), []
    reply = Reply(
        tiles=tuple(TileSize(picture.height, picture.width) for picture in pictures),
        decode_seconds=decoded - started,
        preprocess_seconds=time.perf_counter() - decoded,
    )
    return reply, pictures


def _send(replies: BinaryIO, reply: Reply, pictures: Sequence[Image.Image]) -> None:
    message = msgspec.msgpack.encode(reply)
    replies.write(len(message).to_bytes(4, "big") + message)
    for picture in pictures:
        replies.write(picture.tobytes())
    replies.flush()


def _widen_pipe(descriptor: int) -> None:
    """A tile is up to 2.9 MB and a pipe holds 64 KiB: with 1 MiB the parent wakes up far less often."""
    if sys.platform == "linux":
        import fcntl

        with contextlib.suppress(OSError):  # the user's pipe quota is spent; slower, not wrong
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, 1 << 20)


if __name__ == "__main__":
    main()
