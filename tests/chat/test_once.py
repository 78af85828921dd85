from __future__ import annotations

import io

import pytest
from starlette.responses import JSONResponse

from server.chat.endpoint import Endpoint
from server.chat.once import answer_once
from server.chat.screen import Screen
from server.chat.session import Session
from server.chat.settings import Settings
from tests.bench.canned import DONE, CannedServer, text, usage
from tests.bench.canned import Answer as Script


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(script: Script, out: io.StringIO) -> tuple[int, str]:
    """The exit status, and what was noted."""
    noted = io.StringIO()
    with CannedServer(script=lambda _: script).running() as server, Endpoint(server.url) as endpoint:
        session = Session(endpoint, model="m", settings=Settings())
        status = answer_once(session, "a", out=out, notes=Screen(noted, styled=False))
    return status, noted.getvalue()


def test_the_answer_alone_is_put_out() -> None:
    out = io.StringIO()
    status, noted = run([text("two "), text("words", "stop"), usage(5, 2) + DONE], out)
    assert status == 0
    assert out.getvalue() == "two words\n"
    assert noted.startswith("5 prompt tokens, 2 completion tokens, first after ")


def test_an_answer_with_its_own_end_of_line_gets_no_other() -> None:
    out = io.StringIO()
    run([text("a\n", "stop") + DONE], out)
    assert out.getvalue() == "a\n"


def test_only_a_terminal_is_spared_control_characters() -> None:
    script = [text("\x1b[2J", "stop") + DONE]
    for out, expected in ((io.StringIO(), "\x1b[2J\n"), (Tty(), "␛[2J\n")):
        run(script, out)
        assert out.getvalue() == expected


@pytest.mark.parametrize(
    ("script", "out_text", "message"),
    [
        (JSONResponse({"error": {"message": "no\x1b[2J"}}, 500), "", "chat: HTTP 500: no␛[2J\n"),
        ([text("half")], "half\n", "chat: the answer was cut off: the server closed the connection before its end\n"),
    ],
)
def test_no_whole_answer_is_status_one(script: Script, out_text: str, message: str) -> None:
    out = io.StringIO()
    assert run(script, out) == (1, message)
    assert out.getvalue() == out_text


def test_ctrl_c_is_told_to_the_caller() -> None:
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            if text == "half":
                raise KeyboardInterrupt
            return super().write(text)

    with pytest.raises(KeyboardInterrupt):
        run([text("half"), 60.0], Interrupted())
