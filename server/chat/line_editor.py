"""Reads what is typed: messages of one line or more, with editing, history and completion where there is readline."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

try:
    import readline
except ImportError:  # not everywhere: lines are then read as the terminal gives them
    readline = None  # type: ignore[assignment]

MAX_ENTRIES = 1000

PROMPT, CONTINUED = "> ", ". "

Completer = Callable[[str], list[str]]


def history_file(environ: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_STATE_HOME/idefics2-server/chat_history`. The XDG standard ignores a place that is not absolute."""
    state = Path(environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        state = Path.home() / ".local" / "state"
    return state / "idefics2-server" / "chat_history"


class History:
    """Messages that were typed, a JSON string a line, readable by their owner alone.

    Each is written when it is entered, so that none is lost and several chats may write at once. A disk that cannot be
    written is no reason not to chat.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def load(self) -> list[str]:
        """The last MAX_ENTRIES; the file is shortened when it holds twice as many."""
        lines: list[str] = []
        with suppress(OSError):
            lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(lines) > 2 * MAX_ENTRIES:
            self._shorten(lines[-MAX_ENTRIES:])
        entries = []
        for line in lines[-MAX_ENTRIES:]:
            with suppress(ValueError):  # a line that was cut, or is not ours
                entry = json.loads(line)
                if isinstance(entry, str):
                    entries.append(entry)
        return entries

    def add(self, entry: str) -> None:
        with suppress(OSError):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(self._file, json.dumps(entry) + "\n", os.O_APPEND)

    def _shorten(self, lines: list[str]) -> None:
        with suppress(OSError):
            shorter = self._file.with_name(f"{self._file.name}.{os.getpid()}")
            self._write(shorter, "\n".join(lines) + "\n", os.O_TRUNC)
            shorter.replace(self._file)

    @staticmethod
    def _write(file: Path, text: str, flags: int) -> None:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | flags, 0o600)
        with open(descriptor, "wb") as out:
            os.fchmod(descriptor, 0o600)  # also of a file that was there with more rights
            out.write(text.encode())


class LineEditor:
    """Reads messages from the terminal. `complete` is given a line up to the cursor and returns whole lines."""

    def __init__(self, complete: Completer, history: History | None) -> None:
        self._complete = complete
        self._history = history
        self._last: str | None = None
        self._matches: list[str] = []
        if readline is not None:
            self._set_up()

    def read(self, prompt: str = PROMPT) -> str:
        """One message: lines up to the first that does not end in a backslash, without those backslashes.

        Text that is pasted is one message too, where the terminal marks it (bracketed paste). Raises EOFError and
        KeyboardInterrupt.
        """
        lines = [input(prompt)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input(CONTINUED))
        message = "\n".join(lines)
        self._remember(message)
        return message

    def _set_up(self) -> None:
        readline.set_auto_history(False)  # a message of several lines is one entry
        readline.set_completer(self._match)
        readline.set_completer_delims(" \t\n")
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            if os.environ.get("TERM", "dumb") != "dumb":  # older versions have it off unless they are told
                readline.parse_and_bind("set enable-bracketed-paste on")
        if self._history is not None:
            for entry in self._history.load():
                readline.add_history(entry)
                self._last = entry

    def _remember(self, message: str) -> None:
        if not message.strip() or message == self._last:
            return
        self._last = message
        if readline is not None:
            readline.add_history(message)
        if self._history is not None:
            self._history.add(message)

    def _match(self, _: str, state: int) -> str | None:
        """readline's own protocol: one match a call, each without what stands before the word at the cursor."""
        if state == 0:
            line = readline.get_line_buffer()[: readline.get_endidx()]
            self._matches = [match[readline.get_begidx() :] for match in self._complete(line)]
        return self._matches[state] if state < len(self._matches) else None
