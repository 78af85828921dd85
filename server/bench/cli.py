"""The command `bench`: flags in, load on a server, a report out."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from server.bench.admission import AdmissionError, run_round
from server.bench.admission import render as render_rounds
from server.bench.load import LoadPlan, LoadResult, WarmupError, run_fast, run_load
from server.bench.report import Summary, machine_facts, render, save, summarise, to_json
from server.bench.side_by_side import Contender, parse_peer
from server.bench.stream import RequestRecord
from server.bench.suite import SUITES, UnknownRowError
from server.bench.suite_command import FlagError, measure_suite
from server.bench.target import Target, TargetError, choose_vocabulary
from server.bench.workloads import Workload, WorkloadSpec

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `bench`, in groups: the target, the load, the requests, the report."""
    _add_target(parser.add_argument_group("target"))
    _add_load(parser.add_argument_group("load"))
    _add_requests(parser.add_argument_group("requests"))
    _add_suite(parser.add_argument_group("a suite of rows, beside peers; the load and the requests are its own"))
    _add_report(parser.add_argument_group("report"))


def _add_suite(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--suite", choices=sorted(SUITES), help="measure these rows instead of one load")
    group.add_argument("--rows", metavar="NAME,...", help="only these rows of it, or curves of scaling")
    group.add_argument("--rounds", type=_number(int, 1), default=5, help="rounds of each row (default: 5)")
    group.add_argument(
        "--peer",
        type=_peer,
        action="append",
        default=[],
        metavar="NAME=URL[,model=ID][,text][,without=KEY]",
        help="a server to compare with: 'text' for one without pictures, 'without' for a key that it refuses",
    )
    group.add_argument(
        "--plots", type=Path, metavar="DIR", help="draw the curves of --suite scaling as SVG files; needs matplotlib"
    )


def _add_target(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--base-url", default="http://127.0.0.1:8000", help="server, with or without /v1")
    group.add_argument("--api-key", metavar="KEY", help="sent to it (default: OPENAI_API_KEY of the environment)")
    group.add_argument("--model", help="model name to ask for (default: the first that the server lists)")
    group.add_argument(
        "--tokenizer", type=Path, help="tokenizer folder to count prompt tokens with, if the server has no /tokenize"
    )
    group.add_argument(
        "--ready-timeout", type=_number(float, 0), default=60.0, help="seconds to wait for the server (default: 60)"
    )
    group.add_argument(
        "--timeout", type=_number(float, 0.001), default=600.0, help="longest silence of a request, s (default: 600)"
    )


def _add_load(group: argparse._ArgumentGroup) -> None:
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--concurrency", type=_number(int, 1), default=8, help="closed loop: requests kept in flight (default: 8)"
    )
    kind.add_argument(
        "--request-rate", type=_number(float, 1e-6), help="open loop: requests a second, sent whatever comes back"
    )
    group.add_argument("--arrival", choices=["poisson", "constant"], default="poisson", help="open loop's timing")
    group.add_argument("--max-concurrency", type=_number(int, 1), help="open loop's limit in flight (default: none)")
    kind.add_argument(
        "--admit",
        type=_number(int, 1),
        metavar="N",
        help="instead of a load: what --streams running text streams feel while N requests with pictures are admitted",
    )
    group.add_argument("--streams", type=_number(int, 1), default=8, help="for --admit (default: 8)")
    group.add_argument("--num-requests", type=_number(int, 1), default=100, help="requests to measure (default: 100)")
    group.add_argument(
        "--warmup",
        type=_number(int, 0),
        help="requests before, not counted (default: --concurrency in a closed loop, 1 in an open one)",
    )
    group.add_argument(
        "--seed",
        type=int,
        help="seed of prompts, pictures and arrivals (default: prompts and pictures new in each run, so that none is "
        "in the server's cache from the run before; arrivals as with 0)",
    )


def _add_requests(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--input-len", type=_number(int, 1), default=256, help="tokens of text (default: 256)")
    group.add_argument("--output-len", type=_number(int, 1), default=64, help="tokens to answer (default: 64)")
    group.add_argument(
        "--shared-prefix-len", type=_number(int, 0), default=0, help="how many of the input tokens all requests share"
    )
    group.add_argument("--images", type=_number(int, 0), default=0, help="pictures in each request (default: 0)")
    group.add_argument("--image-size", type=_size, default=(640, 480), metavar="WxH", help="default: 640x480")
    group.add_argument("--image-detail", choices=["auto", "low", "high"], default="auto", help="default: auto")
    group.add_argument("--repeat-images", action="store_true", help="the same pictures in every request")
    group.add_argument("--temperature", type=_number(float, 0), default=0.0, help="default: 0, greedy")
    group.add_argument(
        "--extra-body",
        type=_json_object,
        default={},
        metavar="JSON",
        help='merged over each request body; null takes a key away, as {"ignore_eos": null} for servers without it',
    )


def _add_report(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output", type=Path, metavar="FILE", help="save the report as JSON")
    group.add_argument("--save-requests", action="store_true", help="with the times of each request in it")
    group.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Measure and report. 0 when every request succeeded, 1 when any failed, 2 for flags that do not go together."""
    if args.max_concurrency is not None and args.request_rate is None:
        return _complain("--max-concurrency limits an open loop: it needs --request-rate", status=2)
    if args.shared_prefix_len >= args.input_len:
        return _complain(
            f"--shared-prefix-len ({args.shared_prefix_len}) must be below --input-len ({args.input_len})", status=2
        )
    if args.output is not None and not args.output.parent.is_dir():
        return _complain(f"--output: there is no folder {args.output.parent}", status=2)
    try:
        if args.suite is not None:
            return measure_suite(args)
        if args.rows is not None or args.peer or args.plots is not None:
            return _complain("--rows, --peer and --plots belong to a --suite", status=2)
        with Target(args.base_url, api_key=args.api_key or os.environ.get("OPENAI_API_KEY")) as target:
            if args.admit is not None:
                return _measure_admission(args, target)
            result, config = _measure(args, target)
    except (TargetError, WarmupError, AdmissionError) as error:
        return _complain(str(error), status=1)
    except (FlagError, UnknownRowError) as error:
        return _complain(str(error), status=2)
    except KeyboardInterrupt:
        return _complain("interrupted", status=130)
    summary = summarise(result)
    print(_headline(config), render(summary, config), sep="\n\n")
    if args.output is not None:
        save(to_json(result, summary, config=config, save_requests=args.save_requests), args.output)
    return exit_status(summary)


def exit_status(summary: Summary) -> int:
    return 1 if summary.failed or summary.warmup_failed else 0


def _measure(args: argparse.Namespace, target: Target) -> tuple[LoadResult, dict[str, Any]]:
    """Ask the server what it needs to be asked, send the load, and return it with the settings that made it."""
    models = target.wait_ready(args.ready_timeout)
    if args.model is None and not models:
        raise TargetError("the server lists no model: name one with --model")
    spec = _workload_spec(args, args.model or models[0])
    plan = _load_plan(args)
    warmup = args.warmup if args.warmup is not None else (plan.concurrency or 1)
    vocabulary = choose_vocabulary(target, spec.model, args.tokenizer)
    config: dict[str, Any] = {
        "base_url": args.base_url,
        "num_requests": args.num_requests,
        "warmup": warmup,
        "tokens_counted_by": vocabulary.source,
        **asdict(plan),
        **asdict(spec),
    }
    return _send(args, target, plan=plan, workload=Workload(spec, vocabulary), warmup=warmup), config


def _measure_admission(args: argparse.Namespace, target: Target) -> int:
    """Rounds of admission; --num-requests is how many."""
    models = target.wait_ready(args.ready_timeout)
    spec = _workload_spec(args, args.model or models[0])
    vocabulary = choose_vocabulary(target, spec.model, args.tokenizer)
    streams = Workload(replace(spec, images=0), vocabulary)
    pictures = Workload(replace(spec, images=spec.images or 1, input_len=16, output_len=1), vocabulary)
    wholes = Workload(replace(spec, images=1, image_detail="low", input_len=16, output_len=1), vocabulary)
    rounds = []
    for number in tqdm(range(args.num_requests), desc="rounds", disable=args.no_progress):
        bodies = [streams.body(number * args.streams + index) for index in range(args.streams)]
        admitted = [pictures.body(number * args.admit + index) for index in range(args.admit)]
        rounds.append(
            run_fast(
                run_round(
                    url=target.chat_url,
                    headers=target.headers,
                    streams=bodies,
                    pictures=admitted,
                    whole=wholes.body(number, warmup=True),
                    timeout=args.timeout,
                )
            )
        )
    width, height = args.image_size
    print(f"{args.streams} streams, {args.admit} × {width}x{height} ({args.image_detail}) admitted; milliseconds")
    print(render_rounds(rounds))
    if args.output is not None:
        save({"machine": machine_facts(), "rounds": [asdict(item) for item in rounds]}, args.output)
    return 0


def _workload_spec(args: argparse.Namespace, model: str) -> WorkloadSpec:
    return WorkloadSpec(
        model=model,
        input_len=args.input_len,
        output_len=args.output_len,
        images=args.images,
        image_size=args.image_size,
        image_detail=args.image_detail,
        temperature=args.temperature,
        shared_prefix_len=args.shared_prefix_len,
        repeat_images=args.repeat_images,
        seed=time.time_ns() % 2**32 if args.seed is None else args.seed,
        extra_body=args.extra_body,
    )


def _load_plan(args: argparse.Namespace) -> LoadPlan:
    return LoadPlan(
        concurrency=args.concurrency if args.request_rate is None else None,
        request_rate=args.request_rate,
        arrival=args.arrival,
        max_concurrency=args.max_concurrency,
        arrival_seed=args.seed or 0,
        timeout=args.timeout,
    )


def _send(args: argparse.Namespace, target: Target, *, plan: LoadPlan, workload: Workload, warmup: int) -> LoadResult:
    """Build all bodies first, so that drawing pictures takes no time from the load, then run it."""
    quiet = args.no_progress
    with tqdm(total=args.num_requests, desc="prepare", leave=False, disable=quiet) as bar:
        bodies = []
        for index in range(args.num_requests):
            bodies.append(workload.body(index))
            bar.update()
    warmup_bodies = [workload.body(index, warmup=True) for index in range(warmup)]
    with tqdm(total=args.num_requests, desc="bench", unit="req", mininterval=0.5, disable=quiet) as bar:
        failed = 0

        def on_done(record: RequestRecord) -> None:
            nonlocal failed
            if record.error is not None:
                failed += 1
                bar.set_postfix(failed=failed, refresh=False)
            bar.update()

        return run_fast(
            run_load(
                plan,
                url=target.chat_url,
                headers=target.headers,
                bodies=bodies,
                warmup=warmup_bodies,
                on_done=on_done,
            )
        )


def _headline(config: dict[str, Any]) -> str:
    if config["request_rate"] is None:
        load = f"{config['concurrency']} in flight"
    else:
        load = f"{config['request_rate']:g} requests/s, {config['arrival']}"
    images = ""
    if config["images"]:
        width, height = config["image_size"]
        images = f" + {config['images']} × {width}x{height} picture ({config['image_detail']})"
    return (
        f"{config['model']} at {config['base_url']}: {load}; {config['input_len']} tokens{images} in, "
        f"{config['output_len']} out; seed {config['seed']}; prompt tokens by: {config['tokens_counted_by']}"
    )


def _complain(message: str, *, status: int) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return status


def _number(kind: Callable[[str], T], least: float) -> Callable[[str], T]:
    """An argparse type: a number that is at least `least`."""

    def parse(text: str) -> T:
        value = kind(text)
        if not least <= float(text) < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {least:g}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def _peer(text: str) -> Contender:
    try:
        return parse_peer(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) > 0 and int(height) > 0):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, as 640x480, not {text!r}")
    return int(width), int(height)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
