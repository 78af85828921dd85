"""`python -m server.chat`: the chat on its own."""

from __future__ import annotations

import argparse
import sys

from server.chat import cli
from server.errors import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m server.chat", description="Chat with an OpenAI-compatible server.")
    cli.add_arguments(parser)
    try:
        return cli.run(parser.parse_args())
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
