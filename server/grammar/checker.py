"""Whether a client's grammar may be compiled, found out in a process that can be killed.

The library is native and recursive: there are sources of a few kilobytes that it compiles for minutes, or that end
the process by overflowing its stack. So each new source is tried in a child first, for about a second at most.
Knows the child; knows nothing of requests. Safe to use from several threads, and blocking.
"""

from __future__ import annotations

import hashlib
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict

import msgspec

from server import sandbox
from server.errors import ClientError, UnavailableError
from server.grammar.check_worker import Reply, frame
from server.grammar.sources import KINDS, check_size
from server.grammar.vocabulary import VocabularySpec
from server.types import GrammarSpec

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0  # the child ends itself long before, unless the machine has no time for it
_START_SECONDS = 30.0
_REMEMBERED = 4096


class GrammarChecker:
    """One child, started at the first check and again after it was killed."""

    def __init__(self, vocabulary: VocabularySpec) -> None:
        self._vocabulary = frame(vocabulary)
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False

    def start(self) -> None:
        """Start the child now rather than at the first check. Raises UnavailableError."""
        with self._lock:
            self._ensure_child()

    def close(self) -> None:
        """End the child. Checks that come later raise UnavailableError."""
        with self._lock:
            self._closed = True
            self._end_child()

    def check(self, spec: GrammarSpec) -> None:
        """Raises ClientError with `spec.param` for what is malformed, not supported, too slow or too complex.

        Raises UnavailableError when no child can be started or the machine is too busy. Takes as much CPU time as
        `check_worker.CHECK_SECONDS` at most, not counting a child's start.
        """
        check_size(spec)
        key = hashlib.sha256(f"{spec.kind}:{spec.source}".encode()).digest()
        with self._lock:
            if key not in self._verdicts:
                self._verdicts[key] = self._try(spec)
                if len(self._verdicts) > _REMEMBERED:
                    self._verdicts.popitem(last=False)
            self._verdicts.move_to_end(key)
            verdict = self._verdicts[key]
        if verdict is not None:
            raise ClientError(verdict, param=spec.param)

    def _try(self, spec: GrammarSpec) -> str | None:
        """Why a source is refused, or None."""
        child = self._ensure_child()
        try:
            _write(child, frame(spec))
            reply = _read(child, _ANSWER_SECONDS)
        except TimeoutError:
            self._end_child()
            raise _unavailable() from None
        except (OSError, EOFError, msgspec.DecodeError):
            logger.warning("a grammar took too long or broke the process that tried it; replacing the process")
            self._end_child()
            return f"{KINDS[spec.kind]} is not supported: it is too large or too complex"
        return reply.refusal

    def _ensure_child(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise UnavailableError("the server is shutting down")
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._end_child()
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "server.grammar.check_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=sandbox.PACKAGE_PARENT,
                env=sandbox.environment(),
            )
            _write(self._child, self._vocabulary)
            _read(self._child, _START_SECONDS)
        except (OSError, EOFError, msgspec.DecodeError):
            self._end_child()
            raise _unavailable() from None
        return self._child

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()  # closes the pipes and waits
            self._child = None


def _unavailable() -> UnavailableError:
    return UnavailableError("the grammar could not be checked; try again", code="grammar_checker_unavailable")


def _write(child: subprocess.Popen[bytes], data: bytes) -> None:
    assert child.stdin is not None
    child.stdin.write(data)
    child.stdin.flush()


def _read(child: subprocess.Popen[bytes], seconds: float) -> Reply:
    """The child's next reply. Raises EOFError when it ends, and TimeoutError, an OSError, when it takes too long."""
    assert child.stdout is not None
    deadline = time.monotonic() + seconds
    data = b""
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
        ready, _, _ = select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        received = os.read(child.stdout.fileno(), 1 << 16)
        if not received:
            raise EOFError
        data += received
    return msgspec.msgpack.decode(data[4:], type=Reply)
