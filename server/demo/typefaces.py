"""Typefaces for drawn text, from packages that ship them: those to train with, and others to be judged by.

Needs the extra `train`.
"""

from __future__ import annotations

import functools
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import ImageFont

from server.errors import ConfigError

Font = ImageFont.FreeTypeFont

_STYLES = ("Regular", "Bold", "It", "Italic", "Medium", "Semibold", "SemiBold")
_FILES = {
    "font_roboto": ("files", "Roboto"),
    "font_source_sans_pro": ("files", "SourceSansPro"),
    "font_source_serif_pro": ("files", "SourceSerifPro"),
    "font_hanken_grotesk": ("files", "HankenGrotesk"),
    "font_manrope": ("files", "Manrope"),
    "font_caladea": ("files", "Caladea"),
}
_MATPLOTLIB = "matplotlib/mpl-data/fonts/ttf"
_DEJAVU = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold")
_STIX = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic")

# A name is "package:file" or "pymupdf_fonts:key"; a family is on one side only.
TRAINING_PACKAGES = ("font_roboto", "font_source_sans_pro", "font_source_serif_pro")
TRAINING_KEYS = (
    *("figo", "figbo", "figit", "fimo", "fimbo", "notos", "notosbo", "notosit"),
    *("spacemo", "spacembo", "cascadia", "cascadiab"),
)
HELD_OUT_PACKAGES = ("font_hanken_grotesk", "font_manrope", "font_caladea")
HELD_OUT_KEYS = ("ubuntu", "ubuntubo", "ubuntm")


def training_typefaces() -> Sequence[str]:
    """Names of the typefaces that pictures to learn from are drawn with. Raises ConfigError without the extra."""
    matplotlib = [f"matplotlib:{name}" for name in (*_DEJAVU, *_STIX)]
    return (*_in_packages(TRAINING_PACKAGES), *matplotlib, *(f"pymupdf_fonts:{key}" for key in TRAINING_KEYS))


def held_out_typefaces() -> Sequence[str]:
    """Names of those that training never sees, for measuring what was learnt. Raises ConfigError without the extra."""
    return (*_in_packages(HELD_OUT_PACKAGES), *(f"pymupdf_fonts:{key}" for key in HELD_OUT_KEYS))


def _in_packages(packages: Sequence[str]) -> list[str]:
    names = []
    for package in packages:
        folder, family = _FILES[package]
        files = {file.stem: file for file in sorted((_root(package) / folder).iterdir()) if file.suffix in _SUFFIXES}
        names += [f"{package}:{stem}" for style in _STYLES if (stem := f"{family}-{style}") in files]
    return names


_SUFFIXES = (".ttf", ".otf")


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"drawing pictures needs the package {package}: pip install 'idefics2-server[train]'")
    return Path(spec.submodule_search_locations[0])


@functools.lru_cache(maxsize=4096)
def load_font(name: str, size: int) -> Font:
    """The typeface `name` at `size` pixels an em."""
    return ImageFont.truetype(io.BytesIO(_content(name)), size)


@functools.cache
def _content(name: str) -> bytes:
    package, _, face = name.partition(":")
    root = _root(package)
    if package == "pymupdf_fonts":
        import pymupdf_fonts

        content: bytes = pymupdf_fonts.myfont(face)
        return content
    folder = root / (_MATPLOTLIB.partition("/")[2] if package == "matplotlib" else _FILES[package][0])
    return next(
        (folder / f"{face}{suffix}").read_bytes() for suffix in _SUFFIXES if (folder / f"{face}{suffix}").is_file()
    )
