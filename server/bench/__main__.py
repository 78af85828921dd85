"""`python -m server.bench`: the bench command on its own."""

from __future__ import annotations

import argparse
import sys

from server.bench import cli


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m server.bench",
        description="Put load on an OpenAI-compatible server and measure throughput and latency.",
    )
    cli.add_arguments(parser)
    return cli.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
