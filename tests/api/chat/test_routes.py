"""The chat endpoint end to end, through OpenAI's own client and plain HTTP, on a real socket."""

from __future__ import annotations

import base64
import io
import json
import math
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from PIL import Image

from server.api.schemas import EXAMPLE_IMAGE, chat_examples
from server.errors import CapacityError, ClientError, EngineDeadError, RequestFailedError, UnavailableError
from server.types import FinishReason, ImageInput, Logprob, RequestOrigin, TextPart
from tests.api.chat.client import HELLO, PICTURE, ask, post
from tests.api.scripted_llm import QUEUE_FULL, TWO_CATS, ScriptedLLM, say
from tests.api.wire import CHAT, usage

STOP = FinishReason.STOP


def test_sdk_plain(llm: ScriptedLLM, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="idefics2-8b", messages=PICTURE, max_tokens=5, temperature=0)
    assert answer.choices[0].message.content == "Two cats."
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (85, 3, 88)
    assert answer.usage.prompt_tokens_details is not None
    details = answer.usage.prompt_tokens_details
    assert (details.cached_tokens, details.image_tokens, details.text_tokens) == (16, 64, 21)
    assert answer._request_id is not None
    (chat,) = llm.chats
    assert chat.turns[0].parts == (
        TextPart("What is this?"),
        ImageInput(url=EXAMPLE_IMAGE, detail="low", param="messages[0].content[1].image_url.url"),
    )
    assert (chat.sampling.max_tokens, chat.sampling.temperature) == (5, 0.0)
    assert chat.request_id == answer.id
    assert llm.closed.wait(5)


def test_plain_body(url: str) -> None:
    body = ask(url, service_tier="auto")
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "idefics2-8b",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Two cats.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": usage(85, 3, cached_tokens=16, image_tokens=64),
        "system_fingerprint": "fp_test",
        "service_tier": "default",
    }


def test_no_service_tier_unless_asked(url: str) -> None:
    assert "service_tier" not in ask(url)


def test_an_empty_answer_is_a_string(llm: ScriptedLLM, url: str) -> None:
    llm.script = [say("", FinishReason.STOP, stop_reason="\n")]
    choice = ask(url)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", "\n")


def test_an_answer_can_be_sent_back(client: openai.OpenAI, llm: ScriptedLLM) -> None:
    answer = client.chat.completions.create(model="idefics2-8b", messages=HELLO)
    history: list[Any] = [*HELLO, answer.choices[0].message.model_dump(), *HELLO]
    client.chat.completions.create(model="idefics2-8b", messages=history)
    assert [turn.role for turn in llm.chats[1].turns] == ["user", "assistant", "user"]
    assert llm.chats[1].turns[1].parts == (TextPart("Two cats."),)


