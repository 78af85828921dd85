"""The command in pipes: what is sent, what comes out where, and with which status."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.responses import JSONResponse

from server.chat import cli
from server.errors import ConfigError
from tests.bench.canned import DONE, CannedServer, text, usage
from tests.bench.canned import Answer as Script
from tests.chat.terminal import chat_environment, piped
from tests.inputs.pictures import noise_png
from tests.listening import wait_until
from tests.serving import ROOT, command, free_port


@pytest.fixture(scope="module")
def canned() -> Iterator[CannedServer]:
    with CannedServer(script=lambda _: [text("an ä", "stop"), usage(5, 2) + DONE]).running() as server:
        yield server


@pytest.fixture
def server(canned: CannedServer) -> CannedServer:
    canned.bodies.clear()
    canned.headers.clear()
    return canned


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(flags)


def run(*flags: str) -> int:
    """In this very process; its output is the test's."""
    return cli.run(parsed(*flags))


def test_all_flags_reach_the_server(server: CannedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a b.png"
    file.write_bytes(noise_png(8, 8))
    status = run(
        "--base-url", f"{server.url}/v1", "--model", "mine", "--system", "s", "--image", str(file), "http://a/b",
        "--image", "http://c", "--detail", "low", "--temperature", "0", "--top-p", "0.5", "--max-tokens", "9",
        "--seed", "3", "--once", "what?",
    )  # fmt: skip
    assert status == 0
    (body,) = server.bodies
    assert {name: body[name] for name in ("model", "temperature", "top_p", "max_tokens", "seed")} == {
        "model": "mine", "temperature": 0.0, "top_p": 0.5, "max_tokens": 9, "seed": 3,
    }  # fmt: skip
    system, user = body["messages"]
    assert system == {"role": "system", "content": "s"}
    assert [part["type"] for part in user["content"]] == ["image_url"] * 3 + ["text"]
    assert all(part["image_url"]["detail"] == "low" for part in user["content"][:3])
    captured = capsys.readouterr()
    assert captured.out == "an ä\n"
    assert captured.err.startswith("5 prompt tokens")


def test_without_flags_only_the_question_is_sent_to_the_first_model(server: CannedServer) -> None:
    assert run("--base-url", server.url, "--once", "what?") == 0
    (body,) = server.bodies
    del body["stream"], body["stream_options"]
    assert body == {"model": "canned", "messages": [{"role": "user", "content": "what?"}]}


def test_a_question_comes_through_a_pipe(server: CannedServer, tmp_path: Path) -> None:
    done = piped(tmp_path, "--base-url", server.url, text="wäs\nis it?\n")
    assert (done.returncode, done.stdout.decode()) == (0, "an ä\n")
    assert done.stderr.startswith(b"5 prompt tokens, 2 completion tokens, first after ")
    assert done.stderr.count(b"\n") == 1
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "wäs\nis it?"}]
    assert list(tmp_path.iterdir()) == []  # a script leaves no history


