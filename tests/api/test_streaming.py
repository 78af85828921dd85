"""What holds for the streams of every endpoint."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.errors import EngineDeadError
from server.types import FinishReason
from tests.api.scripted_llm import ScriptedLLM, say, serving

PROMPTS = [
    ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("completions", {"prompt": "Hi"}),
    ("responses", {"input": "Hi"}),
]


@pytest.mark.parametrize(("path", "prompt"), PROMPTS)
def test_silence_before_the_first_token_is_broken_by_comments(path: str, prompt: dict[str, Any]) -> None:
    """A prompt with many pictures takes a while, and proxies do not wait for ever."""
    llm = ScriptedLLM([0.7, say("Two"), say("", FinishReason.STOP)])
    with serving(llm, keep_alive_seconds=0.2) as url:
        answer = httpx.post(f"{url}/v1/{path}", json={**prompt, "stream": True})
    assert answer.status_code == 200
    before, _, after = answer.text.partition("Two")
    assert before.startswith(": keep-alive\n\n")
    assert before.count(": keep-alive") >= 2
    assert "data: " in before
    assert ": keep-alive" not in after


@pytest.mark.parametrize(("path", "prompt"), PROMPTS)
@pytest.mark.parametrize("late", [False, True])
def test_an_error_is_a_status_as_long_as_nothing_is_sent(path: str, prompt: dict[str, Any], late: bool) -> None:
    llm = ScriptedLLM([0.4 if late else 0.01, EngineDeadError("gone", retry_after=5)])
    with serving(llm, keep_alive_seconds=0.1 if late else 5.0) as url:
        answer = httpx.post(f"{url}/v1/{path}", json={**prompt, "stream": True})
    assert answer.status_code == (200 if late else 503)
    assert "engine_unavailable" in answer.text
    assert "Two" not in answer.text
