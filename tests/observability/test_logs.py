"""One line an event, with the request's id, and quiet libraries; and nobody waits for whoever reads the log."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.errors import ConfigError
from server.observability import logs
from server.observability.logs import (
    NUM_DROPPED,
    DroppingHandler,
    OneLineFormatter,
    bind_request_id,
    configure_logging,
    log_format,
)
from tests.listening import wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def written(capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What has been logged so far."""

    def read() -> str:
        for handler in logging.getLogger().handlers:
            handler.flush()
        return capfd.readouterr().err

    return read


def test_a_line(written: Callable[[], str]) -> None:
    configure_logging("info")
    logging.getLogger("server.x").info("loaded %d weights", 5)
    logging.getLogger("server.x").debug("not this")
    line = written()
    assert line.endswith("Z INFO server.x [-] loaded 5 weights\n")
    assert line[10] == "T"
    assert line.count("\n") == 1


def test_a_traceback_is_one_line_too(written: Callable[[], str]) -> None:
    configure_logging()
    try:
        raise ValueError("bad\r\nFAKE LINE")
    except ValueError:
        logging.getLogger("server.x").exception("it broke")
    line = written()
    assert line.count("\n") == 1
    assert "\\nTraceback" in line
    assert "bad\\r\\nFAKE LINE" in line


def test_ids_follow_tasks(written: Callable[[], str]) -> None:
    configure_logging()
    logger = logging.getLogger("server.x")

    async def inner(name: str) -> None:
        await asyncio.sleep(0)
        logger.info("in %s", name)

    async def outer(name: str) -> None:
        with bind_request_id(name):
            await asyncio.create_task(inner(name))
        logger.info("after %s", name)

    async def both() -> None:
        await asyncio.gather(outer("a"), outer("b"))

    asyncio.run(both())
    lines = written().splitlines()
    assert {line.partition("server.x ")[2] for line in lines} == {"[a] in a", "[b] in b", "[-] after a", "[-] after b"}


def test_twice_is_once(written: Callable[[], str]) -> None:
    configure_logging()
    configure_logging()
    logging.getLogger("uvicorn.error").info("started")
    assert written().count("started") == 1


def test_libraries_that_log_what_they_carry_are_quiet(written: Callable[[], str]) -> None:
    configure_logging("DEBUG")
    logging.getLogger("sse_starlette.sse").debug("chunk: the answer")
    logging.getLogger("httpx").info("GET http://user:password@host")
    logging.getLogger("uvicorn.access").info("GET /?token=secret")
    logging.getLogger("server.x").debug("ours")
    captured = written()
    assert "ours" in captured
    assert captured.count("\n") == 1


def test_unknown_level() -> None:
    with pytest.raises(ConfigError, match="must be one of DEBUG, INFO"):
        configure_logging("LOUD")


def test_lines_as_objects(written: Callable[[], str]) -> None:
    configure_logging(format="json")
    logger = logging.getLogger("server.x")
    with bind_request_id("req_1"):
        logger.info('said "%s"\r\n', "hé\u2028llo", extra={"fields": {"status": 200, "key": None}})
    try:
        raise ValueError("bad\nFAKE LINE")
    except ValueError:
        logger.exception("it broke")
    text = written()
    first, second = (json.loads(line) for line in text.splitlines() if line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "INFO",
        "logger": "server.x",
        "request_id": "req_1",
        "message": 'said "hé\u2028llo"\r\n',
        "status": 200,
        "key": None,
    }
    assert text.count("\n") == 2
    assert second["message"] == "it broke"
    assert second["exception"].startswith("Traceback")
    assert second["exception"].endswith("bad\nFAKE LINE")


def test_the_format_is_known_to_whoever_starts_an_engine(written: Callable[[], str]) -> None:
    configure_logging()
    assert log_format() == "text"
    configure_logging(format="json")
    assert log_format() == "json"


# -- whoever reads them ----------------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """(to read, to write), with room for a page."""
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 4096)
    yield reads, writes
    for descriptor in (reads, writes):
        os.close(descriptor)


