"""`idefics2-server`: serve, run-batch, bench, chat, make-demo. The flags of `serve` are the fields of ServerConfig."""

from __future__ import annotations

import argparse
import os
import sys
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo

from server.config import ServerConfig, load_config
from server.errors import CheckpointError, ConfigError


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return its exit status; a bad configuration is one line on stderr and status 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(argv)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except (ConfigError, CheckpointError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def _parser(argv: Collection[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="idefics2-server", description="Serve Idefics2 over OpenAI's HTTP API.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a model over HTTP", allow_abbrev=False)
    add_config_flags(serve)
    serve.set_defaults(run=_serve)

    # Roots of their own with their own dependencies, imported when they are asked for: the engine's process loads none
    # of them, and a chat starts without what a load generator needs.
    batch = commands.add_parser("run-batch", help="answer a file of requests, without a server", allow_abbrev=False)
    if "run-batch" in argv:
        from server.batch import cli as batch_cli

        batch_cli.add_arguments(batch)
        batch.set_defaults(run=batch_cli.run)

    bench = commands.add_parser("bench", help="measure any OpenAI-compatible server under load", allow_abbrev=False)
    if "bench" in argv:
        from server.bench import cli as bench_cli

        bench_cli.add_arguments(bench)
        bench.set_defaults(run=bench_cli.run)

    chat = commands.add_parser("chat", help="talk to any OpenAI-compatible server in a terminal", allow_abbrev=False)
    if "chat" in argv:
        from server.chat import cli as chat_cli

        chat_cli.add_arguments(chat)
        chat.set_defaults(run=chat_cli.run)

    demo = commands.add_parser("make-demo", help="write the bundled model, or random weights", allow_abbrev=False)
    demo.add_argument("out", type=Path, nargs="?", help="folder for random weights; none: the bundled model, cached")
    demo.add_argument("--size", default="tiny", help="demo, tiny, tiny-tied, bench (301 M parameters), 1b or 8b")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    demo.add_argument("--text-only", type=Path, help="also write the language model alone, for other engines")
    demo.add_argument("--no-weights", action="store_true", help="all but the weights: for serve --load-format dummy")
    demo.add_argument(
        "--train",
        action="store_true",
        help="train the demo size from nothing; minutes on a GPU, days on a CPU; needs the extra train",
    )
    demo.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of --train; default: %(default)s")
    demo.add_argument("--steps", type=int, help="of --train; default: as many as the bundled model had pictures for")
    demo.add_argument("--minutes", type=float, default=float("inf"), help="after which --train is to be over")
    demo.add_argument("--drawers", type=int, default=1, help="processes that draw for --train; default: %(default)s")
    demo.add_argument("--keep", type=Path, help="folder of what a later --train goes on from; default: OUT-training")
    demo.add_argument(
        "--examine",
        type=int,
        metavar="N",
        help="ask the model in OUT, or the bundled one, about N pictures of each kind; needs the extra train",
    )
    demo.add_argument("--quantization", default="none", help="how --examine stores weights; default: %(default)s")
    demo.set_defaults(run=_make_demo)
    return parser


def add_config_flags(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """The model, --config, and a flag for every other setting but those named in `without`."""
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=_help(ServerConfig.model_fields["model"]))
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings; flags win over it.")
    for name, field in ServerConfig.model_fields.items():
        if name != "model" and name not in without:
            _add_flag(parser, name, field)


def config_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gave, by name."""
    return {name: value for name, value in vars(args).items() if name in ServerConfig.model_fields}


def config_of(args: argparse.Namespace) -> ServerConfig:
    """Flags over the environment over the file. Raises ConfigError."""
    return load_config(file=args.config, environ=os.environ, flags=config_flags(args))


def _add_flag(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    """One flag for one field. Absent flags stay absent, so that they do not hide the file or the environment."""
    flag = "--" + name.replace("_", "-")
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(field)}
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not type(None)]
    kind = kinds[0]
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    elif typing.get_origin(kind) is Literal:
        parser.add_argument(flag, choices=typing.get_args(kind), **options)
    elif typing.get_origin(kind) is list:
        parser.add_argument(flag, nargs="+", metavar="NAME", **options)
    else:
        parser.add_argument(flag, metavar=getattr(kind, "__name__", "VALUE").upper(), **options)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _help(field: FieldInfo) -> str:
    default = "" if field.default is None or field.default == [] else f" (default: {field.default})"
    return f"{field.description}{default}".replace("%", "%%")


def _serve(args: argparse.Namespace) -> int:
    config = config_of(args)
    from server.launch import serve

    return serve(config)


def _make_demo(args: argparse.Namespace) -> int:
    from server.demo.checkpoint import SIZES, ensure_demo, write_checkpoint

    if args.train and args.out is None:
        raise ConfigError("--train needs a folder to write: make-demo OUT --train")
    if args.examine is not None:
        return _examine_demo(args.out or ensure_demo(), args.examine, args.seed, args.quantization)
    if args.out is None:
        print(ensure_demo())
        return 0
    if args.size not in SIZES:
        raise ConfigError(f"--size must be one of {', '.join(SIZES)}, not {args.size!r}")
    if args.train:
        return _train_demo(args)
    if args.no_weights and args.text_only is not None:
        raise ConfigError("--text-only writes weights and cannot be combined with --no-weights")
    write_checkpoint(
        args.out,
        args.size,
        seed=args.seed,
        dtype=args.dtype,
        text_only=args.text_only,
        weights=not args.no_weights,
    )
    print(args.out)
    return 0


def _examine_demo(folder: Path, count: int, seed: int, quantization: str) -> int:
    """Print the share of right answers as a table, and the wrong ones as they come."""
    from server.demo.exam import examine_folder

    if count < 1:
        raise ConfigError(f"--examine must be at least 1, not {count}")
    shares = examine_folder(
        folder, count=count, seed=seed, quantization=quantization, show=lambda line: print(line, file=sys.stderr)
    )
    stored = "" if quantization == "none" else f", {quantization}"
    print(f"| {count} pictures each, seed {seed}{stored} | right |\n| --- | --- |")
    for name, share in shares.items():
        print(f"| {name} | {100 * share:.1f}% |")
    return 0


def _train_demo(args: argparse.Namespace) -> int:
    from server.demo.checkpoint import write_checkpoint
    from server.demo.trainer import usual_plan
    from server.demo.training import train
    from server.observability.logs import configure_logging

    for name in ("steps", "minutes", "drawers"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} must be more than 0, not {value}")
    configure_logging()
    if not (args.out / "config.json").exists():
        write_checkpoint(args.out, "demo", seed=args.seed, dtype="bfloat16")
    train(
        args.out,
        usual_plan(args.device, seed=args.seed, steps=args.steps),
        keep=args.keep or args.out.with_name(f"{args.out.name}-training"),
        device=args.device,
        num_drawers=args.drawers,
        minutes=args.minutes,
    )
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
