"""The command `chat` as a process of its own: in a real pseudo-terminal, or in a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.serving import ROOT, clean_environment, command

CTRL_C, CTRL_D, TAB, UP = "\x03", "\x04", "\t", "\x1b[A"
SECONDS = 30.0

# Makes the pseudo-terminal the controlling one, so that its line discipline turns Ctrl-C into a signal.
_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """What a user sees and types. `raw` is all that was shown."""

    def __init__(self, descriptor: int, process: subprocess.Popen[bytes]) -> None:
        self._descriptor = descriptor
        self.process = process
        self.raw = b""
        self._seen = 0

    def type(self, text: str) -> None:
        self.type_bytes(text.encode())

    def type_bytes(self, keys: bytes) -> None:
        os.write(self._descriptor, keys)

    def enter(self, line: str) -> None:
        self.type(line + "\r")

    def until(self, text: str) -> str:
        """What is shown from here on, up to and with `text`."""
        return self.until_match(re.escape(text))

    def until_match(self, pattern: str) -> str:
        wanted = re.compile(pattern.encode())
        deadline = time.monotonic() + SECONDS
        while (found := wanted.search(self.raw, self._seen)) is None:
            assert time.monotonic() < deadline, f"{pattern!r} does not come: {self.raw[self._seen :]!r}"
            assert self._read(), f"ended before {pattern!r}: {self.raw[self._seen :]!r}"
        start, self._seen = self._seen, found.end()
        return self.raw[start : self._seen].decode("utf-8", "replace")

    def clear_line(self) -> None:
        """Ctrl-C at the prompt, up to a new prompt. Python looks for signals and then waits for a key: one that comes
        between the two is seen at the next, so it is sent again."""
        seen, deadline = len(self.raw), time.monotonic() + SECONDS
        while b"> " not in self.raw[seen:]:
            assert time.monotonic() < deadline, "Ctrl-C clears nothing"
            self.type(CTRL_C)
            pause = time.monotonic() + 1
            while b"> " not in self.raw[seen:] and time.monotonic() < pause:
                assert self._read(), "ended at Ctrl-C"
        self._seen = len(self.raw)

    def prompt(self) -> str:
        """All up to the next prompt, when it is ready for input."""
        return self.until("> ")

    def leave(self) -> int:
        self.type(CTRL_D)
        return self.end()

    def end(self) -> int:
        """Its exit status; all that it still shows is in `raw`."""
        deadline = time.monotonic() + SECONDS
        while self._read():
            assert time.monotonic() < deadline, "it does not end"
        return self.process.wait(SECONDS)

    def _read(self) -> bool:
        if not select.select([self._descriptor], [], [], 0.1)[0]:
            return True
        try:
            piece = os.read(self._descriptor, 1 << 16)
        except OSError:  # Linux says that the other side is closed as an error
            return False
        self.raw += piece
        return bool(piece)


@contextmanager
def chatting(home: Path, *flags: str, **environment: str) -> Iterator[Terminal]:
    """`chat FLAGS` in a terminal whose state folder is below `home`."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))  # rows, columns: no line is wrapped
    process = subprocess.Popen(
        [sys.executable, "-c", _TAKE_TERMINAL, *command("chat", *flags)],
        cwd=ROOT,
        env=chat_environment(home, **environment),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(ours)


def piped(home: Path, *flags: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`chat FLAGS` with this on its standard input, and both outputs in pipes."""
    return subprocess.run(
        command("chat", *flags),
        cwd=ROOT,
        env=chat_environment(home, **environment),
        input=text.encode(),
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )


def chat_environment(home: Path, **changes: str) -> dict[str, str]:
    settings = {"HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "INPUTRC": os.devnull, "TERM": "xterm"}
    kept = clean_environment(**{**settings, **changes})
    return {
        name: value for name, value in kept.items() if name in changes or name not in ("OPENAI_API_KEY", "NO_COLOR")
    }


def plain(shown: str) -> str:
    """Without the sequences that readline and dim lines are made of, and with newlines as they were written."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r\n", "\n")
