"""`python -m tests.talkative serve …`: the server, at a log level that no setting leads to."""

from __future__ import annotations

import sys

from server import launch
from server.cli import main
from server.observability import logs

if __name__ == "__main__":
    launch.configure_logging = lambda **_: logs.configure_logging("DEBUG")  # type: ignore[attr-defined]
    sys.exit(main())