def test_output_that_cannot_hold_a_character_gets_another(server: CannedServer, tmp_path: Path) -> None:
    done = piped(tmp_path, "--base-url", server.url, "--once", "a", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stdout) == (0, b"an ?\n")


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_not_sent(server: CannedServer, question: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--base-url", server.url, "--once", question) == 1
    assert capsys.readouterr().err == "chat: the question is empty\n"
    assert server.bodies == []


def test_a_picture_that_cannot_be_is_told_before_anything_is_sent(
    server: CannedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--base-url", server.url, "--image", "/nowhere.png", "--once", "a") == 1
    assert capsys.readouterr().err == "chat: cannot read /nowhere.png: No such file or directory\n"
    assert server.bodies == []


def test_where_the_key_comes_from(server: CannedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    flags = ("--base-url", server.url, "--once", "a")
    assert run(*flags) == 0
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    assert run(*flags) == 0
    assert run(*flags, "--api-key", "from-flag") == 0
    assert run(*flags, "--api-key-file", str(file)) == 0
    keys = [headers.get("authorization") for headers in server.headers]
    assert keys == [None, "Bearer from-environment", "Bearer from-flag", "Bearer from-file"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base-url", "127.0.0.1:8000"], "--base-url: must be an http(s) URL"),
        (["--base-url", "http://"], "--base-url: must be an http(s) URL"),
        (["--base-url", "http://a:b"], "--base-url: must be an http(s) URL"),
        (["--base-url", "http://["], "--base-url: must be an http(s) URL"),
        (["--base-url", "http://u:p@a"], "--base-url: must have no user name, query or fragment"),
        (["--base-url", "http://a/v1?b"], "--base-url: must have no user name, query or fragment"),
        (["--api-key", "a b"], "--api-key: a key is one word of printable ASCII characters"),
        (["--api-key-file", "/nowhere"], "--api-key-file: cannot read /nowhere: No such file or directory"),
        (["--api-key-file", os.devnull], f"--api-key-file: {os.devnull} is empty"),
    ],
)
def test_flags_that_cannot_be_used_are_told(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(*flags, "--once", "a")
    assert str(caught.value) == message


def test_a_key_in_the_environment_that_cannot_be_sent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY: a key is one word") as caught:
        run("--once", "a")
    assert "a\nb" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "3"], "argument --temperature: must be from 0 to 2, not 3"),
        (["--top-p", "0"], "argument --top-p: must be above 0 and at most 1, not 0"),
        (["--max-tokens", "x"], "argument --max-tokens: must be a whole number, not 'x'"),
        (["--seed", "x"], "argument --seed: must be a whole number, not 'x'"),
        (["--detail", "max"], "argument --detail: must be one of auto, low, high, not 'max'"),
        (["--timeout", "0"], "argument --timeout: must be above 0, not 0"),
        (["--timeout", "x"], "argument --timeout: must be a number, not 'x'"),
        (["--api-key", "a", "--api-key-file", "b"], "argument --api-key-file: not allowed with argument --api-key"),
    ],
)
def test_values_are_checked_at_once(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_refused_key_says_how_to_give_one(capsys: pytest.CaptureFixture[str]) -> None:
    refusal = JSONResponse({"error": {"message": "Incorrect API key"}}, 401)
    with CannedServer(script=lambda _: refusal).running() as server:
        assert run("--base-url", server.url, "--once", "a") == 1
    assert capsys.readouterr().err == (
        "chat: HTTP 401: Incorrect API key\ngive a key with --api-key-file, --api-key or the environment's "
        "OPENAI_API_KEY\n"
    )


def test_no_server_says_what_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    assert run("--base-url", f"http://127.0.0.1:{port}", "--once", "a") == 1
    assert f"start a server there: idefics2-server serve --port {port}" in capsys.readouterr().err


def test_a_server_without_models_wants_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    with CannedServer(models=[]).running() as server:
        assert run("--base-url", server.url, "--once", "a") == 1
    assert capsys.readouterr().err == "chat: the server lists no model: name one with --model\n"


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    script: Script = [text("line\n"), 0.2, *[text("more\n")] * 50, text("", "stop") + DONE]
    with CannedServer(script=lambda _: script).running() as server:
        process = subprocess.Popen(
            command("chat", "--base-url", server.url, "--once", "a"),
            cwd=ROOT,
            env=chat_environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        process.stderr.close()
        assert process.wait(30) == 1


def test_ctrl_c_ends_a_script_with_its_status(tmp_path: Path) -> None:
    with CannedServer(script=lambda _: [text("half"), 60.0]).running() as server:
        process = subprocess.Popen(
            command("chat", "--base-url", server.url, "--once", "a"),
            cwd=ROOT,
            env=chat_environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.read(4) == b"half"
        process.send_signal(signal.SIGINT)
        rest, noted = process.communicate(timeout=30)
        assert (process.returncode, rest, noted) == (130, b"\n", b"")
        wait_until(lambda: server.in_flight == 0)


def test_it_starts_without_what_it_does_not_need() -> None:
    code = "import sys; from server.chat import cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "tokenizers", "numpy", "PIL", "fastapi", "starlette", "pydantic", "uvicorn"}
    assert not heavy & set(loaded.stdout.split())
