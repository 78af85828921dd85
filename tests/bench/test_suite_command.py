from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.responses import JSONResponse

from server.bench import cli
from tests.bench.canned import DONE, Answer, CannedServer, Script, role, text, usage, whole_answer
from tests.bench.test_cli import bench


def slow_answer(_: int) -> Answer:
    """The same as `whole_answer`, in several times its time, and with a role long before the first text."""
    return [0.01, role(), 0.19, text("one"), 0.05, text(" two"), 0.05, text(" three", "length"), usage(50, 3) + DONE]


def noting(order: list[str], name: str, script: Script) -> Callable[[int], Answer]:
    """The script, whose server's name is noted for each request."""

    def answer(number: int) -> Answer:
        order.append(name)
        return script(number)

    return answer


def test_rows_are_measured_on_us_and_on_a_peer_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "suite.json"
    order: list[str] = []
    ours = CannedServer(script=noting(order, "ours", whole_answer))
    peer = CannedServer(script=noting(order, "peer", slow_answer))
    with ours.running(), peer.running():
        status = bench(
            "--base-url", ours.url, "--suite", "standard", "--rows", "text-1,prompt-1024", "--rounds", "2",
            "--peer", f"slow={peer.url},text,model=other,without=ignore_eos", "--output", str(path),
        )  # fmt: skip
    assert status == 0
    assert [name for name, _ in itertools.groupby(order)] == ["ours", "peer", "ours", "peer", "ours"]
    assert len(ours.bodies) == len(peer.bodies) == 2 * (2 + 3)
    saved = json.loads(path.read_text())
    assert [row["row"] for row in saved["rows"]] == ["text-1", "prompt-1024"]
    first_token = saved["rows"][1]["rounds"]
    assert all(its > 150 > mine for mine, its in zip(first_token["ours"], first_token["slow"], strict=True))
    printed = capsys.readouterr().out
    assert "medians of 2 rounds, in turn" in printed
    assert "| row | what | ours | slow | ours to slow | besides |" in printed


def test_what_is_saved_tells_how_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    with CannedServer().running() as server:
        assert bench(
            "--base-url", server.url, "--suite", "standard", "--rows", "text-1", "--rounds", "1", "--seed", "3",
            "--peer", f"peer={server.url},without=seed", "--api-key", "secret", "--output", str(path),
        ) == 0  # fmt: skip
    saved = json.loads(path.read_text())
    config = saved["config"]
    assert (config["suite"], config["rounds"], config["seed"]) == ("standard", 1, 3)
    assert config["tokens_counted_by"] == "one token a word assumed"
    ours, peer = config["contenders"]
    assert (ours["name"], ours["url"], ours["model"]) == ("ours", server.url, "canned")
    assert (peer["name"], peer["model"], peer["without"]) == ("peer", "canned", ["seed"])
    assert saved["machine"]["cores"] >= 1
    assert "secret" not in path.read_text()


def test_the_key_is_for_our_server_alone() -> None:
    ours, peer = CannedServer(), CannedServer()
    with ours.running(), peer.running():
        flags = ("--suite", "standard", "--rows", "text-1", "--rounds", "1", "--api-key", "secret")
        assert bench("--base-url", ours.url, "--peer", f"peer={peer.url}", *flags) == 0
    assert {headers.get("authorization") for headers in ours.headers} == {"Bearer secret"}
    assert {headers.get("authorization") for headers in peer.headers} == {None}


def test_runs_draw_new_prompts_unless_a_seed_is_given() -> None:
    with CannedServer().running() as server:
        for extra in ((), (), ("--seed", "5"), ("--seed", "5")):
            flags = ("--suite", "scaling", "--rows", "prompt-128", "--rounds", "1")
            assert bench("--base-url", server.url, *flags, *extra) == 0
    first, second, third, fourth = (body["messages"] for body in server.bodies)
    assert first != second
    assert third == fourth


def test_curves_are_drawn_as_far_as_a_server_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(number: int) -> Answer:
        return whole_answer(number) if number < 4 else JSONResponse({"detail": "too long"}, status_code=400)

    with CannedServer(script=script).running() as server:
        status = bench(
            "--base-url", server.url, "--suite", "scaling", "--rows", "prompt-128,images-0,prompt-4096",
            "--rounds", "2", "--plots", str(tmp_path / "new" / "plots"),
        )  # fmt: skip
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "new" / "plots").iterdir()) == ["images.svg", "prompt.svg"]
    printed = capsys.readouterr().out
    assert "! ours, prompt-4096: HTTP 400: too long" in printed
    assert printed.endswith("prompt.svg\n" + str(tmp_path / "new" / "plots" / "images.svg") + "\n")


def test_a_failed_request_ends_the_suite(capsys: pytest.CaptureFixture[str]) -> None:
    with CannedServer(script=lambda _: JSONResponse({"error": {"message": "boom"}}, status_code=500)).running() as ours:
        assert bench("--base-url", ours.url, "--suite", "standard", "--rows", "text-1") == 1
    assert capsys.readouterr() == ("", "bench: ours, text-1: HTTP 500: boom\n")


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(number: int) -> Answer:
        return whole_answer(number) if number < 2 else JSONResponse({"detail": "boom"}, status_code=500)

    path = tmp_path / "suite.json"
    with CannedServer(script=script).running() as server:
        flags = ("--suite", "standard", "--rows", "text-1,picture", "--rounds", "1", "--output", str(path))
        assert bench("--base-url", server.url, *flags) == 1
    assert [row["row"] for row in json.loads(path.read_text())["rows"]] == ["text-1"]
    captured = capsys.readouterr()
    assert "| text-1 |" in captured.out
    assert captured.err == "bench: ours, picture: HTTP 500: boom\n"


def test_a_peer_must_say_what_it_serves(capsys: pytest.CaptureFixture[str]) -> None:
    with CannedServer().running() as ours, CannedServer(models=[]).running() as peer:
        assert bench("--base-url", ours.url, "--suite", "standard", "--peer", f"p={peer.url}") == 1
    assert "p lists no model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "text-1"], "belong to a --suite"),
        (["--peer", "a=http://h"], "belong to a --suite"),
        (["--plots", "p"], "belong to a --suite"),
        (["--suite", "standard", "--rows", "no"], "has no row 'no'"),
        (["--suite", "standard", "--peer", "ours=http://h"], "a name of its own"),
        (["--suite", "standard", "--peer", "a=http://h", "--peer", "a=http://i"], "a name of its own"),
        (["--suite", "standard", "--plots", "p"], "draws the curves of --suite scaling"),
        (["--suite", "scaling", "--plots", "/dev/null/p"], "--plots: "),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*flags) == 2
    assert message in capsys.readouterr().err


def test_missing_matplotlib_is_told_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with CannedServer().running() as server:
        assert bench("--base-url", server.url, "--suite", "scaling", "--plots", str(tmp_path)) == 2
    assert server.bodies == []
    assert "pip install" in capsys.readouterr().err


def test_a_malformed_peer_is_refused_by_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--suite", "standard", "--peer", "vllm"])
    assert "a peer is NAME=URL" in capsys.readouterr().err
