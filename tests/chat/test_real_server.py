"""The chat in a real pseudo-terminal, and in a pipe, against a real server with a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.chat.screen import harmless
from tests.chat.terminal import CTRL_C, chatting, piped, plain
from tests.inputs.pictures import noise_png
from tests.serving import SMALL, Server, running_server


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("chat") / "log"
    with running_server(tiny_checkpoint, log, *SMALL, "--engine-client", "thread") as running:
        yield running
        running.wait_until_idle()


def answer_of(server: Server, messages: list[object], max_tokens: int) -> str:
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0}
    response = httpx.post(f"{server.base_url}/v1/chat/completions", json=body, timeout=60)
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


def test_a_conversation_about_a_picture(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(noise_png(40, 30))
    file = tmp_path / "said.json"
    flags = ("--base-url", server.base_url, "--temperature", "0", "--max-tokens", "12")
    with chatting(tmp_path, *flags, TERM="dumb") as terminal:
        terminal.prompt()
        terminal.enter(f"/image {tmp_path}/a.png low")
        terminal.until("[1 picture] > ")
        terminal.enter("What is this?")
        first = terminal.until_match(r"\n\d+ prompt tokens[^\n]*")
        assert "12 completion tokens" in first
        assert "finish reason: length" in first
        terminal.prompt()
        terminal.enter("Are you sure?")
        second = terminal.until_match(r"\n\d+ prompt tokens[^\n]*")
        assert " cached), 12 completion tokens" in second  # the first turn and its picture
        terminal.prompt()
        terminal.enter(f"/save {file}")
        terminal.prompt()

        messages = json.loads(file.read_text(encoding="utf-8"))
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2
        for index, shown in ((1, first), (3, second)):
            said = messages[index]["content"]
            assert said == answer_of(server, messages[:index], 12)
            assert harmless(said).strip() in plain(shown)

        terminal.enter("/set max_tokens 1800")
        terminal.prompt()
        terminal.enter("Tell me all.")
        terminal.until_match(r"Tell me all.\r\n\s*\S")
        terminal.type(CTRL_C)
        assert "stopped: what was said is kept" in terminal.prompt()
        server.wait_until_idle()
        assert terminal.leave() == 0


def test_one_question_in_a_script(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(noise_png(40, 30))
    flags = ("--base-url", server.base_url, "--temperature", "0", "--max-tokens", "8")
    done = piped(tmp_path, *flags, "--image", str(tmp_path / "a.png"), text="What is this?\n")
    assert done.returncode == 0, done.stderr
    assert b"8 completion tokens" in done.stderr
    plain_text = piped(tmp_path, *flags, "--once", "Hello?")
    expected = answer_of(server, [{"role": "user", "content": "Hello?"}], 8)
    assert plain_text.stdout.decode().removesuffix("\n") == expected.removesuffix("\n")


def test_what_the_server_refuses_is_told_in_its_words(server: Server, tmp_path: Path) -> None:
    done = piped(tmp_path, "--base-url", server.base_url, "--model", "nobody", "--once", "a")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"chat: HTTP 404: ")
    assert b"does not exist" in done.stderr
