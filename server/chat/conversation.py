"""What has been said: a system message and turns of a question and its answer. Saved and loaded as JSON messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.chat.errors import ChatError
from server.chat.events import without_surrogates
from server.chat.images import Picture

# As in a request: a string, or parts of text and pictures.
Content = str | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Turn:
    question: Content
    answer: str

    @property
    def text(self) -> str:
        """The words of the question."""
        if isinstance(self.question, str):
            return self.question
        return "\n".join(part["text"] for part in self.question if part["type"] == "text")

    @property
    def num_pictures(self) -> int:
        if isinstance(self.question, str):
            return 0
        return sum(part["type"] == "image_url" for part in self.question)


@dataclass(slots=True)
class Conversation:
    system: str = ""
    turns: list[Turn] = field(default_factory=list)

    def messages(self) -> list[dict[str, Any]]:
        """All of it, as a request has it."""
        said: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            said.append({"role": "user", "content": turn.question})
            said.append({"role": "assistant", "content": turn.answer})
        return said

    def save(self, file: Path, *, overwrite: bool) -> None:
        """Write the messages as a JSON array. Raises ChatError, also for a file that is there when it may not be."""
        text = json.dumps(self.messages(), ensure_ascii=False, indent=1) + "\n"
        try:
            with file.open("w" if overwrite else "x", encoding="utf-8") as out:
                out.write(text)
        except FileExistsError:
            raise ChatError(f"{file} is there already; nothing was written") from None
        except OSError as error:
            raise ChatError(f"cannot write {file}: {error.strerror}") from None

    @classmethod
    def load(cls, file: Path) -> Conversation:
        """What `save` has written, or any JSON array of messages in turns. Raises ChatError."""
        try:
            if not file.is_file():
                raise ChatError(f"there is no file {file}")
            messages = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ChatError(f"cannot read {file}: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise ChatError(f"{file} is not JSON") from None
        if not isinstance(messages, list):
            raise ChatError(f"{file}: must be an array of messages")
        return _from_messages(messages, file)


def question_of(text: str, pictures: Sequence[Picture]) -> Content:
    """A question, its pictures before its words."""
    text = without_surrogates(text)
    return [*(picture.part() for picture in pictures), {"type": "text", "text": text}] if pictures else text


def _from_messages(messages: list[Any], file: Path) -> Conversation:
    said = Conversation()
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        said.system = _plain(messages.pop(0), file, "the system message")
    if len(messages) % 2:
        raise ChatError(f"{file}: must have an answer behind every question")
    for index in range(0, len(messages), 2):
        where = f"turn {index // 2 + 1}"
        for message, role in zip(messages[index : index + 2], ("user", "assistant"), strict=True):
            if not isinstance(message, dict) or message.get("role") != role:
                raise ChatError(f"{file}: {where} must be a message of the user and one of the assistant")
        question, answer = messages[index].get("content"), _plain(messages[index + 1], file, where)
        if not isinstance(question, str) and not (isinstance(question, list) and all(map(_is_part, question))):
            raise ChatError(f"{file}: {where}: the question must be text, or a list of texts and image_urls")
        said.turns.append(Turn(question, answer))
    return said


def _plain(message: dict[str, Any], file: Path, where: str) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise ChatError(f"{file}: {where}: content must be a string")
    return content


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    if part.get("type") == "text":
        return isinstance(part.get("text"), str)
    image = part.get("image_url")
    return part.get("type") == "image_url" and isinstance(image, dict) and isinstance(image.get("url"), str)
