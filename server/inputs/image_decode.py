"""From the bytes of an image file to RGB pixels, or to a typed error. Runs inside an image worker.

Four formats, told apart by their first bytes and never by a declared type. Sizes are checked before pixels are
decoded. Messages are constants: what a decoder says about a hostile file may hold addresses or paths.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from server.errors import ClientError

MAX_SIDE = 16384

_EXIF_ORIENTATION = 0x0112
# What undoes each EXIF orientation; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE = (255, 255, 255)


def decode_rgb(data: bytes, *, max_pixels: int) -> Image.Image:
    """The first frame of a JPEG, PNG, WEBP or GIF file as an upright RGB image on white.

    Raises ClientError: `empty_image_file`, `invalid_image_format` (another type), `image_too_large` (more than
    `max_pixels`, or a side over MAX_SIDE), `image_parse_error` (truncated or corrupt). Colour profiles are ignored.
    """
    if not data:
        raise ClientError("the image file is empty", code="empty_image_file")
    open_file = _opener(data)
    if open_file is None:
        raise ClientError("the image must be a JPEG, PNG, WEBP or GIF file", code="invalid_image_format")
    try:
        with warnings.catch_warnings():
            # Pillow also warns about odd metadata, which costs a picture nothing; only its bomb warning counts.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = open_file(io.BytesIO(data))
            _check_size(image.width, image.height, max_pixels)
            return _load_rgb(image)
    except ClientError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError, MemoryError):
        # Pillow met a size before we could read it (a WEBP canvas, a GIF frame beyond its screen), or the worker's
        # memory limit was hit.
        raise _too_large(f"the image has too many pixels: the limit is {max_pixels}") from None
    except Exception:  # a decoder that is fed garbage may raise anything; all of it means one thing to the client
        raise ClientError("the image file is truncated or corrupt", code="image_parse_error") from None


def _opener(data: bytes) -> Callable[[io.BytesIO], ImageFile] | None:
    """The plugin for the file's first bytes. Calling it directly keeps every other decoder out of reach."""
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImageFile
    return None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise _too_large(f"the image is {width} x {height}: a side may have at most {MAX_SIDE} pixels")
    if width * height > max_pixels:
        raise _too_large(
            f"the image is {width} x {height}, {width * height} pixels in all: the limit is {max_pixels} pixels"
        )


def _too_large(message: str) -> ClientError:
    return ClientError(message, code="image_too_large")


def _load_rgb(image: ImageFile) -> Image.Image:
    raw_mode = image.tile[0].args if image.tile else None  # gone once the pixels are loaded
    image.load()
    _rescale_colour_key(image, raw_mode)
    rgb = _to_rgb(image)
    turn = _UPRIGHT.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _rescale_colour_key(image: Image.Image, raw_mode: object) -> None:
    """Bring a PNG's transparent colour to the depth of the loaded samples, which Pillow does only for some depths."""
    key = image.info.get("transparency")
    if isinstance(key, int) and raw_mode == "L;2":
        image.info["transparency"] = key * 85  # 0..3 to 0..255
    elif isinstance(key, int) and raw_mode == "L;4":
        image.info["transparency"] = key * 17  # 0..15 to 0..255
    elif isinstance(key, tuple) and raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(sample >> 8 for sample in key)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB on white, from any mode that the four formats decode to."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _wide_grey_to_rgb(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    return _on_white(rgba, rgba.getchannel("A"))


def _wide_grey_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit grey, scaled by 1/257 so that 65535 is white; Pillow's own conversion clips everything over 255."""
    wide = image.convert("I")
    grey = wide.point([(sample + 128) // 257 for sample in range(1 << 16)], "L")
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return grey.convert("RGB")
    return _on_white(grey, wide.point([0 if sample == key else 255 for sample in range(1 << 16)], "L"))


def _on_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, _WHITE)
    white.paste(image, mask=alpha)
    return white


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 if there is none. Metadata that cannot be read is no reason to refuse the picture."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1
