from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.chat.conversation import Conversation, Turn, question_of
from server.chat.errors import ChatError
from server.chat.images import Picture

PICTURE = Picture("a.png", "data:image/png;base64,aaaa", "low")
SAID = Conversation(
    "Be brief.", [Turn(question_of("What is this?", [PICTURE]), "A cät."), Turn(question_of("Why?", []), "")]
)


def test_messages_are_as_a_request_has_them() -> None:
    assert SAID.messages() == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": PICTURE.url, "detail": "low"}},
                {"type": "text", "text": "What is this?"},
            ],
        },
        {"role": "assistant", "content": "A cät."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": ""},
    ]
    assert Conversation().messages() == []


def test_a_turn_tells_its_words_and_pictures() -> None:
    first, second = SAID.turns
    assert (first.text, first.num_pictures) == ("What is this?", 1)
    assert (second.text, second.num_pictures) == ("Why?", 0)


def test_bytes_of_a_terminal_that_are_no_utf8_can_be_sent() -> None:
    assert question_of("a\udcffb", []) == "a�b"


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    SAID.save(file, overwrite=False)
    assert json.loads(file.read_text(encoding="utf-8")) == SAID.messages()
    assert Conversation.load(file) == SAID


def test_a_file_that_is_there_stays_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    file.write_text("precious")
    with pytest.raises(ChatError, match="is there already; nothing was written"):
        SAID.save(file, overwrite=False)
    assert file.read_text() == "precious"
    SAID.save(file, overwrite=True)
    assert Conversation.load(file) == SAID
    with pytest.raises(ChatError, match=r"cannot write .*: No such file or directory"):
        SAID.save(tmp_path / "nowhere" / "chat.json", overwrite=True)


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "must be an array of messages"),
        (json.dumps([USER]), "must have an answer behind every question"),
        (json.dumps([USER, USER]), "turn 1 must be a message of the user and one of the assistant"),
        (json.dumps([USER, ASSISTANT, 1, 2]), "turn 2 must be a message of the user"),
        (json.dumps([{"role": "system", "content": 1}]), "the system message: content must be a string"),
        (json.dumps([USER, {"role": "assistant", "content": None}]), "turn 1: content must be a string"),
        (json.dumps([{"role": "user"}, ASSISTANT]), "turn 1: the question must be text"),
        (json.dumps([{"role": "user", "content": [{"type": "text"}]}, ASSISTANT]), "turn 1: the question must be"),
        (json.dumps([{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]), "turn 1: the question must"),
        (json.dumps([{"role": "user", "content": ["a"]}, ASSISTANT]), "turn 1: the question must be text"),
    ],
)
def test_what_is_no_conversation_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text(text)
    with pytest.raises(ChatError, match=message):
        Conversation.load(file)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ChatError, match="there is no file"):
        Conversation.load(tmp_path)
