"""The command against a server of the test's own: what is sent, written, resumed, printed and returned."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pty
import re
import signal
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from starlette.responses import Response

from server import cli
from server.batch.cli import NOT_THE_ENGINES
from server.batch.targets import LISTENING
from server.config import ENV_PREFIX, ServerConfig
from tests.batch.canned import CannedServer, answer, cut, refusal, slowly
from tests.batch.command import started
from tests.batch.files import by_id, line, num_lines, read_output, write_lines
from tests.listening import wait_until
from tests.serving import free_port


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(ENV_PREFIX) or name == "OPENAI_API_KEY":
            monkeypatch.delenv(name)


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """A model of our own sets up the logs of the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def run_batch(files: tuple[Path, Path], *flags: str) -> int:
    source, output = files
    return cli.main(["run-batch", "-i", str(source), "-o", str(output), *flags])


def test_every_line_gets_one_line(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"line {number}" for number in range(150)]
    lines: list[dict[str, Any] | str] = [line(name) for name in names]
    lines[10:10] = ["nope", "", json.dumps(line("line 0")), json.dumps(line("bad") | {"method": "GET"})]
    write_lines(files[0], lines)
    with CannedServer(slowly).running() as server:
        assert run_batch(files, "--base-url", server.url + "/v1/", "--max-in-flight", "40") == 1
    records = read_output(files[1])
    assert len(records) == 153
    answers = by_id(record for record in records if record["response"])
    assert answers.keys() == set(names)
    for name in names:
        response = answers[name]["response"]
        assert (response["status_code"], response["request_id"]) == (200, f"req-{name}")
        assert response["body"]["echo"] == name
    errors = {
        record["error"]["line"]: (record["custom_id"], record["error"]["code"])
        for record in records[:]
        if record["error"]
    }
    assert errors == {
        11: (None, "invalid_json_line"),
        13: ("line 0", "duplicate_custom_id"),
        14: ("bad", "invalid_method"),
    }
    assert server.peak == 40
    assert sorted(server.asked) == sorted(names)
    assert server.paths == {"/v1/chat/completions"}
    out, err = capsys.readouterr()
    numbers = dict(row.split(None, 1) for row in out.replace("tokens ", "tokens_").splitlines())
    assert (numbers["lines"], numbers["ok"], numbers["failed"], numbers["skipped"]) == ("153", "150", "3", "0")
    assert numbers["tokens_in"].startswith("450 (")
    assert numbers["tokens_out"].startswith("300 (")
    assert 0.15 < float(numbers["seconds"]) < 30
    assert err == ""


