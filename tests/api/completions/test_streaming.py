"""Streams of POST /v1/completions: the same choices as the whole answer's, in chunks of the same shape."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from server.errors import RequestFailedError
from tests.api import wire
from tests.api.completions.client import Asker
from tests.api.prompt_llm import BOS, EOS, PromptLLM, byte_ids, encode, ids
from tests.api.scripted_llm import Hang
from tests.listening import wait_until

SECONDS = 10.0


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return {"keep_alive_seconds": 0.1}


def events(ask: Asker, prompt: Any = "Two cats", **fields: Any) -> list[str]:
    """What comes before the end, without `data: ` and without what all chunks begin with."""
    answer = ask.post(prompt, stream=True, request_id="x", **fields)
    assert answer.status_code == 200, answer.text
    found = wire.data_events(answer.text)
    created = json.loads(found[0])["created"]
    head = (
        f'{{"id":"cmpl-x","object":"text_completion","created":{created},"model":"idefics2-8b",'
        '"system_fingerprint":"fp_test",'
    )
    assert all(event.startswith((head, '{"error":')) for event in found)
    return [event.removeprefix(head) for event in found]


def chunks(ask: Asker, prompt: Any = "Two cats", **fields: Any) -> list[dict[str, Any]]:
    return [json.loads("{" + event) for event in events(ask, prompt, **fields)]


def chunk(text: str, finish: str = "null", end: str = "", index: int = 0) -> str:
    return f'"choices":[{{"index":{index},"text":"{text}","logprobs":null,"finish_reason":{finish}}}]{end}}}'


def usage(completion_tokens: int) -> str:
    return f'"usage":{wire.compact(wire.usage(3, completion_tokens))}'


def test_plain(ask: Asker) -> None:
    assert events(ask, max_tokens=3) == [chunk(" and"), chunk(" a"), chunk(" dog", '"length"')]


def test_stop(ask: Asker) -> None:
    end = ',"finish_reason":"stop","stop_reason":" dog"}]}'
    assert events(ask, stop=" dog") == [
        chunk(" and"),
        chunk(" a"),
        '"choices":[{"index":0,"text":"","logprobs":null' + end,
    ]


def test_the_end_of_the_model(ask: Asker, llm: PromptLLM) -> None:
    llm.answers = [ids("▁and", "</s>")]
    assert events(ask) == [chunk(" and"), chunk("", '"stop"')]


def test_echo_comes_first(ask: Asker) -> None:
    assert events(ask, echo=True, max_tokens=2) == [chunk("Two cats and"), chunk(" a", '"length"')]


def test_nothing_but_the_prompt(ask: Asker) -> None:
    told = {"include_usage": True}
    assert events(ask, echo=True, max_tokens=0, stream_options=told) == [
        chunk("Two cats", '"length"', ',"usage":null'),
        f'"choices":[],{usage(0)}}}',
    ]


def test_include_usage(ask: Asker) -> None:
    null = ',"usage":null'
    assert events(ask, max_tokens=2, stream_options={"include_usage": True}) == [
        chunk(" and", end=null),
        chunk(" a", '"length"', null),
        f'"choices":[],{usage(2)}}}',
    ]


def test_continuous_usage(ask: Asker) -> None:
    told = {"include_usage": True, "continuous_usage_stats": True}
    assert events(ask, max_tokens=2, stream_options=told) == [
        chunk(" and", end=f",{usage(1)}"),
        chunk(" a", '"length"', f",{usage(2)}"),
        f'"choices":[],{usage(2)}}}',
    ]


def test_several_choices(ask: Asker, llm: PromptLLM) -> None:
    llm.answers = [ids("▁Two", "▁a", "▁a"), ids("▁cats", "</s>"), ids("▁and"), ids("▁dog", "▁a")]
    found = chunks(ask, ["Two", "cats"], n=2, temperature=1, max_tokens=3, stream_options={"include_usage": True})
    end = found.pop()
    assert end["choices"] == []
    assert (end["usage"]["prompt_tokens"], end["usage"]["completion_tokens"]) == (4, 3 + 2 + 1 + 2)
    choices = [choice for piece in found for choice in piece["choices"]]
    texts = ["".join(choice["text"] for choice in choices if choice["index"] == index) for index in range(4)]
    assert texts == [" Two a a", " cats", " and", " dog a"]
    ends = [(choice["index"], choice["finish_reason"]) for choice in choices if choice["finish_reason"]]
    assert sorted(ends) == [(0, "length"), (1, "stop"), (2, "length"), (3, "length")]
    assert [choice["index"] for choice in choices[:4]] == [0, 1, 2, 3]
    for index in range(4):
        assert [choice for choice in choices if choice["index"] == index][-1]["finish_reason"]


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": True, "logprobs": 2, "return_token_ids": True},
        {"logprobs": 0, "stop": "a d"},
        {"prompt": ["Two", [BOS, *encode("a dog")]], "n": 2, "temperature": 0, "echo": True, "logprobs": 1},
        {"prompt": "é 猫", "echo": True, "logprobs": 1, "max_tokens": 0, "n": 2},
        {"return_token_ids": True, "temperature": 1, "n": 3},
        {"logprobs": 1, "skip_special_tokens": False},
    ],
)
def test_all_chunks_together_are_the_whole_answer(ask: Asker, llm: PromptLLM, fields: dict[str, Any]) -> None:
    llm.answers = [[*ids("▁and", "▁a", "▁dog"), *byte_ids("🐈"), EOS], [*byte_ids("é"), *ids("s", "▁a", "▁dog")]]
    whole = ask(**fields)
    joined: dict[int, dict[str, Any]] = {}
    found = chunks(ask, **fields, stream_options={"include_usage": True})
    assert found.pop()["usage"] == whole["usage"]
    for piece in found:
        (choice,) = piece["choices"]
        assert "token_ids" in choice or "return_token_ids" not in fields
        whole_so_far = joined.setdefault(choice["index"], {"text": "", "logprobs": None, "stop_reason": None})
        assert whole_so_far.get("finish_reason") is None
        for key, value in choice.items():
            if key == "text" or (key == "token_ids" and key in whole_so_far):
                whole_so_far[key] += value
            elif key == "logprobs" and whole_so_far[key] is not None:
                for name, more in value.items():
                    whole_so_far[key][name] += more
            else:
                whole_so_far[key] = value
    assert [joined[index] for index in sorted(joined)] == whole["choices"]


def test_prompt_ids_come_once(ask: Asker) -> None:
    first, *others = [piece["choices"][0] for piece in chunks(ask, return_token_ids=True)]
    assert first["prompt_token_ids"] == [BOS, *encode("Two cats")]
    assert others
    assert all("prompt_token_ids" not in choice for choice in others)


def test_any_text_stays_in_one_line(ask: Asker) -> None:
    text = 'a"\\ \n\r b\u2028c\u2029d\x85e'
    (event,) = [event for event in events(ask, text, echo=True, max_tokens=0, logprobs=0) if "choices" in event]
    assert len(event.splitlines()) == 1
    assert json.loads("{" + event)["choices"][0]["text"] == text


def test_headers_and_framing(ask: Asker) -> None:
    answer = ask.post(stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert "\r" not in answer.text
    parsed = [json.loads(event.removeprefix("data: ")) for event in answer.text.split("\n\n")[:-2]]
    (name,) = {piece["id"] for piece in parsed}
    assert len(name) == len("cmpl-") + 32


def test_an_error_in_the_middle(ask: Asker, llm: PromptLLM) -> None:
    llm.disturbance = (2, RequestFailedError("the step failed"))
    *good, bad = events(ask, stream_options={"include_usage": True})
    assert good == [chunk(" and", end=',"usage":null'), chunk(" a", end=',"usage":null')]
    assert json.loads(bad)["error"]["message"] == "the step failed"
    assert llm.closed.wait(SECONDS)


def test_an_error_before_the_first_token_is_an_http_status(ask: Asker, llm: PromptLLM) -> None:
    llm.disturbance = (0, RequestFailedError("the step failed"))
    answer = ask.post(stream=True)
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/json")


def test_silence_is_filled_with_comments(ask: Asker, llm: PromptLLM) -> None:
    llm.disturbance = (1, 0.35)
    assert 2 <= ask.post(stream=True).text.count(": keep-alive\n\n") <= 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_a_client_that_leaves(url: str, llm: PromptLLM, tokens: int, *, stream: bool) -> None:
    llm.disturbance = (tokens, Hang())
    left = {"handler": "/v1/completions", "method": "POST", "status": "499"}
    before = llm.http_count(**left)
    with wire.send(f"{url}/v1/completions", {"prompt": ["Two", "cats"], "stream": stream}):
        assert llm.hanging.wait(5)
    assert llm.closed.wait(SECONDS)
    wait_until(lambda: llm.http_count(**left) == before + 1)


def test_sdk(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="idefics2-8b",
        prompt="Two cats",
        echo=True,
        logprobs=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == "Two cats and a dog."
    first = pieces[0].choices[0].logprobs
    assert first is not None
    assert first.tokens == ["<s>", "Two", " cats", " and"]
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]] == [None, None, None, "length"]
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 4
