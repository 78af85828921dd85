from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from starlette.responses import JSONResponse

from server.bench import cli
from server.bench.target import Target, TargetError
from tests.bench.canned import Answer, CannedServer, whole_answer


def bench(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([*flags, "--no-progress"]))


def test_measures_a_server_and_saves_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    with CannedServer().running() as server:
        status = bench(
            "--base-url", f"{server.url}/v1", "--concurrency", "2", "--num-requests", "4", "--warmup", "1",
            "--input-len", "20", "--output-len", "3", "--seed", "7", "--output", str(path), "--save-requests",
        )  # fmt: skip
    assert status == 0
    printed = capsys.readouterr().out
    assert "canned at" in printed
    assert "4 done, 0 failed" in printed
    assert "!" not in printed
    report = json.loads(path.read_text())
    assert len(report["requests"]) == 4
    assert report["summary"]["completion_tokens"] == 12
    config = report["config"]
    assert (config["model"], config["concurrency"], config["seed"], config["warmup"]) == ("canned", 2, 7, 1)
    assert config["tokens_counted_by"] == "one token a word assumed"
    assert len(server.bodies) == 5
    assert server.bodies[0]["model"] == "canned"


def test_any_failed_request_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    def script(number: int) -> Answer:
        return whole_answer(number) if number < 2 else JSONResponse({"error": {"message": "boom"}}, status_code=500)

    with CannedServer(script=script).running() as server:
        status = bench("--base-url", server.url, "--concurrency", "1", "--num-requests", "2", "--warmup", "1")
    assert status == 1
    assert "failed: 1 × HTTP 500: boom" in capsys.readouterr().out


def test_runs_draw_new_prompts_unless_a_seed_is_given() -> None:
    with CannedServer().running() as server:
        flags = ("--base-url", server.url, "--num-requests", "1", "--warmup", "0")
        for extra in ((), (), ("--seed", "5"), ("--seed", "5")):
            assert bench(*flags, *extra) == 0
    first, second, third, fourth = (body["messages"] for body in server.bodies)
    assert first != second
    assert third == fourth


def test_an_open_loop_run(capsys: pytest.CaptureFixture[str]) -> None:
    with CannedServer().running() as server:
        flags = ("--base-url", server.url, "--request-rate", "100", "--num-requests", "5", "--max-concurrency", "2")
        assert bench(*flags) == 0
    assert len(server.bodies) == 6  # one to warm up
    assert server.peak <= 2
    assert "100 requests/s, poisson" in capsys.readouterr().out


def test_what_is_asked_of_each_request_is_sent() -> None:
    with CannedServer().running() as server:
        assert bench(
            "--base-url", server.url, "--num-requests", "1", "--warmup", "0", "--images", "2", "--image-size", "32x24",
            "--image-detail", "low", "--temperature", "0.5", "--output-len", "9", "--extra-body", '{"top_k": 4}',
        ) == 0  # fmt: skip
    request = server.bodies[0]
    assert (request["temperature"], request["max_completion_tokens"], request["top_k"]) == (0.5, 9, 4)
    parts = request["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    assert parts[0]["image_url"]["detail"] == "low"


def test_the_servers_own_tokenizer_counts() -> None:
    def count(text: str) -> int:
        return sum(2 if word.startswith("c") else 1 for word in text.split())

    with CannedServer(count_tokens=count).running() as server:
        assert bench("--base-url", server.url, "--num-requests", "1", "--warmup", "0", "--input-len", "300") == 0
    assert count(server.bodies[0]["messages"][0]["content"]) == 300


def test_the_key_of_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with CannedServer().running() as server:
        assert bench("--base-url", server.url, "--num-requests", "1", "--warmup", "0") == 0
    assert server.headers[0]["authorization"] == "Bearer secret"


def test_a_key_given_as_a_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with CannedServer().running() as server:
        flags = ("--base-url", server.url, "--api-key", "other", "--num-requests", "1", "--warmup", "0")
        assert bench(*flags) == 0
    assert {headers.get("authorization") for headers in server.headers} == {"Bearer other"}


def test_failed_warmups_end_the_run_with_their_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with CannedServer(script=lambda _: JSONResponse({"detail": "no"}, status_code=400)).running() as server:
        assert bench("--base-url", server.url, "--num-requests", "9", "--warmup", "2") == 1
    assert len(server.bodies) == 2
    assert "HTTP 400: no" in capsys.readouterr().err


@pytest.mark.parametrize("status", [503, 429])
def test_waits_for_a_server_that_is_loading_or_busy(status: int) -> None:
    canned = CannedServer(refusals_before_ready=1, refusal_status=status, models=["a", "b"])
    with canned.running() as server, Target(server.url) as target:
        assert target.wait_ready(5.0) == ["a", "b"]


def test_the_wait_ends_with_what_was_answered_last() -> None:
    with CannedServer(refusals_before_ready=99).running() as server, Target(server.url) as target:
        with pytest.raises(TargetError, match=r"not ready after 0\.1 s: HTTP 503"):
            target.wait_ready(0.1)
        assert server.refusals_before_ready == 98


def test_a_path_that_is_not_there_is_not_waited_for() -> None:
    with (
        CannedServer().running() as server,
        Target(f"{server.url}/elsewhere") as target,
        pytest.raises(TargetError, match="HTTP 404"),
    ):
        target.wait_ready(600.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-concurrency", "4"], "needs --request-rate"),
        (["--shared-prefix-len", "256"], "must be below --input-len"),
        (["--output", "/nowhere/at/all.json"], "no folder"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--concurrency", "0"], "must be at least 1, not 0"),
        (["--request-rate", "inf"], "must be at least"),
        (["--num-requests", "x"], "invalid int value"),
        (["--image-size", "640"], "WIDTHxHEIGHT"),
        (["--image-size", "0x4"], "WIDTHxHEIGHT"),
        (["--extra-body", "[1]"], "must be a JSON object"),
        (["--extra-body", "{"], "not JSON"),
        (["--concurrency", "2", "--request-rate", "1"], "not allowed with"),
    ],
)
def test_flags_out_of_range_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench(*flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_must_come_from_somewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with CannedServer(models=[]).running() as server:
        assert bench("--base-url", server.url) == 1
    assert "name one with --model" in capsys.readouterr().err