def test_all_is_well(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(files[0], [line("a"), line("b", {"name": "b", "stream": False}, url="/v1/responses")])
    with CannedServer().running() as server:
        assert run_batch(files, "--base-url", server.url) == 0
        assert run_batch(files, "--base-url", server.url) == 0
    assert len(server.asked) == 2
    assert server.paths == {"/v1/chat/completions", "/v1/responses"}
    assert "2 (answered by an earlier run)" in capsys.readouterr().out


def test_an_empty_batch_is_done(files: tuple[Path, Path]) -> None:
    write_lines(files[0], ["", " "])
    assert run_batch(files, "--base-url", f"http://127.0.0.1:{free_port()}") == 0
    assert read_output(files[1]) == []


def test_bodies_are_sent_as_they_were_written(files: tuple[Path, Path]) -> None:
    body = '{"name":  "x", "seed": 123456789012345678901234567890, "text": "\\u00e9 é"}'
    write_lines(files[0], [json.dumps(line("x")).replace('{"name": "x"}', body)])
    with CannedServer().running() as server:
        assert run_batch(files, "--base-url", server.url) == 0
    assert server.bodies == [body.encode()]
    assert server.headers[0]["content-type"] == "application/json"
    assert "authorization" not in server.headers[0]


def test_the_key_is_the_flags_or_the_environments(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    with CannedServer().running() as server:
        write_lines(files[0], [line("a")])
        assert run_batch(files, "--base-url", server.url) == 0
        write_lines(files[0], [line("b")])
        assert run_batch(files, "--base-url", server.url, "--api-key", "from-flag") == 0
    assert [sent["authorization"] for sent in server.headers] == ["Bearer from-environment", "Bearer from-flag"]


def test_failures_are_kept_until_asked_for_again(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    broken = True

    async def script(name: str, attempt: int) -> Response:
        if not broken or name == "good":
            return answer(name)
        return cut() if name == "cut" else refusal(int(name))

    write_lines(files[0], [line(name) for name in ("good", "400", "500", "cut")] + ["nope"])
    with CannedServer(script).running() as server:
        flags = ("--base-url", server.url, "--max-retries", "0")
        assert run_batch(files, *flags) == 1
        found = by_id(read_output(files[1]))
        assert [found[name]["response"]["status_code"] for name in ("good", "400", "500")] == [200, 400, 500]
        assert found["cut"]["error"]["code"] == "connection_error"
        assert found["cut"]["error"]["line"] == 4
        broken = False
        assert run_batch(files, *flags) == 1
        assert "5 (answered by an earlier run, 4 of them without success: --retry-failed" in capsys.readouterr().out
        assert len(server.asked) == 4
        write_lines(files[0], [line(name) for name in ("good", "400", "500", "cut", "mended")])
        assert run_batch(files, *flags, "--retry-failed") == 0
    assert server.attempts == {"good": 1, "400": 2, "500": 2, "cut": 2, "mended": 1}
    assert all(record["response"]["status_code"] == 200 for record in by_id(read_output(files[1])).values())


def test_429_and_503_are_waited_out_and_each_line_answered_once(files: tuple[Path, Path]) -> None:
    async def script(name: str, attempt: int) -> Response:
        await asyncio.sleep(0.01)
        if server.in_flight > 4:
            return refusal(429 if attempt % 2 else 503, **{"retry-after": "0.1"})
        return answer(name)

    names = [f"{number}" for number in range(40)]
    write_lines(files[0], map(line, names))
    with CannedServer(script).running() as server:
        assert run_batch(files, "--base-url", server.url, "--max-in-flight", "16") == 0
    assert by_id(read_output(files[1])).keys() == set(names)
    assert len(server.asked) > 40


def test_a_server_that_goes_away_leaves_the_rest_to_the_next_run(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(files[0], [line(f"{number}") for number in range(20)])
    assert run_batch(files, "--base-url", f"http://127.0.0.1:{free_port()}", "--max-retries", "0") == 1
    assert "cannot be reached" in capsys.readouterr().err
    assert read_output(files[1]) == []
    with CannedServer().running() as server:
        assert run_batch(files, "--base-url", server.url) == 0
    assert len(by_id(read_output(files[1]))) == 20


def test_a_bar_for_a_terminal_only(files: tuple[Path, Path]) -> None:
    write_lines(files[0], [*(line(f"{number}") for number in range(30)), "", "nope"])
    shown = []
    with CannedServer(slowly).running() as server:
        for flags in ((), ("--quiet",)):
            files[1].unlink(missing_ok=True)
            terminal, stderr = pty.openpty()
            termios.tcsetwinsize(stderr, (24, 120))
            with (
                open(terminal, "rb", buffering=0) as screen,
                started(*files, "--base-url", server.url, "--max-in-flight", "1", *flags, stderr=stderr) as process,
            ):
                os.close(stderr)
                shown.append(read_screen(screen))
                assert process.wait(10) == 1
    assert "run-batch: " in shown[0]
    assert "31/32" in shown[0]  # a blank line was counted with the rest
    assert re.search(r"failed 1, in [1-9][0-9]* tok/s, out [1-9]", shown[0])
    assert shown[1] == ""


def read_screen(screen: IO[bytes]) -> str:
    """All that comes until the other side is closed, which a terminal reports as an error."""
    shown = b""
    with contextlib.suppress(OSError):
        while piece := screen.read(4096):
            shown += piece
    return shown.decode()


# -- a run that is ended --------------------------------------------------------------------------------------------


def test_after_kill_9_the_same_command_goes_on(files: tuple[Path, Path]) -> None:
    names = [f"{number}" for number in range(200)]
    write_lines(files[0], map(line, names))
    with CannedServer(slowly).running() as server:
        flags = ("--base-url", server.url, "--max-in-flight", "8")
        for wanted in (30, 90):
            with started(*files, *flags) as process:
                wait_until(lambda wanted=wanted: num_lines(files[1]) >= wanted, 30)
                process.kill()
                assert process.wait(10) == -signal.SIGKILL
            done = num_lines(files[1])
            assert wanted <= done < 200
            # What a kill in the middle of a write leaves, which no test can time.
            before = files[1].read_bytes()
            files[1].write_bytes(
                before + b'{"id":"batch_req_0123","custom_id":"199","response":{"status_code":200,"requ'
            )
        assert run_batch(files, *flags) == 0
    assert files[1].read_bytes().startswith(before)
    assert by_id(read_output(files[1])).keys() == set(names)
    assert len(server.asked) <= 200 + 2 * 8


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_what_is_in_flight_end(files: tuple[Path, Path], signum: signal.Signals) -> None:
    async def script(name: str, attempt: int) -> Response:
        await asyncio.sleep(0.7)
        return answer(name)

    write_lines(files[0], [*(line(f"{number}") for number in range(6)), *["nope"] * 100])
    with (
        CannedServer(script).running() as server,
        started(*files, "--base-url", server.url, "--max-in-flight", "3") as process,
    ):
        wait_until(lambda: len(server.asked) == 6, 30)
        process.send_signal(signum)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "run-batch: interrupted; the same command goes on from here\n"
    assert len(server.asked) == 6
    assert by_id(read_output(files[1])).keys() == set(server.asked)
    assert "ok          6" in out


def test_a_line_that_waits_for_a_busy_server_is_not_in_the_way_of_a_signal(files: tuple[Path, Path]) -> None:
    async def script(name: str, attempt: int) -> Response:
        return refusal(429, **{"retry-after": "100"})

    write_lines(files[0], [line(f"{number}") for number in range(9)])
    with CannedServer(script).running() as server, started(*files, "--base-url", server.url) as process:
        wait_until(lambda: len(server.asked) == 9, 30)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "run-batch: interrupted; the same command goes on from here\n")
    assert read_output(files[1]) == []


def test_what_is_in_flight_is_given_up_after_the_timeout_or_the_second_signal(files: tuple[Path, Path]) -> None:
    async def script(name: str, attempt: int) -> Response:
        await asyncio.sleep(0.0 if name == "quick" else 100.0)
        return answer(name)

    write_lines(files[0], [line("quick"), line("long")])
    with CannedServer(script).running() as server:
        for flags, signals in ((("--shutdown-timeout", "0.2"), 1), (("--shutdown-timeout", "100"), 2)):
            begun = len(server.asked)
            with started(*files, "--base-url", server.url, *flags) as process:
                wait_until(lambda begun=begun: "long" in server.asked[begun:], 30)
                wait_until(lambda: num_lines(files[1]) == 1, 30)
                for _ in range(signals):
                    process.send_signal(signal.SIGINT)
                    time.sleep(0.1)
                assert process.wait(30) == 130
            assert by_id(read_output(files[1])).keys() == {"quick"}


def test_a_model_that_cannot_be_loaded_is_one_line_and_status_two(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], logging_as_it_was: None
) -> None:
    write_lines(files[0], [line("a")])
    (folder := files[0].with_name("empty")).mkdir()
    assert run_batch(files, str(folder)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "config.json" in err


# -- what is refused before anything is done ------------------------------------------------------------------------


def test_the_input_is_never_the_output(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = files
    write_lines(source, [line("a")])
    link = source.with_name("link")
    link.symlink_to(source)
    twin = source.with_name("twin")
    twin.hardlink_to(source)
    for output in (source, link, twin, source.parent / "." / source.name):
        assert run_batch((source, output)) == 2
        assert "same file" in capsys.readouterr().err
    assert source.read_text() == json.dumps(line("a")) + "\n"


def test_a_file_that_is_no_output_is_not_appended_to(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(files[0], [line("a")])
    files[1].write_text("my notes")
    assert run_batch(files, "--base-url", "http://127.0.0.1:1") == 2
    assert "not a batch's output" in capsys.readouterr().err
    assert files[1].read_text() == "my notes"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base-url", "127.0.0.1:8000"], "--base-url: must be an http(s) URL"),
        (["--base-url", "http://"], "--base-url: must be an http(s) URL"),
        (["--base-url", "http://x", "--max-num-seqs", "3"], "max_num_seqs: sets up a model of our own"),
        (["--base-url", "http://x", "some/model"], "model: sets up a model of our own"),
        (["--base-url", "http://x", "--config", "x.yaml"], "config: sets up a model of our own"),
        (["--api-key", "x"], "--api-key: is sent to the server of --base-url"),
        (["--max-num-seqs", "0"], "flags: max_num_seqs: "),
        (["-i", "/nowhere"], "--input: cannot read /nowhere"),
        (["-i", "/dev/null"], "--input: /dev/null is not a regular file"),
        (["-o", "/nowhere/out"], "--output: there is no folder /nowhere"),
    ],
)
def test_what_does_not_go_together_is_one_line_and_status_two(
    files: tuple[Path, Path], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(files[0], [line("a")])
    assert run_batch(files, *flags) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not files[1].exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-in-flight", "0"],
        ["--max-wait", "-1"],
        ["--max-wait", "nan"],
        ["--timeout", "inf"],
        ["--max-retries", "x"],
        ["--host", "0.0.0.0"],
        ["--port", "1"],
        ["--quie"],
    ],
)
def test_flags_that_are_unknown_or_out_of_range(
    files: tuple[Path, Path], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(files[0], [line("a")])
    with pytest.raises(SystemExit) as caught:
        run_batch(files, *flags)
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_flags_are_serves_but_those_of_a_listener(capsys: pytest.CaptureFixture[str]) -> None:
    fields = ServerConfig.model_fields.keys()
    assert fields >= LISTENING | NOT_THE_ENGINES
    with pytest.raises(SystemExit):
        cli.main(["run-batch", "--help"])
    text = capsys.readouterr().out
    for name in fields - {"model", "api_key"}:  # --api-key is another thing here
        assert (f"--{name.replace('_', '-')}" in text) == (name not in LISTENING)
