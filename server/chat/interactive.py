"""The chat in a terminal: a prompt, commands, answers as they arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from server.chat.commands import Commands, Leave, plural
from server.chat.errors import ChatError
from server.chat.events import Answer
from server.chat.line_editor import PROMPT
from server.chat.screen import Screen, usage_line
from server.chat.session import OnText, Session


class Reader(Protocol):
    def read(self, prompt: str) -> str:
        """One message. Raises EOFError and KeyboardInterrupt."""


class Interactive:
    """`commands` is for the reader's completion, which has to be there before the reader."""

    def __init__(self, session: Session, screen: Screen) -> None:
        self._session = session
        self._screen = screen
        self.commands = Commands(session, screen, lambda: self._show(session.retry))

    def run(self, reader: Reader) -> int:
        """Until Ctrl-D or /quit. The exit status is 0."""
        self._screen.note(
            f"{self._session.model} at {self._session.endpoint.root}. /help lists the commands, Ctrl-D leaves."
        )
        while True:
            try:
                self._turn(reader)
            except (EOFError, Leave) as end:
                if isinstance(end, EOFError):
                    self._screen.say("")
                return 0
            except KeyboardInterrupt:
                self._screen.say("")
            except ChatError as error:
                self._screen.say(f"! {error}")

    def _turn(self, reader: Reader) -> None:
        attached = len(self._session.pictures)
        message = reader.read(f"[{plural(attached)}] {PROMPT}" if attached else PROMPT)
        if message.startswith("/"):
            self.commands.run(message)
        elif message.strip():
            self._show(lambda on_text: self._session.ask(message.strip(), on_text))

    def _show(self, ask: Callable[[OnText], Answer]) -> Answer:
        try:
            answer = ask(self._screen.stream)
        finally:
            self._screen.end_line()
        if answer.is_stopped:
            kept = "what was said is kept" if answer.text else "nothing was said, so the question is not kept"
            self._screen.note(f"stopped: {kept}")
        else:
            if not answer.text:
                self._screen.note("an empty answer")
            self._screen.note(usage_line(answer))
        return answer