def test_sdk_stream(client: openai.OpenAI, llm: ScriptedLLM) -> None:
    events = list(
        client.chat.completions.create(
            model="idefics2-8b", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    deltas = [event.choices[0].delta.content for event in events if event.choices]
    assert deltas == ["", "Two", " cats.", None]
    assert [event.choices[0].finish_reason for event in events if event.choices] == [None, None, None, "stop"]
    assert [event.usage is not None for event in events] == [False, False, False, False, True]
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 3
    assert llm.closed.wait(5)


def test_sdk_stream_helper(client: openai.OpenAI) -> None:
    """It accumulates, and so finds a repeated role or a chunk out of order."""
    with client.chat.completions.stream(model="idefics2-8b", messages=HELLO) as events:
        completion = events.get_final_completion()
    message = completion.choices[0].message
    assert (message.role, message.content) == ("assistant", "Two cats.")


def test_sdk_raises_an_error_in_the_stream(client: openai.OpenAI, llm: ScriptedLLM) -> None:
    llm.script = [say("Two"), RequestFailedError("the step failed")]
    stream = client.chat.completions.create(model="idefics2-8b", messages=HELLO, stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "Two"]
    with pytest.raises(openai.APIError, match=r"^the step failed$") as caught:
        next(stream)
    assert (caught.value.type, caught.value.code) == ("server_error", "internal_error")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("place", "error", "status", "kind", "code", "retry_after"),
    [
        ("capacity", QUEUE_FULL, 429, "rate_limit_error", "queue_full", "3"),
        ("capacity", UnavailableError("draining"), 503, "server_error", "server_shutting_down", "1"),
        ("capacity", EngineDeadError("dead", retry_after=500), 503, "server_error", "engine_unavailable", "120"),
        ("prepare", ClientError("x", param="messages", code="y"), 400, "invalid_request_error", "y", None),
        ("prepare", UnavailableError("loading", code="model_loading"), 503, "server_error", "model_loading", "1"),
        ("generate", RequestFailedError("failed"), 500, "server_error", "internal_error", None),
        ("generate", QUEUE_FULL, 429, "rate_limit_error", "queue_full", "3"),
        ("generate", ZeroDivisionError("/secret/path"), 500, "server_error", "internal_error", None),
        ("prepare", ZeroDivisionError("/secret/path"), 500, "server_error", "internal_error", None),
    ],
)
def test_errors_before_the_answer(
    llm: ScriptedLLM,
    url: str,
    *,
    stream: bool,
    place: str,
    error: Any,
    status: int,
    kind: str,
    code: str,
    retry_after: str | None,
) -> None:
    if place == "capacity":
        llm.capacity_error = error
    elif place == "prepare":
        llm.prepare_script = [error]
    else:
        llm.script = [error]
    answer = post(url, stream=stream)
    assert answer.status_code == status
    given = answer.json()["error"]
    assert (given["type"], given["code"]) == (kind, code)
    assert given["param"] == getattr(error, "param", None)
    assert "secret" not in answer.text
    assert answer.headers.get("retry-after") == retry_after
    assert answer.headers["x-request-id"]
    assert set(answer.json()) == {"error"}
    assert set(given) == {"message", "type", "param", "code"}


def test_a_full_server_does_no_work(llm: ScriptedLLM, url: str) -> None:
    llm.capacity_error = QUEUE_FULL
    assert httpx.post(url + CHAT, json={"bad": 1}).status_code == 429
    assert llm.chats == []


def test_sdk_retries_a_full_queue(llm: ScriptedLLM, url: str) -> None:
    full = CapacityError("full", retry_after=1)
    calls = []

    def check_capacity(origin: RequestOrigin) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise full

    llm.check_capacity = check_capacity  # type: ignore[method-assign]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=1) as client:
        assert client.chat.completions.create(model="idefics2-8b", messages=HELLO).choices[0].finish_reason == "stop"
    assert len(calls) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [[], [say("x")], [say("x", FinishReason.ABORT)]])
def test_an_answer_without_an_end_is_an_error(llm: ScriptedLLM, url: str, *, stream: bool, script: Any) -> None:
    llm.script = script
    answer = post(url, stream=stream)
    if stream and script:
        assert '"code":"internal_error"' in answer.text
    else:
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
    assert "abort" not in answer.text


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "decimal_above_max_value"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "empty_array"),
        ({"n": 17}, "n", "integer_above_max_value"),
        ({"guided_json": []}, "guided_json", "invalid_type"),
    ],
)
def test_an_invalid_stream_is_an_http_error(llm: ScriptedLLM, url: str, fields: Any, param: str, code: str) -> None:
    answer = post(url, stream=True, **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert llm.chats == []


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "'idefics2-8b', 'HuggingFaceM4/idefics2-8b'" in caught.value.message
    assert "gpt-4" not in caught.value.message


def test_the_alias_is_echoed(url: str) -> None:
    for sent, answered in [("HuggingFaceM4/idefics2-8b",) * 2, ("", "idefics2-8b"), (None, "idefics2-8b")]:
        assert ask(url, model=sent)["model"] == answered


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", b"[]", b'"x"', b"", b"null", b"\xff", b'{"messages":"\xff"}', b'{"messages":"\\ud800"}'),
        *(b'{"temperature":NaN}', b'{"x":Infinity}', b"[" * 100_000, b'{"seed":' + b"9" * 5000 + b"}"),
    ],
)
def test_not_json(url: str, body: bytes) -> None:
    answer = httpx.post(url + CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"
    assert len(answer.content) < 400


def test_a_number_beyond_floats(url: str) -> None:
    body = json.dumps({"messages": HELLO})[:-1] + ', "temperature": 1e400}'
    answer = httpx.post(url + CHAT, content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "temperature", "invalid_type")


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("text/json+json", 415),
        (None, 415),
    ],
)
def test_content_type(url: str, content_type: str | None, status: int) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    answer = httpx.post(url + CHAT, content=json.dumps({"messages": HELLO}), headers=headers)
    assert answer.status_code == status
    if status == 415:
        assert answer.json()["error"]["code"] == "unsupported_media_type"


