"""One question, one answer, for scripts: the answer on one stream, everything else on another."""

from __future__ import annotations

from typing import TextIO

from server.chat.errors import ChatError
from server.chat.screen import Screen, harmless, usage_line
from server.chat.session import Session


def answer_once(session: Session, question: str, *, out: TextIO, notes: Screen) -> int:
    """0 when the answer is whole, 1 otherwise; the reason is noted. A terminal gets it without control characters,
    anything else as the model said it. Raises KeyboardInterrupt when it was stopped, BrokenPipeError when nobody reads.
    """
    is_terminal = out.isatty()
    ends_open = False

    def on_text(text: str) -> None:
        nonlocal ends_open
        ends_open = not text.endswith("\n")  # first: Ctrl-C may come as soon as anything is written
        out.write(harmless(text) if is_terminal else text)
        out.flush()

    try:
        answer = session.ask(question, on_text)
    except ChatError as error:
        if ends_open:
            on_text("\n")
        notes.say(f"chat: {error}")
        return 1
    if ends_open:
        on_text("\n")
    if answer.is_stopped:
        raise KeyboardInterrupt
    notes.note(usage_line(answer))
    return 0
