"""The command with a model of its own, as a user runs it: real processes, real pictures, kills and signals."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.batch.command import started
from tests.batch.files import by_id, line, num_lines, read_output, write_lines
from tests.engines import noise_image, png
from tests.serving import Server, running_server

SMALL = ("--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "4", "--kv-cache-memory-gb", "0.1")


def data_url(seed: int) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(noise_image(300 + seed, 200, seed))).decode()}"


def ask(text: str, *, pictures: int = 0, **options: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(seed), "detail": "low"}} for seed in range(pictures)
    ]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return {"messages": messages, "temperature": 0, "max_tokens": 6, "ignore_eos": True, **options}


NO_PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
BAD: list[dict[str, Any] | str] = [
    line("too hot", ask("x", temperature=9)),
    line("bad picture", ask("x", messages=[{"role": "user", "content": [NO_PICTURE]}])),
    line("elsewhere", url="/v1/embeddings"),
    line("streamed", ask("x", stream=True)),
    "nope",
]
GOOD = [
    *(line(f"picture {number}", ask(f"Colour {number}?", pictures=number)) for number in range(1, 4)),
    *(line(f"text {number}", ask(f"Question {number}?", max_tokens=40)) for number in range(24)),
]
LINES = [*BAD, *GOOD]


def finish(source: Path, output: Path, *flags: str) -> tuple[int, str, str]:
    with started(source, output, *flags) as process:
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while num_lines(path) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Processes whose parent this is."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until_gone(pids: list[int], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


def choices(output: Path) -> dict[str, Any]:
    """Of each answer of status 200, what was said and what it cost."""
    records = [record for record in read_output(output) if record["response"]]
    return {
        name: (record["response"]["body"]["choices"][0], record["response"]["body"]["usage"]["prompt_tokens"])
        for name, record in by_id(records).items()
        if record["response"]["status_code"] == 200
    }


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """What a kill has left but for a torn last line."""
    content = path.read_bytes()
    copy = path.with_name("copy")
    copy.write_bytes(content[: content.rfind(b"\n") + 1])
    return read_output(copy)


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(tiny_checkpoint, log, *SMALL, "--engine-client", "thread") as running:
        yield running


@pytest.fixture(scope="module")
def offline(server: Server, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of LINES after a run that was killed, one whose engine was, and one that was interrupted, each with
    a model of its own; the rest is asked of a server, so that it need not be loaded once more."""
    folder = tmp_path_factory.mktemp("offline")
    source, output = write_lines(folder / "in", LINES), folder / "out"
    flags = (str(tiny_checkpoint), *SMALL, "--max-in-flight", "2")

    with started(source, output, *flags) as process:
        wait_for_lines(output, len(BAD) + 6, process)
        helpers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert helpers
    wait_until_gone(helpers)
    killed = whole_lines(output)
    assert len(BAD) + 6 <= len(killed) < len(LINES)

    with started(source, output, *flags, "--max-engine-restarts", "0") as process:
        wait_for_lines(output, len(killed) + 3, process)
        for pid in children(process.pid):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the engine is not running any more; the same command goes on from here" in err
    assert f"skipped     {len(killed)} " in out
    without_engine = read_output(output)
    assert without_engine[: len(killed)] == killed
    assert len(killed) + 3 <= len(without_engine) < len(LINES)

    with started(source, output, *flags, "--engine-client", "thread") as process:
        wait_for_lines(output, len(without_engine) + 3, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.endswith("run-batch: interrupted; the same command goes on from here\n")
    interrupted = read_output(output)
    # What was in flight was finished.
    assert len(without_engine) + 3 + 1 <= len(interrupted) < len(LINES)
    assert f"ok          {len(interrupted) - len(without_engine)}\n" in out
    new = interrupted[len(killed) :]
    assert all(record["response"] and record["response"]["status_code"] == 200 for record in new)

    status, out, err = finish(source, output, "--base-url", server.base_url)
    assert status == 1
    assert "Traceback" not in err
    assert read_output(output)[: len(interrupted)] == interrupted
    return output


def test_every_line_is_answered_once(offline: Path) -> None:
    records = read_output(offline)
    assert len(records) == len(LINES)
    found = by_id(records)
    answered = {name for name, record in found.items() if record["response"]}
    good = {name for name in answered if found[name]["response"]["status_code"] == 200}
    assert good == {item["custom_id"] for item in GOOD}
    assert found["text 0"]["response"]["body"]["usage"]["completion_tokens"] == 40
    assert found["picture 3"]["response"]["body"]["usage"]["prompt_tokens_details"]["image_tokens"] == 3 * 64
    assert found["text 0"]["response"]["request_id"].startswith("req_")


def test_what_is_wrong_with_a_line_is_said_on_its_own(offline: Path) -> None:
    found = by_id(read_output(offline))
    for name, param in (("too hot", "temperature"), ("bad picture", "messages[0].content[0].image_url.url")):
        response = found[name]["response"]
        assert (response["status_code"], response["body"]["error"]["param"]) == (400, param)
    errors = {name: record["error"] for name, record in found.items() if record["error"]}
    assert {name: (error["code"], error["line"]) for name, error in errors.items()} == {
        "elsewhere": ("invalid_url", 3),
        "streamed": ("unsupported_value", 4),
        None: ("invalid_json_line", 5),
    }
    assert "/v1/chat/completions" in errors["elsewhere"]["message"]


def test_a_running_server_gives_the_same_answers(offline: Path, server: Server, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in", LINES), tmp_path / "out"
    status, out, _ = finish(source, output, "--base-url", server.base_url)
    assert status == 1
    assert f"ok          {len(GOOD)}\n" in out
    assert choices(output) == choices(offline)
    # What the server is asked and does not have is its own answer, not ours.
    assert by_id(read_output(output))["elsewhere"]["response"]["status_code"] == 404


def test_a_signal_while_the_model_loads_ends_the_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in", LINES), tmp_path / "out"
    with started(source, output, str(tiny_checkpoint), *SMALL) as process:
        while not (helpers := children(process.pid)):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    wait_until_gone(helpers)
    assert read_output(output) == []
