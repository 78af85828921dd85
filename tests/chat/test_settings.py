from __future__ import annotations

import pytest

from server.chat.errors import ChatError
from server.chat.settings import PARSERS, Settings


def test_what_is_not_set_is_not_sent() -> None:
    assert Settings().body() == {}


def test_what_is_set_is_sent_and_taken_back_by_default() -> None:
    settings = Settings()
    for name, text in {"temperature": "0", "top_p": "0.5", "max_tokens": "9", "seed": "-3", "detail": "low"}.items():
        settings.set(name, text)
    assert settings.body() == {"temperature": 0.0, "top_p": 0.5, "max_tokens": 9, "seed": -3}
    assert settings.detail == "low"
    assert settings.lines() == ["temperature 0.0", "top_p 0.5", "max_tokens 9", "seed -3", "detail low"]
    for name in PARSERS:
        settings.set(name, "default")
    assert settings == Settings()
    assert settings.lines()[0] == "temperature (the server decides)"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("temperature", "-0.1", "temperature: must be from 0 to 2, not -0.1"),
        ("temperature", "2.1", "temperature: must be from 0 to 2, not 2.1"),
        ("temperature", "nan", "temperature: must be a finite number, not nan"),
        ("temperature", "warm", "temperature: must be a number, not 'warm'"),
        ("top_p", "0", "top_p: must be above 0 and at most 1, not 0"),
        ("top_p", "1.1", "top_p: must be above 0 and at most 1, not 1.1"),
        ("max_tokens", "0", "max_tokens: must be at least 1, not 0"),
        ("max_tokens", "1.5", "max_tokens: must be a whole number, not '1.5'"),
        ("seed", "x", "seed: must be a whole number, not 'x'"),
        ("detail", "max", "detail: must be one of auto, low, high, not 'max'"),
        ("top_k", "3", "there is no setting 'top_k'; there are temperature, top_p, max_tokens, seed, detail"),
    ],
)
def test_what_cannot_be_is_told_and_nothing_changes(name: str, text: str, message: str) -> None:
    settings = Settings()
    with pytest.raises(ChatError) as caught:
        settings.set(name, text)
    assert str(caught.value) == message
    assert settings == Settings()
