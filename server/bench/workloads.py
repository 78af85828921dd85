"""Builds request bodies from a seed: prompts of a known number of tokens, pictures, and a fixed length of answer.

Every body differs from every other, from its first words and pixels on, unless sharing is asked for: a prefix cache
would otherwise flatter the numbers by accident. Knows nothing of sockets or time.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image, ImageDraw

ImageDetail = Literal["auto", "low", "high"]
TokenCounter = Callable[[str], int]

# Common words, each a single token in most vocabularies. Those that are not are left out once the server's tokenizer
# is known, so that a prompt of N words is a prompt of N tokens.
_WORD_LIST = """
about above across act action after again against age ago air all almost alone along already also always among animal
another answer any appear area arm army around art ask away baby back ball bank base bath bear beat beautiful become
bed before began begin behind believe best better between big bird black blood blue board boat body book born both
bottom box boy break bridge bright bring broken brother brown build burn business buy call car card care carry case cat
catch cause center chair chance change check child choose church circle city class clean clear clock close cloud coat
cold color come common complete cook cool copy corner correct cost count country course court cover cross cry cup cut
dance danger dark daughter day dead deal deep describe design develop die difference different difficult dinner direct
discover distance divide doctor dog door double down draw dream dress drink drive drop dry during each ear early earth
east easy eat edge effect egg eight either else empty end enemy energy engine enough enter equal escape even evening
ever every exact example except expect experience explain eye face fact fair fall family famous far farm fast father
fear feel feet few field fight figure fill final find fine finger finish fire first fish five floor flow flower fly
follow food foot force foreign forest forget form forward found four free fresh friend front fruit full fun game garden
"""
WORDS = tuple(_WORD_LIST.split())

# Counted in front of the others, so that what a tokenizer adds to the beginning of a text cancels out.
ANCHOR = "the"
# With fewer words than this the counter is not to be believed (it counts letters, say).
MIN_WORDS = 64
JPEG_QUALITY = 85


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Words to write prompts with, each taken for one token; `source` says who counted."""

    words: tuple[str, ...]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """What each request asks. Lengths are in tokens and leave out the chat template and the pictures.

    The first `shared_prefix_len` of the `input_len` tokens are the same in every request; with `repeat_images` so are
    the pictures. `extra_body` is merged over the finished body, where None takes a key away.
    """

    model: str
    input_len: int
    output_len: int
    images: int = 0
    image_size: tuple[int, int] = (640, 480)
    image_detail: ImageDetail = "auto"
    temperature: float = 0.0
    shared_prefix_len: int = 0
    repeat_images: bool = False
    seed: int = 0
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.shared_prefix_len < self.input_len:
            raise ValueError(
                f"the shared prefix ({self.shared_prefix_len} tokens) must be shorter than the input "
                f"({self.input_len}): each request needs a word of its own"
            )


def find_vocabulary(count: TokenCounter | None, *, source: str) -> Vocabulary:
    """The words that `count` finds to be one token each; all words, taken for a token each, where it is no help."""
    kept = _single_token_words(count, WORDS) if count is not None else []
    if len(kept) < MIN_WORDS:
        return Vocabulary(WORDS, source="one token a word assumed")
    return Vocabulary(tuple(kept), source=source)


def _single_token_words(count: TokenCounter, words: Sequence[str]) -> list[str]:
    base = count(ANCHOR)

    def single(group: Sequence[str]) -> list[str]:
        # A word is a token or more, so a group that adds as many tokens as words has only single ones. Most groups
        # do, and a call for each word, which may be a request to the server, is saved.
        if count(" ".join((ANCHOR, *group))) - base == len(group):
            return list(group)
        if len(group) == 1:
            return []
        middle = len(group) // 2
        return single(group[:middle]) + single(group[middle:])

    size = 32
    return [word for start in range(0, len(words), size) for word in single(words[start : start + size])]


class Workload:
    """Makes bodies. The same spec, vocabulary and index give the same bytes; warm-up bodies are a series of their own.

    Two runs with one seed send the same prompts, and the second finds them in the server's cache.
    """

    def __init__(self, spec: WorkloadSpec, vocabulary: Vocabulary) -> None:
        self._spec = spec
        self._words = vocabulary.words
        self._shared_text = self._text(random.Random(f"{spec.seed}/shared"), spec.shared_prefix_len)
        self._shared_images = self._draw("shared") if spec.repeat_images else None

    def body(self, index: int, *, warmup: bool = False) -> bytes:
        """The JSON body of one request."""
        spec = self._spec
        series = f"{'warmup' if warmup else 'request'}/{index}"
        text = self._text(random.Random(f"{spec.seed}/{series}"), spec.input_len - spec.shared_prefix_len)
        images = self._shared_images if self._shared_images is not None else self._draw(series)
        body: dict[str, Any] = {
            "model": spec.model,
            "messages": [{"role": "user", "content": self._content(text, images)}],
            "max_completion_tokens": spec.output_len,
            "ignore_eos": True,
            "temperature": spec.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body.update(spec.extra_body)
        return json.dumps({key: value for key, value in body.items() if value is not None}).encode()

    def _content(self, text: str, images: Sequence[str]) -> str | list[dict[str, Any]]:
        if not images:
            # A plain string: chat templates of text models know no parts.
            return f"{self._shared_text} {text}" if self._shared_text else text
        # Pictures before the question, as Idefics2 was trained; the shared words before them, or they would not be
        # a prefix.
        shared = [{"type": "text", "text": self._shared_text}] if self._shared_text else []
        return [*shared, *(self._image_part(url) for url in images), {"type": "text", "text": text}]

    def _image_part(self, url: str) -> dict[str, Any]:
        named = {} if self._spec.image_detail == "auto" else {"detail": self._spec.image_detail}
        return {"type": "image_url", "image_url": {"url": url, **named}}

    def _text(self, generator: random.Random, length: int) -> str:
        return " ".join(generator.choices(self._words, k=length))

    def _draw(self, series: str) -> list[str]:
        spec = self._spec
        return [
            draw_picture(random.Random(f"{spec.seed}/{series}/image/{number}"), spec.image_size)
            for number in range(spec.images)
        ]


def draw_picture(generator: random.Random, size: tuple[int, int]) -> str:
    """A JPEG data URL of a picture `size` = (width, height) pixels: soft colours with shapes on them.

    Pure noise would be ten times the bytes of a photograph and make the upload and the decoder look slow.
    """
    width, height = size
    # Colours vary over the whole picture, so that each crop of a split one is distinct too.
    colours = Image.frombytes("RGB", (16, 12), generator.randbytes(16 * 12 * 3))
    picture = colours.resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for _ in range(24):
        left, top = generator.randrange(width), generator.randrange(height)
        box = (left, top, left + generator.randint(1, width // 4 + 1), top + generator.randint(1, height // 4 + 1))
        colour = (generator.randrange(256), generator.randrange(256), generator.randrange(256))
        generator.choice((pen.ellipse, pen.rectangle, pen.line))(box, fill=colour)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