def chat_page(url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole OpenAPI page, and of it what is said of this endpoint."""
    page = httpx.get(f"{url}/openapi.json").json()
    return page, page["paths"][CHAT]["post"]


def test_the_documented_examples_work(llm: ScriptedLLM, url: str) -> None:
    page, endpoint = chat_page(url)
    content = endpoint["requestBody"]["content"]["application/json"]
    assert "#/$defs" not in json.dumps(content)
    assert "422" not in page["paths"]["/v1/models/{model_id}"]["get"]["responses"]
    assert content["schema"]["properties"]["stream_options"]["properties"]["include_usage"]["type"] == "boolean"
    examples = {name: example["value"] for name, example in content["examples"].items()}
    assert set(examples) == {"text", "image", "two_images", "structured", "tools", "streaming"}
    assert all(example["summary"] for example in content["examples"].values())
    for name, body in examples.items():
        llm.script = [say("{}", STOP, index=index) for index in range(body.get("n", 1))]
        jsonschema.validate(body, content["schema"])
        answer = httpx.post(url + CHAT, json=body)
        assert answer.status_code == 200, (name, answer.text)
        assert ("text/event-stream" in answer.headers["content-type"]) == (name == "streaming")
    pictures = [[p for p in chat.turns[0].parts if isinstance(p, ImageInput)] for chat in llm.chats]
    assert [len(found) for found in pictures] == [1, 0, 2, 1, 0, 0]
    assert [picture.detail for picture in pictures[2]] == ["low", "high"]
    assert [chat.sampling.grammar is not None for chat in llm.chats] == [False, False, False, True, True, False]
    assert httpx.get(f"{url}/docs").status_code == 200


def test_the_page_says_what_errors_there_are(url: str) -> None:
    page, endpoint = chat_page(url)
    assert set(endpoint["responses"]) == {"200", "400", "404", "413", "415", "429", "500", "503", "default"}
    for status, answer in endpoint["responses"].items():
        if status != "200":
            assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorAnswer"}
    assert set(endpoint["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    error = post(url, messages=[]).json()
    jsonschema.validate(error, {"$ref": "#/components/schemas/ErrorAnswer", **page})


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("fields", "script"),
    [
        ({}, TWO_CATS),
        ({"service_tier": "auto", "return_token_ids": True}, TWO_CATS),
        ({}, [say("", STOP, stop_reason="\n")]),
        ({}, [say("x", FinishReason.LENGTH, stop_reason=5)]),
        ({"logprobs": True}, [say("x", STOP, logprobs=[Logprob(7, "x", b"x", -math.inf)])]),
        (
            {"logprobs": True, "top_logprobs": 1},
            [say("x", STOP, logprobs=[Logprob(7, "x", b"x", -1.0, (Logprob(8, "y", b"\xff", 0.0),))])],
        ),
        ({"n": 2}, [say("x", STOP), say("y", STOP, index=1)]),
        ({"tools": [TOOL], "tool_choice": "required"}, [say('[{"name":"f","arguments":{}}]', STOP)]),
    ],
)
def test_answers_keep_to_their_schema(llm: ScriptedLLM, url: str, fields: Any, script: Any) -> None:
    """Without the leniency that additional keys get: what is sent is documented."""
    page, endpoint = chat_page(url)
    schema = endpoint["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ChatCompletion"}
    for component in page["components"]["schemas"].values():
        if component.get("type") == "object":
            component["additionalProperties"] = False
    llm.script = script
    body = ask(url, **fields)
    jsonschema.validate(body, {**schema, **page})


def test_the_example_pictures_are_pictures() -> None:
    found = []
    for part in chat_examples("m")["two_images"]["value"]["messages"][0]["content"][:2]:
        encoded = part["image_url"]["url"].removeprefix("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
            found.append((picture.size, picture.getpixel((5, 5))))
    assert found == [((32, 32), (220, 30, 30)), ((16, 16), (30, 60, 220))]
