"""Messages to segments, through the checkpoint's own chat template.

The template never sees what a user wrote: it is rendered with a marker in each text's place, and the result is cut
at markers and special tokens. So special tokens come from the template alone, whatever a text spells, and the
template's cost does not depend on a request's size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import CheckpointError, ClientError
from server.inputs.tokenizer import IMAGE_TOKEN
from server.types import ImageInput, TextPart, Turn

# What checkpoints of this family share; used where a checkpoint has none of its own (idefics2-8b-base).
FAMILY_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].capitalize() + (':' if message['content'][0]['type'] == 'image' else ': ') }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{{ 'Assistant:' if add_generation_prompt else '' }}"
)

_OPEN, _CLOSE = "\x02", "\x03"  # around the number of a text; control characters that no template prints


@dataclass(frozen=True)
class TextSegment:
    """Plain text, from the template or from a user: no part of it is a special token."""

    text: str


@dataclass(frozen=True)
class SpecialSegment:
    token: str


@dataclass(frozen=True)
class ImageSegment:
    """The next picture, in the order of the conversation."""


Segment = TextSegment | SpecialSegment | ImageSegment


class ChatTemplate:
    """A compiled template. Raises CheckpointError at construction when not even a plain question goes through it."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, int]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from None
        tokens = "|".join(re.escape(token) for token in sorted(special_tokens, key=len, reverse=True))
        self._cut = re.compile(f"({tokens}|{_OPEN}[0-9]+{_CLOSE})")
        self._constants = {
            name: token
            for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
            if token in special_tokens
        }
        probe = (Turn(role="user", parts=(ImageInput(url="", detail="auto", param=""), TextPart("?"))),)
        try:
            printed = self.render(probe).count(ImageSegment())
        except ClientError as error:
            raise CheckpointError(error.message) from None
        if printed != 1:
            raise CheckpointError(f"the chat template prints {printed} and not one image token for one picture")

    def render(
        self, turns: Sequence[Turn], *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> list[Segment]:
        """Segments of a conversation; neighbouring texts are joined, empty ones dropped.

        With `continue_final_message` they end with the last turn's text, which must be its last part. Raises
        ClientError for a conversation that the template refuses or cannot take.
        """
        texts: list[str] = []
        messages = [{"role": turn.role, "content": _mark(turn, texts)} for turn in turns]
        try:
            rendered = self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                **self._constants,
            )
        except jinja2.TemplateError as error:
            raise ClientError(f"the model's chat template failed: {error}", param="messages") from None
        except Exception as error:  # a template is a program and may break in any way that Python does
            raise ClientError(
                f"the model's chat template failed on these messages: {type(error).__name__}", param="messages"
            ) from None
        if continue_final_message:
            rendered = _leave_open(rendered, texts)
        segments: list[Segment] = []
        run: list[str] = []
        for index, piece in enumerate(self._cut.split(rendered)):
            if index % 2 == 0:
                run.append(piece)
            elif piece.startswith(_OPEN):
                run.append(texts[int(piece[1:-1])])
            else:
                _flush(run, segments)
                segments.append(ImageSegment() if piece == IMAGE_TOKEN else SpecialSegment(piece))
        _flush(run, segments)
        return segments


def read_chat_template(folder: Path, tokenizer_template: str | None) -> str:
    """The template of a checkpoint: `chat_template.jinja`, `.json`, the tokenizer's or processor's, or the family's."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        try:
            return jinja.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{jinja}: cannot be read: {error}") from None
    for name in ("chat_template.json", "processor_config.json"):
        file = folder / name
        if file.is_file():
            template = _read_json(file).get("chat_template")
            if isinstance(template, str):
                return template
    return tokenizer_template or FAMILY_TEMPLATE


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must hold a JSON object")
    return content


def _mark(turn: Turn, texts: list[str]) -> list[dict[str, str]]:
    """A turn's content as the template sees it; its texts go to `texts`, numbered."""
    content = []
    for part in turn.parts:
        if isinstance(part, ImageInput):
            content.append({"type": "image"})
        else:
            content.append({"type": "text", "text": f"{_OPEN}{len(texts)}{_CLOSE}"})
            texts.append(part.text)
    return content


def _leave_open(rendered: str, texts: Sequence[str]) -> str:
    """A rendered conversation up to the end of its last text.

    An empty one leaves the turn as a generation prompt does: without the space that would come before words.
    """
    marker = f"{_OPEN}{len(texts) - 1}{_CLOSE}"
    start = rendered.rfind(marker)
    if not texts or start < 0:
        raise ClientError("the model's chat template does not print the last message", param="messages")
    return rendered[: start + len(marker)] if texts[-1] else rendered[:start].rstrip(" ")


def _flush(run: list[str], segments: list[Segment]) -> None:
    text = "".join(run)
    run.clear()
    if text:
        segments.append(TextSegment(text))


def _refuse(message: str) -> NoReturn:
    """What templates call to reject a conversation."""
    raise jinja2.TemplateError(message)
