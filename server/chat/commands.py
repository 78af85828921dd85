"""Lines that begin with a slash: what each does, and how it is told."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.chat.completion import complete
from server.chat.conversation import Conversation
from server.chat.errors import ChatError
from server.chat.events import Answer, without_surrogates
from server.chat.images import DETAILS, find_picture
from server.chat.screen import Screen
from server.chat.session import Session

IMAGE_USAGE = f"/image PATH_OR_URL [{'|'.join(DETAILS)}]"


class Leave(Exception):  # noqa: N818 - nothing is wrong
    """The chat is over."""


@dataclass(frozen=True, slots=True)
class Command:
    usage: str
    help: str
    run: Callable[[str], None]


class Commands:
    """The commands of one session. `retry` asks the last question again and shows its answer."""

    def __init__(self, session: Session, screen: Screen, retry: Callable[[], Answer]) -> None:
        self._session = session
        self._screen = screen
        self._retry_and_show = retry
        self._own_files: set[Path] = set()  # written or read by this chat, which may write them again
        listed = [
            Command(IMAGE_USAGE, "attach a picture to the next message", self._image),
            Command("/images", "what is attached", self._images),
            Command("/drop [NUMBER]", "take attached pictures away, all or one", self._drop),
            Command("/system [TEXT]", 'set the system message; "" takes it away, alone it is shown', self._system),
            Command("/set NAME VALUE", "a setting of the sampling; the value default takes it back", self._set),
            Command("/settings", "all settings", self._settings),
            Command("/model [NAME]", "go on with another model; alone it lists them", self._model),
            Command("/history", "what has been said", self._history),
            Command("/retry", "ask the last question again", self._retry),
            Command("/undo", "take back the last question and its answer", self._undo),
            Command("/clear", "forget all that was said; the system message stays", self._clear),
            Command("/save FILE", "write the messages as JSON", self._save),
            Command("/load FILE", "go on with messages that were saved", self._load),
            Command("/help", "this list", self._help),
            Command("/quit", "leave, as Ctrl-D does", self._quit),
        ]
        self._commands = {command.usage.split()[0]: command for command in listed}

    def run(self, line: str) -> None:
        """Do what a line says that begins with a slash. Raises ChatError, or Leave."""
        name, _, rest = line.strip().replace("\t", " ").partition(" ")
        command = self._commands.get(name)
        if command is None:
            raise ChatError(
                f"there is no command {name}; /help lists them. "
                "To send a message that begins with a slash, put a space before it"
            )
        if rest and " " not in command.usage:
            raise ChatError(f"{name} stands alone")
        command.run(rest.strip())

    def complete(self, line: str) -> list[str]:
        """What a line up to the cursor may become."""
        return complete(line, names=self._commands, with_paths=("/image", "/save", "/load"))

    def _image(self, rest: str) -> None:
        words = _words(rest)
        if len(words) not in (1, 2) or (len(words) == 2 and words[1] not in DETAILS):
            raise ChatError(f"{IMAGE_USAGE}; a path that holds spaces needs quotes")
        picture = find_picture(words[0], words[1] if len(words) == 2 else self._session.settings.detail)
        self._session.pictures.append(picture)
        self._screen.note(f"attached: {picture}")

    def _images(self, _: str) -> None:
        if not self._session.pictures:
            self._screen.note("nothing is attached")
        for number, picture in enumerate(self._session.pictures, start=1):
            self._screen.note(f"{number}: {picture}")

    def _drop(self, rest: str) -> None:
        pictures = self._session.pictures
        if not pictures:
            raise ChatError("nothing is attached")
        if rest:
            if not rest.isdecimal() or not 1 <= int(rest) <= len(pictures):
                raise ChatError(f"NUMBER must be from 1 to {len(pictures)}, as /images shows them")
            self._screen.note(f"taken away: {pictures.pop(int(rest) - 1)}")
        else:
            self._screen.note(f"taken away: {', '.join(map(str, pictures))}")
            pictures.clear()

    def _system(self, rest: str) -> None:
        conversation = self._session.conversation
        if rest:
            conversation.system = "" if rest in ('""', "''") else without_surrogates(rest)
        self._screen.note(f"system message: {conversation.system}" if conversation.system else "no system message")

    def _set(self, rest: str) -> None:
        words = _words(rest)
        if len(words) != 2:
            raise ChatError("/set NAME VALUE, as /set temperature 0.2; /settings shows the names")
        self._session.settings.set(*words)
        self._settings("")

    def _settings(self, _: str) -> None:
        self._screen.note("\n".join(self._session.settings.lines()))

    def _model(self, rest: str) -> None:
        if rest:
            self._session.model = without_surrogates(rest)
            self._screen.note(f"model: {self._session.model}")
            return
        for name in self._session.endpoint.models():
            self._screen.note(f"{'*' if name == self._session.model else ' '} {name}")

    def _history(self, _: str) -> None:
        conversation = self._session.conversation
        if conversation.system:
            self._screen.note(f"system message: {conversation.system}")
        if not conversation.turns:
            self._screen.note("nothing has been said")
        for turn in conversation.turns:
            self._screen.note(f"> {with_pictures(turn.text, turn.num_pictures)}")
            self._screen.say(turn.answer)

    def _retry(self, _: str) -> None:
        self._retry_and_show()

    def _undo(self, _: str) -> None:
        turn = self._session.undo()
        self._screen.note(f"taken back: {with_pictures(turn.text, turn.num_pictures)}")

    def _clear(self, _: str) -> None:
        self._session.clear()
        self._screen.note("all is forgotten but the system message and the settings")

    def _save(self, rest: str) -> None:
        file = _file(rest, "/save FILE")
        self._session.conversation.save(file, overwrite=file in self._own_files)
        self._own_files.add(file)
        self._screen.note(f"saved: {len(self._session.conversation.turns)} turns in {file}")

    def _load(self, rest: str) -> None:
        file = _file(rest, "/load FILE")
        conversation = Conversation.load(file)
        self._own_files.add(file)
        self._session.replace(conversation)
        self._screen.note(f"loaded: {len(conversation.turns)} turns")

    def _help(self, _: str) -> None:
        width = max(len(command.usage) for command in self._commands.values())
        lines = [f"{command.usage:<{width}}  {command.help}" for command in self._commands.values()]
        lines.append("A line that ends with a backslash goes on in the next. Ctrl-C stops an answer, Ctrl-D leaves.")
        self._screen.note("\n".join(lines))

    def _quit(self, _: str) -> None:
        raise Leave


def with_pictures(text: str, count: int) -> str:
    """A question for the eye: how many pictures it has, then its words."""
    return f"[{plural(count)}] {text}" if count else text


def plural(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"


def _words(rest: str) -> list[str]:
    """As a shell splits them, so that names a terminal gives by drag and drop work."""
    try:
        return shlex.split(rest)
    except ValueError:
        raise ChatError("a quote has no end") from None


def _file(rest: str, usage: str) -> Path:
    words = _words(rest)
    if len(words) != 1:
        raise ChatError(f"{usage}; a path that holds spaces needs quotes")
    try:
        return Path(words[0]).expanduser().absolute()
    except RuntimeError as error:
        raise ChatError(f"{usage}: {error}") from None
