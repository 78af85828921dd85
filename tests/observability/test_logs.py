"""One line an event, with the request's id, and quiet libraries."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest

from server.errors import ConfigError
from server.observability.logs import bind_request_id, configure_logging


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info")
    logging.getLogger("server.x").info("loaded %d weights", 5)
    logging.getLogger("server.x").debug("not this")
    line = capsys.readouterr().err
    assert line.endswith("Z INFO server.x [-] loaded 5 weights\n")
    assert line[10] == "T"
    assert line.count("\n") == 1


def test_a_traceback_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    try:
        raise ValueError("bad\r\nFAKE LINE")
    except ValueError:
        logging.getLogger("server.x").exception("it broke")
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "\\nTraceback" in line
    assert "bad\\r\\nFAKE LINE" in line


def test_ids_follow_tasks(capsys: pytest.CaptureFixture[str]) -> None:
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
    lines = capsys.readouterr().err.splitlines()
    assert {line.partition("server.x ")[2] for line in lines} == {"[a] in a", "[b] in b", "[-] after a", "[-] after b"}


def test_twice_is_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    configure_logging()
    logging.getLogger("uvicorn.error").info("started")
    assert capsys.readouterr().err.count("started") == 1


def test_libraries_that_log_what_they_carry_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("DEBUG")
    logging.getLogger("sse_starlette.sse").debug("chunk: the answer")
    logging.getLogger("httpx").info("GET http://user:password@host")
    logging.getLogger("uvicorn.access").info("GET /?token=secret")
    logging.getLogger("server.x").debug("ours")
    captured = capsys.readouterr().err
    assert "ours" in captured
    assert captured.count("\n") == 1


def test_unknown_level() -> None:
    with pytest.raises(ConfigError, match="must be one of DEBUG, INFO"):
        configure_logging("LOUD")
