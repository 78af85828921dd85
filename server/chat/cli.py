"""The command `chat`: flags in, a conversation in the terminal, or one answer for a script."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from server.chat.endpoint import Endpoint
from server.chat.errors import ChatError
from server.chat.images import find_picture
from server.chat.interactive import Interactive
from server.chat.line_editor import History, LineEditor, history_file
from server.chat.once import answer_once
from server.chat.screen import Screen, is_styled
from server.chat.session import Session
from server.chat.settings import (
    Settings,
    parse_detail,
    parse_max_tokens,
    parse_seed,
    parse_temperature,
    parse_top_p,
)
from server.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `chat`, in groups: the server, the conversation, the sampling."""
    _add_server(parser.add_argument_group("server"))
    _add_conversation(parser.add_argument_group("conversation"))
    _add_sampling(parser.add_argument_group("sampling (default: the server's)"))


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--base-url",
        default="http://127.0.0.1:8000",
        metavar="URL",
        help="any OpenAI-compatible server, with or without /v1 (default: http://127.0.0.1:8000)",
    )
    group.add_argument("--model", metavar="NAME", help="model to ask (default: the first that the server lists)")
    key = group.add_mutually_exclusive_group()
    key.add_argument(
        "--api-key",
        metavar="KEY",
        help="sent to it (default: OPENAI_API_KEY of the environment). Everybody on the machine sees flags",
    )
    key.add_argument("--api-key-file", type=Path, metavar="FILE", help="file that holds the key and nothing else")
    group.add_argument(
        "--timeout",
        type=_argument(_seconds),
        default=600.0,
        metavar="SECONDS",
        help="longest silence of the server (default: 600)",
    )


def _add_conversation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--system", default="", metavar="TEXT", help="system message")
    group.add_argument(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH_OR_URL",
        help="attached to the first question: JPEG, PNG, WebP or GIF",
    )
    group.add_argument(
        "--detail", type=_argument(parse_detail), default="auto", help="of pictures: auto, low or high (default: auto)"
    )
    group.add_argument(
        "--once",
        metavar="QUESTION",
        help="answer this on standard output and leave; without it, a question that is piped in is answered so",
    )
    group.add_argument("--no-history", action="store_true", help="neither read nor write the file of typed messages")


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--temperature", type=_argument(parse_temperature), metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=_argument(parse_top_p), metavar="P", help="share of probability to draw from")
    group.add_argument("--max-tokens", type=_argument(parse_max_tokens), metavar="N", help="longest answer in tokens")
    group.add_argument("--seed", type=_argument(parse_seed), metavar="N", help="the same answer each time")


def run(args: argparse.Namespace) -> int:
    """Chat. 0 when it ended well, 1 when there was no whole answer, or no server, 130 after Ctrl-C in a script.

    Raises ConfigError for flags that cannot be used.
    """
    _check_url(args.base_url)
    is_script = args.once is not None or not (sys.stdin.isatty() and sys.stdout.isatty())
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what is typed or said may not be in the terminal's encoding
    notes = Screen(sys.stderr, styled=is_styled(sys.stderr))
    try:
        with Endpoint(args.base_url, api_key=_api_key(args), timeout=args.timeout) as endpoint:
            question = _question(args) if is_script else ""
            session = _session(args, endpoint)
            return answer_once(session, question, out=sys.stdout, notes=notes) if is_script else _chat(args, session)
    except ChatError as error:
        notes.say(f"chat: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Nobody reads any more, as in `… | head -1`. The interpreter would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _chat(args: argparse.Namespace, session: Session) -> int:
    interactive = Interactive(session, Screen(sys.stdout, styled=is_styled(sys.stdout)))
    history = None if args.no_history else History(history_file())
    return interactive.run(LineEditor(interactive.commands.complete, history))


def _session(args: argparse.Namespace, endpoint: Endpoint) -> Session:
    pictures = [find_picture(place, args.detail) for place in args.image]
    settings = Settings(args.temperature, args.top_p, args.max_tokens, args.seed, args.detail)
    session = Session(endpoint, model=args.model or _first_model(endpoint), settings=settings, system=args.system)
    session.pictures = pictures
    return session


def _first_model(endpoint: Endpoint) -> str:
    models = endpoint.models()
    if not models:
        raise ChatError("the server lists no model: name one with --model")
    return models[0]


def _question(args: argparse.Namespace) -> str:
    question: str = args.once if args.once is not None else sys.stdin.buffer.read().decode("utf-8", "replace")
    if not question.strip():
        raise ChatError("the question is empty")
    return question.strip("\r\n")


def _api_key(args: argparse.Namespace) -> str | None:
    key: str | None = args.api_key or os.environ.get("OPENAI_API_KEY")
    where = "--api-key" if args.api_key else "OPENAI_API_KEY"
    if args.api_key_file is not None:
        where = "--api-key-file"
        try:
            key = args.api_key_file.read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise ConfigError(f"--api-key-file: cannot read {args.api_key_file}: {error.strerror}") from None
        if not key:
            raise ConfigError(f"--api-key-file: {args.api_key_file} is empty")
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{where}: a key is one word of printable ASCII characters")
    return key or None


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number, a bracket that is not closed
        host = port = None
    if not host or port == 0 or parts.scheme not in ("http", "https"):
        raise ConfigError("--base-url: must be an http(s) URL")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError("--base-url: must have no user name, query or fragment")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"must be a number, not {text!r}") from None
    if not 0 < value < float("inf"):
        raise ValueError(f"must be above 0, not {text}")
    return value


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type that tells what the parser says."""

    def told(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return told
