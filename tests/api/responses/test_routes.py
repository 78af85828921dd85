"""The responses endpoint end to end, through OpenAI's own client and plain HTTP, on a real socket."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response

from server.api.responses.answer import ResponseObject
from server.api.responses.schemas import responses_examples
from server.api.schemas import EXAMPLE_IMAGE
from server.errors import ClientError, EngineDeadError, RequestFailedError, UnavailableError
from server.types import FinishReason, ImageInput, Logprob, TextPart, Turn
from tests.api.responses.client import PICTURE, RECEIPT, RECEIPT_SCRIPT, Receipt, ask, post
from tests.api.scripted_llm import QUEUE_FULL, ScriptedLLM, say


def test_sdk_plain(llm: ScriptedLLM, client: openai.OpenAI) -> None:
    before = int(time.time())
    answer = client.responses.create(
        model="idefics2-8b", instructions="Be brief.", input=PICTURE, max_output_tokens=5, temperature=0, store=False
    )
    assert answer.output_text == "Two cats."
    assert answer.status == "completed"
    assert answer.incomplete_details is None
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (85, 3, 88)
    assert answer.usage.input_tokens_details.cached_tokens == 16
    assert answer.usage.input_tokens_details.cache_write_tokens == 0
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert before <= answer.created_at <= (answer.completed_at or 0) <= time.time()
    assert answer._request_id is not None
    (chat,) = llm.chats
    assert chat.turns == (
        Turn(role="system", parts=(TextPart("Be brief."),)),
        Turn(
            role="user",
            parts=(
                TextPart("What is this?"),
                ImageInput(url=EXAMPLE_IMAGE, detail="low", param="input[0].content[1].image_url"),
            ),
        ),
    )
    assert (chat.sampling.max_tokens, chat.sampling.temperature) == (5, 0.0)
    assert (chat.sampling.grammar, chat.sampling.num_logprobs, chat.n) == (None, None, 1)
    assert chat.request_id == answer.id
    assert llm.closed.wait(5)


def test_plain_body(url: str) -> None:
    body = ask(url)
    item = body["output"][0]
    assert body.pop("id").startswith("resp_")
    assert item.pop("id").startswith("msg_")
    assert isinstance(body.pop("created_at"), int)
    assert isinstance(body.pop("completed_at"), int)
    content = [{"type": "output_text", "text": "Two cats.", "annotations": [], "logprobs": []}]
    assert body == {
        "object": "response",
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "model": "idefics2-8b",
        "output": [{"type": "message", "status": "completed", "role": "assistant", "content": content}],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 85,
            "input_tokens_details": {
                "cached_tokens": 16,
                "cache_write_tokens": 0,
                "image_tokens": 64,
                "text_tokens": 21,
            },
            "output_tokens": 3,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 88,
        },
        "user": None,
        "metadata": {},
    }


def test_every_field_is_in_the_documented_type_and_the_sdks(url: str) -> None:
    """What is sent is written by hand; both descriptions of it must fit, field by field."""
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}]
    for extra in ({}, {"tools": tools, "tool_choice": "none"}, {"include": ["message.output_text.logprobs"]}):
        raw = post(url, **extra).content
        body = json.loads(raw)
        assert set(ResponseObject.model_fields) == set(body)
        assert ResponseObject.model_validate_json(raw, strict=True).model_dump(mode="json") == body
        Response.model_validate(body)


def test_cut_off_by_the_limit(llm: ScriptedLLM, client: openai.OpenAI) -> None:
    llm.script = (say("Two"), say(" ca", FinishReason.LENGTH))
    answer = client.responses.create(model="idefics2-8b", input="Hi", max_output_tokens=2)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.completed_at is None
    assert answer.output_text == "Two ca"
    assert answer.output[0].type == "message"
    assert answer.output[0].status == "incomplete"


def test_no_text_at_all(llm: ScriptedLLM, client: openai.OpenAI) -> None:
    llm.script = (say("", FinishReason.STOP, stop_reason="\n"),)
    answer = client.responses.create(model="idefics2-8b", input="Hi", extra_body={"stop": "\n"})
    assert (answer.status, answer.output_text, len(answer.output)) == ("completed", "", 1)


def test_sdk_parse(llm: ScriptedLLM, client: openai.OpenAI) -> None:
    llm.script = RECEIPT_SCRIPT
    answer = client.responses.parse(model="idefics2-8b", input="Invent.", text_format=Receipt)
    assert answer.output_parsed == RECEIPT
    grammar = llm.chats[0].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.param) == ("json_schema", "text.format.schema")
    assert json.loads(grammar.source)["required"] == ["shop", "total"]


A_HALF = Logprob(token_id=5, token="\ufffd", data=b"\xf0\x9f", logprob=-0.5)
B_HALF = Logprob(token_id=6, token="\ufffd", data=b"\x98\x80", logprob=float("-inf"), top=(A_HALF,))
END = Logprob(token_id=2, token="</s>", data=b"", logprob=-0.25)


def test_logprobs(llm: ScriptedLLM, client: openai.OpenAI) -> None:
    llm.script = (say("😀", logprobs=(A_HALF, B_HALF)), say("", FinishReason.STOP, logprobs=(END,)))
    answer = client.responses.create(
        model="idefics2-8b", input="Hi", include=["message.output_text.logprobs"], top_logprobs=1
    )
    assert llm.chats[0].sampling.num_logprobs == 1
    assert answer.output[0].type == "message"
    content = answer.output[0].content[0]
    assert content.type == "output_text"
    assert content.logprobs is not None
    assert [entry.token for entry in content.logprobs] == ["\ufffd", "\ufffd", "</s>"]
    assert b"".join(bytes(entry.bytes) for entry in content.logprobs).decode() == "😀"
    assert [entry.logprob for entry in content.logprobs] == [-0.5, -9999.0, -0.25]
    assert [len(entry.top_logprobs) for entry in content.logprobs] == [0, 1, 0]
    assert (content.logprobs[1].top_logprobs[0].logprob, content.logprobs[1].top_logprobs[0].bytes) == (
        -0.5,
        [0xF0, 0x9F],
    )


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="gpt-4o", input="Hi")
    assert caught.value.code == "model_not_found"


def test_not_json(url: str) -> None:
    answer = httpx.post(f"{url}/v1/responses", content=b"input=Hi", headers={"content-type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    broken = httpx.post(f"{url}/v1/responses", content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ClientError("too long", param="messages", code="context_length_exceeded"), openai.BadRequestError),
        (UnavailableError("leaving", retry_after=1.0), openai.InternalServerError),
        (RuntimeError("a fault of ours"), openai.InternalServerError),
    ],
)
def test_errors_of_preparing(
    llm: ScriptedLLM, client: openai.OpenAI, *, error: Exception, raised: type[openai.APIError], stream: bool
) -> None:
    llm.prepare_script = (error,)
    with pytest.raises(raised) as caught:
        client.responses.create(model="idefics2-8b", input="Hi", stream=stream)
    assert "a fault of ours" not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_token_are_a_status(llm: ScriptedLLM, url: str, *, stream: bool) -> None:
    llm.script = (EngineDeadError("the engine is not running", retry_after=5.0),)
    answer = post(url, stream=stream)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["code"] == "engine_unavailable"


def test_errors_of_an_answer_that_is_not_streamed(llm: ScriptedLLM, url: str) -> None:
    for script in (
        (say("Two"), RequestFailedError("a step failed")),
        (say("Two"), say("", FinishReason.ABORT)),
        (say("Two"),),
        (),
    ):
        llm.script = script
        llm.closed.clear()
        answer = post(url)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert llm.closed.wait(5)


def test_a_full_queue(llm: ScriptedLLM, url: str) -> None:
    llm.capacity_error = QUEUE_FULL
    answer = post(url)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    # What no queue would make right is told even then.
    assert httpx.post(f"{url}/v1/responses", content=b"Hi").status_code == 415


def test_nothing_is_stored(client: openai.OpenAI, url: str) -> None:
    answer = client.responses.create(model="idefics2-8b", input="Hi")
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.retrieve(answer.id)
    assert (caught.value.code, caught.value.param) == ("not_found", "response_id")
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(answer.id)
    assert httpx.get(f"{url}/v1/responses").status_code == 405


def test_an_answer_goes_back_as_history(llm: ScriptedLLM, client: openai.OpenAI) -> None:
    """The way in which OpenAI's documentation keeps a conversation: all output items, as they came."""
    history: list[Any] = [{"role": "user", "content": "How many?"}]
    first = client.responses.create(model="idefics2-8b", input=history)
    history += first.output
    history.append({"role": "user", "content": "And dogs?"})
    client.responses.create(model="idefics2-8b", input=history)
    assert [(turn.role, turn.parts) for turn in llm.chats[1].turns] == [
        ("user", (TextPart("How many?"),)),
        ("assistant", (TextPart("Two cats."),)),
        ("user", (TextPart("And dogs?"),)),
    ]


def test_openapi_shows_what_is_true(llm: ScriptedLLM, url: str) -> None:
    """Every example is answered, and the answer's schema is the one that the page shows."""
    document = httpx.get(f"{url}/openapi.json").json()
    operation = document["paths"]["/v1/responses"]["post"]
    shown = operation["requestBody"]["content"]["application/json"]
    assert {"input", "instructions", "text", "metadata", "tools"} <= shown["schema"]["properties"].keys()
    assert shown["examples"] == responses_examples("idefics2-8b")
    assert "/v1/responses/{response_id}" not in document["paths"]
    for example in shown["examples"].values():
        assert post(url, **example["value"]).status_code == 200
    assert any(isinstance(part, ImageInput) for chat in llm.chats for turn in chat.turns for part in turn.parts)
    reference = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    answer = document["components"]["schemas"][reference.rpartition("/")[2]]
    assert set(answer["required"]) == set(ask(url))
    assert {"400", "404", "413", "415", "429", "500", "503"} <= operation["responses"].keys()
