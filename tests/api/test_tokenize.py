"""POST /tokenize and /detokenize: texts, conversations as the chat endpoint would read them, and back."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from server.api import tokenize
from server.api.tokenize import Detokenized, Tokens
from server.errors import ClientError, UnavailableError
from server.types import ChatInput, PromptInput, SamplingParams
from tests.api.prompt_llm import BOS, EOS, FAKE, IMAGE, MAX_MODEL_LEN, PIECES, PromptLLM, encode, ids
from tests.api.scripted_llm import QUEUE_FULL

PICTURE = {"type": "image_url", "image_url": {"url": "https://example.org/never-fetched.png", "detail": "low"}}


@pytest.fixture(scope="module")
def llm_type() -> type[PromptLLM]:
    return PromptLLM


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return {"inject_tools": True}


def tokens(url: str, **body: Any) -> Any:
    answer = httpx.post(f"{url}/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    assert Tokens.model_validate(answer.json()).model_dump(mode="json") == answer.json()
    return answer.json()


def error(url: str, path: str, **body: Any) -> tuple[int, str, str]:
    answer = httpx.post(url + path, json=body)
    found = answer.json()["error"]
    return answer.status_code, found["code"], found["param"]


def say(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def test_a_text(url: str) -> None:
    expected = [BOS, *encode("Two cats")]
    assert tokens(url, prompt="Two cats") == {
        "count": len(expected),
        "max_model_len": MAX_MODEL_LEN,
        "tokens": expected,
        "token_strs": None,
    }


def test_without_special_tokens(url: str, llm: PromptLLM) -> None:
    assert tokens(url, prompt="<s>Two", add_special_tokens=False)["tokens"] == encode("<s>Two")
    assert tokens(url, prompt="", add_special_tokens=True)["tokens"] == [BOS, *encode("")]
    assert [type(item) for item in llm.items] == [PromptInput] * 2
    assert llm.items[0].sampling == SamplingParams()


def test_token_strings(url: str) -> None:
    assert tokens(url, prompt="Two é", return_token_strs=True, model="idefics2-8b")["token_strs"] == [
        *("<s>", "▁Two", "▁", "<0xC3>", "<0xA9>")
    ]
    assert tokens(url, messages=[say("a")], return_token_strs=True)["token_strs"] == ["<s>", "▁a"]


def test_a_conversation_with_a_picture(url: str, llm: PromptLLM) -> None:
    """Its placeholders are told, and nothing of it is fetched or computed."""
    told = tokens(url, messages=[say([PICTURE, {"type": "text", "text": "Two"}])])
    assert told["tokens"] == [BOS, FAKE, IMAGE, IMAGE, FAKE, *encode("Two")]
    assert told["count"] == len(told["tokens"])
    assert llm.requests == []


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [say("a", "system"), say("Two"), say("cats", "assistant"), say([PICTURE, "dog"])]},
        {"messages": [say("a"), say("Two", "assistant")], "continue_final_message": True},
        {"messages": [say("a")], "add_generation_prompt": False},
        {"messages": [say("a")], "tools": [{"type": "function", "function": {"name": "look_up"}}]},
        {"messages": [say([{**PICTURE, "image_url": "x"}])], "mm_processor_kwargs": {"do_image_splitting": True}},
        {"messages": [say("a")], "temperature": 0.5, "n": 2, "stop": "x", "add_special_tokens": True},
    ],
)
def test_what_the_chat_endpoint_would_read(url: str, llm: PromptLLM, body: dict[str, Any]) -> None:
    llm.max_model_len = 4096
    tokens(url, **body)
    assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
    read, answered = llm.items
    assert isinstance(read, ChatInput)
    assert read.request_id != answered.request_id
    assert msgspec.structs.replace(read, request_id=answered.request_id, origin=answered.origin) == answered


def test_a_full_queue_does_not_matter(url: str, llm: PromptLLM) -> None:
    llm.capacity_error = QUEUE_FULL
    assert tokens(url, prompt="a")["count"] == 2


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "missing_required_parameter", "prompt"),
        ({"prompt": None, "messages": None}, 400, "missing_required_parameter", "prompt"),
        ({"prompt": 5}, 400, "invalid_type", "prompt"),
        ({"prompt": ["a"]}, 400, "invalid_type", "prompt"),
        ({"prompt": "a", "messages": [say("a")]}, 400, "invalid_value", "prompt"),
        ({"prompt": "a", "add_special_tokens": 1}, 400, "invalid_type", "add_special_tokens"),
        ({"prompt": "a", "return_token_strs": "yes"}, 400, "invalid_type", "return_token_strs"),
        ({"messages": []}, 400, "empty_array", "messages"),
        ({"messages": [say("a", "nobody")]}, 400, "invalid_value", "messages[0].role"),
        ({"messages": [say("a")], "chat_template": "{{ x }}"}, 400, "unsupported_parameter", "chat_template"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "model_not_found", "model"),
        ({"messages": [say("a")], "model": "gpt-4"}, 404, "model_not_found", "model"),
    ],
)
def test_what_cannot_be_tokenized(url: str, body: dict[str, Any], status: int, code: str, param: str) -> None:
    assert error(url, "/tokenize", **body) == (status, code, param)


def test_errors_of_the_facade(url: str, llm: PromptLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(item: object) -> list[int]:
        raise ClientError("17 images", param="messages", code="too_many_images")

    monkeypatch.setattr(llm, "tokenize", refuse, raising=False)
    assert error(url, "/tokenize", messages=[say("a")]) == (400, "too_many_images", "messages")

    async def not_yet(item: object) -> list[int]:
        raise UnavailableError("still loading", code="model_loading")

    monkeypatch.setattr(llm, "tokenize", not_yet)
    assert error(url, "/tokenize", prompt="a")[:2] == (503, "model_loading")


# -- back to text ----------------------------------------------------------------------------------------------------


def test_text_of_ids(url: str) -> None:
    for given, text in [
        ([BOS, *encode("Two cats"), EOS], "<s> Two cats</s>"),
        (encode("Two é"), "Two é"),
        ([FAKE, IMAGE, FAKE], "<fake><image><fake>"),
        (ids("<0xC3>"), "\ufffd"),
        ([], ""),
    ]:
        answer = httpx.post(f"{url}/detokenize", json={"tokens": given, "model": "idefics2-8b"})
        assert (answer.status_code, answer.json()) == (200, {"prompt": text})
        Detokenized.model_validate(answer.json())


@pytest.mark.parametrize(
    ("given", "code", "param"),
    [
        (None, "missing_required_parameter", "tokens"),
        ("a", "invalid_type", "tokens"),
        ([1, "a"], "invalid_type", "tokens[1]"),
        ([True], "invalid_type", "tokens[0]"),
        ([1.0], "invalid_type", "tokens[0]"),
        ([1, -1], "invalid_value", "tokens[1]"),
        ([1, len(PIECES)], "invalid_value", "tokens[1]"),
        ([10**30], "invalid_value", "tokens[0]"),
    ],
)
def test_what_is_no_list_of_ids(url: str, given: Any, code: str, param: str) -> None:
    assert error(url, "/detokenize", tokens=given) == (400, code, param)


def test_how_many_ids(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "MAX_DETOKENIZED", 3)
    assert httpx.post(f"{url}/detokenize", json={"tokens": [5] * 3}).status_code == 200
    assert error(url, "/detokenize", tokens=[5] * 4) == (400, "array_above_max_length", "tokens")


def test_another_model(url: str) -> None:
    assert error(url, "/detokenize", tokens=[5], model="gpt-4") == (404, "model_not_found", "model")


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_methods_and_bodies(url: str, path: str) -> None:
    answer = httpx.get(url + path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert httpx.post(url + path, content=b"[1]", headers={"content-type": "application/json"}).status_code == 400
    assert httpx.post(url + path, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
