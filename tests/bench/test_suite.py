from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import pytest
from starlette.responses import JSONResponse

from server.bench import cli
from server.bench.suite import (
    STANDARD,
    Contender,
    Row,
    RowResult,
    UnknownRowError,
    choose_rows,
    parse_peer,
    render,
    to_json,
)
from tests.bench.canned import DONE, Answer, CannedServer, role, text, usage, whole_answer
from tests.bench.test_cli import bench


def slow_answer(_: int) -> Answer:
    """The same as `whole_answer`, in several times its time, and with a role long before the first text."""
    return [0.01, role(), 0.19, text("one"), 0.05, text(" two"), 0.05, text(" three", "length"), usage(50, 3) + DONE]


def test_a_peer_is_a_name_a_url_and_options() -> None:
    assert parse_peer("vllm=http://h:1/v1") == Contender("vllm", "http://h:1/v1")
    assert parse_peer("t=https://h,model=a/b=c,text,without=ignore_eos,without=seed") == Contender(
        "t", "https://h", model="a/b=c", is_text_only=True, without=("ignore_eos", "seed")
    )


@pytest.mark.parametrize("text", ["vllm", "=http://h", "vllm=", "vllm=h:1", "v=http://h,txt", "v=http://h,model="])
def test_anything_else_is_no_peer(text: str) -> None:
    with pytest.raises(ValueError, match="a peer"):
        parse_peer(text)


def test_rows_are_chosen_by_name_in_the_order_asked_for() -> None:
    assert choose_rows("standard", None) == STANDARD
    assert [row.name for row in choose_rows("standard", "picture,text-1")] == ["picture", "text-1"]
    with pytest.raises(UnknownRowError, match=r"no row 'txt': it has text-1, text-8, .*stall"):
        choose_rows("standard", "text-1,txt")
    assert len({row.name for row in STANDARD}) == len(STANDARD)


def test_a_text_model_is_not_asked_for_pictures() -> None:
    peer = Contender("v", "http://h", is_text_only=True)
    assert [row.name for row in STANDARD if peer.can(row)] == ["text-1", "text-8", "text-32", "prompt-1024"]


def test_a_ratio_above_one_is_in_our_favour_whatever_is_measured() -> None:
    rates = RowResult(Row(name="a", measure="tokens/s"), {"ours": [30.0, 20.0], "peer": [10.0, 40.0]})
    times = RowResult(Row(name="b", measure="first token"), {"ours": [10.0, 40.0], "peer": [30.0, 20.0]})
    assert rates.ratios("ours", "peer") == times.ratios("ours", "peer") == [3.0, 0.5]


def test_the_table_has_medians_and_the_spread_of_ratios() -> None:
    row = Row(name="text-1", measure="tokens/s", input_len=8, output_len=4)
    result = RowResult(row, {"ours": [20.0, 30.0, 90.0], "peer": [10.0, 10.0, 10.0]}, {"gap, ms": [1.0, 2.0, 3.0]})
    alone = RowResult(Row(name="stall", measure="stall", images=1), {"ours": [1234.0]})
    contenders = [Contender("ours", "http://h"), Contender("peer", "http://p")]
    assert render([result, alone], contenders).splitlines()[2:] == [
        "| text-1 | output tokens/s; 8 in, 4 out, 1 at once | 30 | 10 | **3.00×** (2.00 to 9.00) | gap, ms 2 |",
        "| stall | ms, largest gap; 32 in + 640×480 split, 2 out, 1 at once | 1234 |  |  |  |",
    ]
    assert to_json([result])[0]["rounds"] == {"ours": [20.0, 30.0, 90.0], "peer": [10.0, 10.0, 10.0]}


def test_rows_are_measured_on_us_and_on_a_peer_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "suite.json"
    order: list[str] = []

    def noting(name: str, script) -> object:
        return lambda number: (order.append(name), script(number))[1]

    ours, peer = CannedServer(script=noting("ours", whole_answer)), CannedServer(script=noting("peer", slow_answer))
    with ours.running(), peer.running():
        status = bench(
            "--base-url", ours.url, "--suite", "standard", "--rows", "text-1,prompt-1024", "--rounds", "2",
            "--peer", f"slow={peer.url},text,model=other,without=ignore_eos", "--output", str(path),
        )  # fmt: skip
    assert status == 0
    assert [name for name, _ in itertools.groupby(order)] == ["ours", "peer", "ours", "peer", "ours"]
    assert len(ours.bodies) == len(peer.bodies) == 2 * (2 + 3)
    assert {body["model"] for body in peer.bodies} == {"other"}
    assert all("ignore_eos" not in body for body in peer.bodies)
    assert all(body["ignore_eos"] for body in ours.bodies)
    said = [json.dumps(body["messages"]) for body in ours.bodies]
    assert len(set(said)) == len(said)
    assert sorted(said) == sorted(json.dumps(body["messages"]) for body in peer.bodies)
    saved = json.loads(path.read_text())
    assert [row["row"] for row in saved["rows"]] == ["text-1", "prompt-1024"]
    first_token = saved["rows"][1]["rounds"]
    assert all(its > 150 > mine for mine, its in zip(first_token["ours"], first_token["slow"], strict=True))
    assert "medians of 2 rounds, in turn" in capsys.readouterr().out


def test_a_second_turn_goes_on_from_the_first() -> None:
    with CannedServer().running() as server:
        assert bench("--base-url", server.url, "--suite", "standard", "--rows", "second-turn", "--rounds", "1") == 0
    firsts, seconds = server.bodies[:3], server.bodies[3:]
    for first, second in zip(firsts, seconds, strict=True):
        assert second["messages"][:1] == first["messages"]
        assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
        assert first["messages"][0]["content"][0]["type"] == "image_url"
    assert len({json.dumps(body["messages"][1:]) for body in seconds}) == 3


def test_a_failed_request_ends_the_suite(capsys: pytest.CaptureFixture[str]) -> None:
    with CannedServer(script=lambda _: JSONResponse({"error": {"message": "boom"}}, status_code=500)).running() as ours:
        assert bench("--base-url", ours.url, "--suite", "standard", "--rows", "text-1") == 1
    assert capsys.readouterr().err == "bench: ours, text-1: HTTP 500: boom\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "text-1"], "belong to a --suite"),
        (["--suite", "standard", "--rows", "no"], "has no row 'no'"),
        (["--suite", "standard", "--peer", "ours=http://h"], "a name of its own"),
        (["--suite", "standard", "--peer", "a=http://h", "--peer", "a=http://i"], "a name of its own"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*flags) == 2
    assert message in capsys.readouterr().err


def test_a_malformed_peer_is_refused_by_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--suite", "standard", "--peer", "vllm"])
    assert "a peer is NAME=URL" in capsys.readouterr().err
