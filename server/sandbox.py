"""What a child process that handles strangers' bytes is given and denied.

The parent starts it with `PACKAGE_PARENT` and `environment`; the child itself calls `enter` first, and `limit_memory`
once it has what it needs. Standard library only, as both sides of each pipe import it and the children must stay light.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import BinaryIO

# Where a child runs, so that `python -m server.…` finds this package and no other.
PACKAGE_PARENT = Path(__file__).resolve().parent.parent
# A process that a stranger's bytes may take over gets no secrets, only what an interpreter may need.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "LANG", "LC_ALL", "TZ")


def environment() -> dict[str, str]:
    """The part of this process's environment that a child may see."""
    return {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}


def enter() -> BinaryIO:
    """Leave interrupts to the parent, write no core dumps, and give the stream for replies, which was stdout."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # A signal sent to the whole group is the parent's to handle: it may want to finish what it holds, and ends us
        # when it is done.
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold what the client sent
    # Replies go through a private copy of stdout: whatever a library prints ends up in the log, not in the stream.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def limit_memory(extra_bytes: int) -> None:
    """Let the address space grow by `extra_bytes` and no further, or less where a lower limit is in force already.

    An allocation beyond that is a MemoryError in Python and Pillow; other native code ends the process.
    """
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        return  # not Linux: other systems do not enforce this limit either
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + extra_bytes
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
