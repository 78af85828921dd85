"""The command `run-batch`: flags in, a file of requests answered, a summary out."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import uvloop

from server.batch.lines import count_lines, read_lines
from server.batch.output import BatchOutput, RunStopped
from server.batch.progress import Progress, render_summary
from server.batch.runner import BatchRunner, Tally
from server.batch.sender import Patience, Sender, Target
from server.batch.targets import LISTENING, local_target, remote_target
from server.cli import add_config_flags, config_flags, config_of
from server.config import ServerConfig
from server.errors import ConfigError

T = TypeVar("T", int, float)

# What is left to set when somebody else's server does the work.
NOT_THE_ENGINES = frozenset({"shutdown_timeout"})

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `run-batch`; those of the model and its engine are `serve`'s."""
    files = parser.add_argument_group("batch")
    files.add_argument("-i", "--input", type=Path, required=True, metavar="FILE", help="requests, a JSON object a line")
    files.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="answers, a line for each; with answers in it already, the run goes on behind them",
    )
    files.add_argument(
        "--retry-failed",
        action="store_true",
        help="take every line that is not an answer of status 200 out of the output first, and run it again",
    )
    files.add_argument(
        "--max-in-flight",
        type=_number(int, 1, 65536),
        metavar="N",
        help="requests at once (default: twice --max-num-seqs, so that the engine is never short of the next one)",
    )
    files.add_argument(
        "--max-wait",
        type=_number(float, 0, float("inf")),
        default=600.0,
        metavar="SECONDS",
        help="how long a line waits out answers of 429 and 503 in all before one is taken for its answer "
        "(default: 600)",
    )
    files.add_argument("--quiet", action="store_true", help="no progress bar; there is none either without a terminal")
    _add_remote(parser.add_argument_group("a server that is running already, instead of a model"))
    add_config_flags(parser, without=LISTENING)


def _add_remote(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--base-url", metavar="URL", help="any OpenAI-compatible server, with or without /v1")
    # `serve` has a flag of that name, for the keys that it asks for.
    group.add_argument(
        "--api-key", dest="key", metavar="KEY", help="sent to it (default: OPENAI_API_KEY of the environment)"
    )
    group.add_argument(
        "--max-retries",
        type=_number(int, 0, 1000),
        default=4,
        metavar="N",
        help="tries after a connection that failed (default: 4)",
    )
    group.add_argument(
        "--timeout",
        type=_number(float, 0.001, float("inf")),
        default=600.0,
        metavar="SECONDS",
        help="longest silence of a request (default: 600)",
    )


def run(args: argparse.Namespace) -> int:
    """Answer what is not answered yet.

    0 when every line of the input has an answer of status 200, 1 when some have not, 130 when a signal ended the run.
    Raises ConfigError or CheckpointError before anything is sent.
    """
    config = _check(args)
    total = count_lines(args.input) if sys.stderr.isatty() and not args.quiet else None
    with BatchOutput(args.output, retry_failed=args.retry_failed) as output:
        return uvloop.run(_run(args, config, output, total))


def _check(args: argparse.Namespace) -> ServerConfig:
    """The settings, if they, the flags and the files go together; ConfigError otherwise."""
    try:
        args.input.open("rb").close()
    except OSError as error:
        raise ConfigError(f"--input: cannot read {args.input}: {error.strerror}") from None
    if not args.input.is_file():
        raise ConfigError(f"--input: {args.input} is not a regular file")
    if not args.output.parent.is_dir():
        raise ConfigError(f"--output: there is no folder {args.output.parent}")
    if args.output.exists() and args.output.samefile(args.input):
        raise ConfigError("--output: is the same file as --input")
    if args.base_url is None:
        if args.key is not None:
            raise ConfigError("--api-key: is sent to the server of --base-url, which is missing")
        return config_of(args)
    parts = urlsplit(args.base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("--base-url: must be an http(s) URL")
    ours = [name for name in config_flags(args) if name not in NOT_THE_ENGINES]
    if ours or args.config is not None:
        flag = ours[0] if ours else "config"
        raise ConfigError(f"{flag}: sets up a model of our own, which --base-url makes needless")
    return config_of(args)


async def _run(args: argparse.Namespace, config: ServerConfig, output: BatchOutput, total: int | None) -> int:
    tally, stopping = Tally(), asyncio.Event()
    progress = Progress(tally, total)
    runner = BatchRunner(read_lines(args.input), output, tally=tally, stopping=stopping, on_line=progress.update)
    max_in_flight = args.max_in_flight or 2 * config.max_num_seqs

    async def answer_all() -> None:
        async with _target(args, config, max_in_flight) as target:
            patience = Patience(retries=args.max_retries, max_wait=args.max_wait)
            await runner.run(Sender(target, patience, stopping), target.urls, max_in_flight=max_in_flight)

    job = asyncio.create_task(answer_all())
    problem = None
    with _signals(job, tally, stopping, seconds=config.shutdown_timeout):
        try:
            await asyncio.wait([job])
            if not job.cancelled():
                job.result()
            output.sync()
        except RunStopped as stopped:
            problem = str(stopped)
        finally:
            progress.close()
    if stopping.is_set():
        problem = "interrupted"
    print(render_summary(tally))
    if problem is not None:
        print(f"run-batch: {problem}; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED if stopping.is_set() else 1
    return 1 if tally.failed or tally.skipped_failed else 0


@contextmanager
def _signals(job: asyncio.Task[None], tally: Tally, stopping: asyncio.Event, *, seconds: float) -> Iterator[None]:
    """While inside, the first SIGINT or SIGTERM takes no more lines and gives those in flight `seconds` to end; the
    second gives them none."""
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stopping.is_set() or not tally.in_flight:
            job.cancel()
        else:
            loop.call_later(seconds, job.cancel)
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _target(args: argparse.Namespace, config: ServerConfig, max_in_flight: int) -> AbstractAsyncContextManager[Target]:
    if args.base_url is None:
        return local_target(config)
    key = args.key or os.environ.get("OPENAI_API_KEY")
    return remote_target(args.base_url, api_key=key, timeout=args.timeout, max_in_flight=max_in_flight)


def _number(kind: Callable[[str], T], least: float, most: float) -> Callable[[str], T]:
    """An argparse type: a finite number from `least` to `most`."""

    def parse(text: str) -> T:
        value = kind(text)
        if not least <= value <= most or value == float("inf"):
            limit = f" and at most {most:g}" if most < float("inf") else ""
            raise argparse.ArgumentTypeError(f"must be at least {least:g}{limit}, not {text}")
        return value

    parse.__name__ = "number"  # argparse names it when the text is no number at all
    return parse
