"""The output of a batch: a file that is only ever appended to, and what an earlier run has left in it.

Knows the format of an output line and how a file survives a kill. Does not know what is asked or how.
"""

from __future__ import annotations

import enum
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from server.errors import ConfigError

ID_PREFIX = "batch_req_"
# How every line that this module writes begins, so that a torn one can be told from somebody else's text.
_HEAD = f'{{"id":"{ID_PREFIX}'.encode()
_DUPLICATE = "duplicate_custom_id"


class RunStopped(Exception):  # noqa: N818 - the lines that are left are not wrong, only not answered yet
    """The run cannot go on; the message says why. What was written stays, and the next run goes on from there."""


class LineResponse(msgspec.Struct, frozen=True):
    """What the server said. `body` is JSON on one line."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(msgspec.Struct, frozen=True):
    """Why a line has no response. `line` is its number in the input, from 1."""

    code: str
    message: str
    param: str | None
    line: int


class OutputLine(msgspec.Struct, frozen=True):
    """One line of output: either a response, of whatever status, or an error."""

    id: str
    custom_id: str | None
    response: LineResponse | None
    error: LineError | None


class _WrittenResponse(msgspec.Struct):
    status_code: int


class _WrittenError(msgspec.Struct):
    """`line` is missing where another program wrote the file."""

    code: str | int | None = None
    line: int | None = None


class _Written(msgspec.Struct):
    """What is read of a line that was written before. Both of the last two are always there, null or not."""

    custom_id: str | None
    response: _WrittenResponse | None
    error: _WrittenError | None

    @property
    def succeeded(self) -> bool:
        return self.error is None and self.response is not None and self.response.status_code == 200


class Claim(enum.Enum):
    """What is known of a line when its turn comes."""

    NEW = enum.auto()
    ANSWERED = enum.auto()
    FAILED = enum.auto()
    DUPLICATE = enum.auto()


class Ledger:
    """Which lines were answered by an earlier run, and which ids this one has seen.

    Keeps a digest for each id, some 150 bytes in all, and a number for each line without one.
    """

    def __init__(self) -> None:
        self._ids: dict[bytes, Claim] = {}
        self._failed_lines: set[int] = set()
        self.has_failures = False

    def record(self, written: _Written) -> None:
        """Remember a line of an earlier run's output."""
        error = written.error
        self.has_failures |= not written.succeeded
        if written.custom_id is None or (error is not None and error.code == _DUPLICATE):
            # Its id, if any, is another line's: only the number tells which line it was.
            if error is not None and error.line is not None:
                self._failed_lines.add(error.line)
        elif written.succeeded:
            self._ids[_digest(written.custom_id)] = Claim.ANSWERED
        else:
            self._ids.setdefault(_digest(written.custom_id), Claim.FAILED)

    def claim(self, number: int, custom_id: str | None) -> Claim:
        """Ask for a line's turn. The first line of an id gets it; a later one is a DUPLICATE, or FAILED once told."""
        claim = Claim.NEW
        if custom_id is not None:
            digest = _digest(custom_id)
            claim = self._ids.get(digest, Claim.NEW)
            self._ids[digest] = Claim.DUPLICATE
        told = number in self._failed_lines and (custom_id is None or claim is Claim.DUPLICATE)
        return Claim.FAILED if told else claim

    def forget_failures(self) -> None:
        self._ids = {digest: claim for digest, claim in self._ids.items() if claim is Claim.ANSWERED}
        self._failed_lines.clear()
        self.has_failures = False


class BatchOutput:
    """The file, locked and open at its end. Use as a context manager."""

    def __init__(self, path: Path, *, retry_failed: bool = False) -> None:
        """Open or make the file and read what is in it; a last line that a kill has torn is taken off.

        With `retry_failed` lines without an answer of status 200 are taken out, so that they run again. Raises
        ConfigError, having changed nothing, if the file is not a batch's output or another run is writing it.
        """
        self.ledger = Ledger()
        # A link is followed now, so that a rewritten file does not take the link's place.
        self._path = path.resolve()
        self._broken = False
        try:
            self._file = _open_locked(self._path)
            try:
                self._load()
                if retry_failed and self.ledger.has_failures:
                    self._drop_failures()
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise ConfigError(f"--output: cannot write {path}: {error.strerror}") from None

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, line: OutputLine) -> None:
        """Write a line; when this returns it survives the end of this process. Raises RunStopped if it cannot."""
        if self._broken:
            raise RunStopped("the output has a line that could not be written to its end")
        left = memoryview(msgspec.json.encode(line) + b"\n")
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            # Nothing may follow a piece of a line: only a last one can be taken off.
            self._broken = True
            raise RunStopped(f"cannot write {self._path}: {error.strerror}") from None

    def sync(self) -> None:
        """Have it survive the end of the machine, too. Raises RunStopped if it does not."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunStopped(f"cannot write {self._path}: {error.strerror}") from None

    def _load(self) -> None:
        end, missing_break = 0, False
        for raw in _raw_lines(self._path):
            written = self._decode(raw)
            if written is None:
                break
            if isinstance(written, _Written):
                self.ledger.record(written)
            end += len(raw)
            missing_break = not raw.endswith(b"\n")
        os.ftruncate(self._file.fileno(), end)
        if missing_break:
            self._file.write(b"\n")

    def _decode(self, raw: bytes) -> _Written | bytes | None:
        """A line; its bytes when it is blank; None when it is the torn end of the file."""
        if raw.isspace():
            return raw
        try:
            return msgspec.json.decode(raw, type=_Written)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            if not raw.endswith(b"\n") and (raw.startswith(_HEAD) or _HEAD.startswith(raw)):
                return None
            raise ConfigError(
                f"--output: {self._path} holds something that is not a batch's output; name another file"
            ) from None

    def _drop_failures(self) -> None:
        """Replace the file at once by one without them: a kill leaves the old one or the new one."""
        fresh = self._path.with_name(self._path.name + ".tmp")
        with fresh.open("wb") as copy:
            for raw in _raw_lines(self._path):
                written = self._decode(raw)
                if isinstance(written, _Written) and written.succeeded:
                    copy.write(raw)
            copy.flush()
            os.fsync(copy.fileno())
        shutil.copymode(self._path, fresh)
        fresh.replace(self._path)
        self._file.close()
        self._file = _open_locked(self._path)
        self.ledger.forget_failures()


def _raw_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _open_locked(path: Path) -> IO[bytes]:
    """Open for appending, without a buffer, and lock. The lock ends with the process, however it ends."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"--output: {path} is not a regular file")
    file = path.open("ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        held = False
    except BaseException:
        file.close()
        raise
    if not held:
        file.close()
        raise ConfigError(f"--output: another run is writing {path}")
    return file


def _digest(custom_id: str) -> bytes:
    # 15 bytes are the most that a bytes object of 48 holds, and enough for two of 10^12 ids never to meet.
    return hashlib.blake2b(custom_id.encode(), digest_size=15).digest()