@pytest.fixture
def logger(pipe: tuple[int, int]) -> Iterator[logging.Logger]:
    """One that writes into the pipe."""
    handler = DroppingHandler(pipe[1])
    handler.setFormatter(OneLineFormatter())
    made = logging.Logger("server.x")
    made.addHandler(handler)
    yield made
    os.set_blocking(pipe[0], False)
    deadline = time.monotonic() + 10
    while handler._num_written < handler._num_taken and time.monotonic() < deadline:
        drain(pipe[0])
    handler.close()


def drain(reads: int) -> bytes:
    """What is there."""
    os.set_blocking(reads, False)
    received = b""
    while True:
        try:
            received += os.read(reads, 65536)
        except BlockingIOError:
            return received


def test_a_pipe_that_nobody_reads_stops_nobody(
    logger: logging.Logger, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits is bounded; the rest is dropped, counted, and told when somebody reads again."""
    monkeypatch.setattr(logs, "MAX_WAITING_BYTES", 100_000)
    before = NUM_DROPPED.value
    started = time.monotonic()
    for number in range(2000):
        logger.info("%d %s", number, "x" * 200)
    assert time.monotonic() - started < 5
    num_dropped = int(NUM_DROPPED.value - before)
    assert 1000 < num_dropped < 1900
    received = b""

    def is_told() -> bool:
        nonlocal received
        received += drain(pipe[0])
        return b"dropped" in received

    wait_until(is_told, 10)
    lines = received.decode().splitlines()
    numbers = [int(line.split()[4]) for line in lines[:-1]]
    assert len(numbers) == 2000 - num_dropped
    assert numbers == sorted(set(numbers))
    assert lines[-1].endswith(
        f"WARNING server.observability.logs [-] {num_dropped} lines were dropped, because nobody read the log"
    )
    logger.info("afterwards")
    wait_until(lambda: b"afterwards" in drain(pipe[0]))


def test_a_pipe_without_another_end_costs_lines_and_nothing_else() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    handler = DroppingHandler(writes)
    before = NUM_DROPPED.value
    for _ in range(3):
        handler.handle(logging.makeLogRecord({"msg": "x"}))
    wait_until(lambda: NUM_DROPPED.value == before + 3)
    handler.close()
    os.close(writes)


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    with open("/dev/full", "wb") as full:
        handler = DroppingHandler(full.fileno())
        before = NUM_DROPPED.value
        handler.handle(logging.makeLogRecord({"msg": "x"}))
        wait_until(lambda: NUM_DROPPED.value == before + 1)
        handler.close()


def test_a_pipe_that_does_not_block_is_waited_for(logger: logging.Logger, pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    for number in range(100):
        logger.info("%d %s", number, "x" * 200)
    received = b""

    def is_all() -> bool:
        nonlocal received
        received += drain(pipe[0])
        return received.count(b"\n") == 100

    wait_until(is_all)


ENDS = {
    "an exception": ("raise ZeroDivisionError('why')", 1),
    "an exit": ("sys.exit(3)", 3),
    "the end": ("", 0),
    "a thread that goes on": ("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", 0),
}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("is_read", [True, False])
def test_the_last_lines_come_out_and_the_end_comes(how: str, *, is_read: bool) -> None:
    """Also when a process dies of what it logs; and one whose log nobody reads ends too."""
    last, status = ENDS[how]
    program = f"""
import logging, sys, threading, time
from server.observability.logs import configure_logging
configure_logging()
for number in range(2000):
    logging.getLogger("server.x").info("line %d %s", number, "x" * 100)
logging.getLogger("server.x").error("last words")
{last}
"""
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stderr is not None
        if is_read:
            _, error = child.communicate(timeout=30)
            lines = error.decode().splitlines()
            assert [line for line in lines if "line 1999 " in line]
            assert [line for line in lines if line.endswith("ERROR server.x [-] last words")]
            assert child.returncode == status
        elif "exception" not in how:  # Python itself waits for whoever reads a traceback
            assert child.wait(30) == status
        child.kill()
