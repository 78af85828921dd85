"""The responses endpoint end to end, through OpenAI's own client and plain HTTP, on a real socket."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from server.api.responses_answer import ResponseObject
from server.api.responses_schemas import responses_examples
from server.api.schemas import EXAMPLE_IMAGE
from server.errors import ClientError, EngineDeadError, RequestFailedError, UnavailableError
from server.types import FinishReason, GrammarSpec, ImageInput, Logprob, TextPart, Truncation, Turn

from .scripted_llm import QUEUE_FULL, ScriptedLLM, say, serving

PICTURE: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": "What is this?"},
            {"type": "input_image", "image_url": EXAMPLE_IMAGE, "detail": "low"},
        ],
    }
]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[ScriptedLLM, str]]:
    """One server for the module, because starting and stopping one takes longer than any test here."""
    llm = ScriptedLLM()
    with serving(llm) as url:
        yield llm, url


@pytest.fixture
def llm(server: tuple[ScriptedLLM, str]) -> ScriptedLLM:
    server[0].reset()
    return server[0]


@pytest.fixture
def url(llm: ScriptedLLM, server: tuple[ScriptedLLM, str]) -> str:
    return server[1]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0) as made:
        yield made


def post(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/v1/responses", json=body)


def ask(url: str, **fields: Any) -> dict[str, Any]:
    answer = post(url, {"input": "Hi", **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def refusal(url: str, **fields: Any) -> tuple[str | None, str]:
    """(param, code) of a 400."""
    answer = post(url, {"input": "Hi", **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error["param"], error["code"]


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


def test_settings_come_back(url: str) -> None:
    schema = {"type": "object", "properties": {"z": {}, "a": {}}}
    text = {
        "format": {"type": "json_schema", "name": "pair", "schema": schema, "strict": True, "description": "Two."},
        "verbosity": "low",
    }
    given: dict[str, Any] = {
        "model": "HuggingFaceM4/idefics2-8b",
        "instructions": "Be brief.",
        "max_output_tokens": 7,
        "max_tool_calls": 3,
        "metadata": {"shop": "12", "": ""},
        "parallel_tool_calls": False,
        "prompt_cache_key": "key",
        "safety_identifier": "hashed",
        "temperature": 0.25,
        "text": text,
        "top_logprobs": 4,
        "top_p": 0.5,
        "user": "somebody",
        "tool_choice": "none",
    }
    body = ask(url, **given)
    assert {name: body[name] for name in given} == given
    assert list(body["text"]["format"]["schema"]["properties"]) == ["z", "a"]


def test_every_field_is_in_the_documented_type_and_the_sdks(url: str) -> None:
    """What is sent is written by hand; both descriptions of it must fit, field by field."""
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}]
    for extra in ({}, {"tools": tools, "tool_choice": "none"}, {"include": ["message.output_text.logprobs"]}):
        raw = post(url, {"input": "Hi", **extra}).content
        body = json.loads(raw)
        assert set(ResponseObject.model_fields) == set(body)
        assert ResponseObject.model_validate_json(raw, strict=True).model_dump(mode="json") == body
        Response.model_validate(body)


def test_nothing_is_told_of_labels_that_are_no_short_text(url: str) -> None:
    body = ask(url, user={"id": 5}, safety_identifier=["x"], prompt_cache_key="x" * 513)
    assert (body["user"], body["safety_identifier"], body["prompt_cache_key"]) == (None, None, None)
    assert ask(url, user="x" * 512)["user"] == "x" * 512


def test_accepted_and_ignored(llm: ScriptedLLM, url: str) -> None:
    plain = ask(url)
    body = ask(
        url,
        store=False,
        background=False,
        reasoning={"effort": "high", "summary": "auto"},
        service_tier="flex",
        truncation="auto",
        include=["reasoning.encrypted_content", "some.future.value"],
        prompt_cache_retention="24h",
        context_management=[],
        logprobs=False,
        stream=False,
        unknown={"a": 1},
    )
    changing = ("id", "output", "created_at", "completed_at")
    assert {k: v for k, v in body.items() if k not in changing} == {k: v for k, v in plain.items() if k not in changing}
    assert llm.chats[0].sampling == llm.chats[1].sampling


def test_null_is_absent(llm: ScriptedLLM, url: str) -> None:
    names = [
        *("instructions", "max_output_tokens", "temperature", "top_p", "text", "stream", "stream_options", "include"),
        *(
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "metadata",
            "store",
            "truncation",
            "reasoning",
            "user",
            "seed",
        ),
        *("previous_response_id", "conversation", "prompt", "background", "top_logprobs", "service_tier", "model"),
        *("max_tokens", "messages", "response_format", "functions", "logprobs", "n", "return_token_ids"),
    ]
    assert ask(url, **dict.fromkeys(names))["text"]["format"] == {"type": "text"}
    assert ask(url, text={"format": None, "verbosity": None})["text"]["verbosity"] == "medium"
    ask(url)
    assert llm.chats[0].sampling == llm.chats[1].sampling == llm.chats[2].sampling


def test_sampling_reaches_the_engine(llm: ScriptedLLM, url: str) -> None:
    ask(
        url,
        seed=5,
        top_k=3,
        min_p=0.1,
        ignore_eos=True,
        min_tokens=2,
        max_output_tokens=4,
        stop=["\n"],
        stop_token_ids=[5],
        logit_bias={"9": -1},
        repetition_penalty=1.1,
        priority=-2,
        cache_salt="salt",
        truncate_prompt_tokens=50,
    )
    (chat,) = llm.chats
    sampling = chat.sampling
    assert (sampling.seed, sampling.top_k, sampling.min_p, sampling.ignore_eos) == (5, 3, 0.1, True)
    assert (sampling.min_tokens, sampling.max_tokens, sampling.stop, sampling.stop_token_ids) == (2, 4, ("\n",), (5,))
    assert (sampling.logit_bias, sampling.repetition_penalty) == ({9: -1.0}, 1.1)
    assert (chat.priority, chat.cache_salt, chat.truncation) == (-2, "salt", Truncation(max_tokens=50))


def test_empty_instructions_are_none(llm: ScriptedLLM, url: str) -> None:
    assert ask(url, instructions="")["instructions"] == ""
    assert [turn.role for turn in llm.chats[0].turns] == ["user"]


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


class Receipt(BaseModel):
    shop: str
    total: float


def test_sdk_parse(llm: ScriptedLLM, client: openai.OpenAI) -> None:
    llm.script = (say('{"shop": "A'), say('BC", "total": 2.5}'), say("", FinishReason.STOP))
    answer = client.responses.parse(model="idefics2-8b", input="Invent.", text_format=Receipt)
    assert answer.output_parsed == Receipt(shop="ABC", total=2.5)
    grammar = llm.chats[0].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.param) == ("json_schema", "text.format.schema")
    assert json.loads(grammar.source)["required"] == ["shop", "total"]


@pytest.mark.parametrize(
    ("text", "grammar"),
    [
        ({}, None),
        ({"format": {"type": "text"}}, None),
        ({"format": {"type": "text", "schema": {"type": "null"}}}, None),
        ({"format": {"type": "json_object"}}, GrammarSpec("json_schema", '{"type":"object"}', "text.format")),
        (
            {"format": {"type": "json_schema", "name": "n", "schema": {"b": 1, "a": None}, "strict": False}},
            GrammarSpec("json_schema", '{"b":1,"a":null}', "text.format.schema"),
        ),
    ],
)
def test_text_format(llm: ScriptedLLM, url: str, text: dict[str, Any], grammar: GrammarSpec | None) -> None:
    ask(url, text=text)
    assert llm.chats[0].sampling.grammar == grammar


def test_other_ways_to_constrain(llm: ScriptedLLM, url: str) -> None:
    ask(url, structured_outputs={"choice": ["a", "b"]})
    assert llm.chats[0].sampling.grammar == GrammarSpec("choice", '["a","b"]', "structured_outputs.choice")
    both = {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a+"}}
    assert refusal(url, **both) == ("structured_outputs.regex", "invalid_value")


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


def test_logprobs_only_where_asked_for(llm: ScriptedLLM, url: str) -> None:
    ask(url, top_logprobs=3)
    ask(url, include=["message.output_text.logprobs"])
    assert [chat.sampling.num_logprobs for chat in llm.chats] == [None, 0]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": []}, "input", "empty_array"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "unsupported_value"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"background": 0}, "background", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_value"),
        ({"store": "no"}, "store", "invalid_type"),
        ({"moderation": {"model": "m"}}, "moderation", "unsupported_parameter"),
        ({"messages": []}, "messages", "unsupported_parameter"),
        ({"max_tokens": 5}, "max_tokens", "unsupported_parameter"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "unsupported_parameter"),
        ({"functions": [{}]}, "functions", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"continue_final_message": True}, "continue_final_message", "unsupported_parameter"),
        ({"return_token_ids": True}, "return_token_ids", "unsupported_parameter"),
        ({"n": 2}, "n", "unsupported_value"),
        ({"instructions": 5}, "instructions", "invalid_type"),
        ({"instructions": [{"role": "system"}]}, "instructions", "invalid_type"),
        ({"max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
        ({"max_output_tokens": 2.5}, "max_output_tokens", "invalid_type"),
        ({"max_output_tokens": 2, "min_tokens": 3}, "min_tokens", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
        ({"temperature": "0.5"}, "temperature", "invalid_type"),
        ({"top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"top_logprobs": -1}, "top_logprobs", "integer_below_min_value"),
        ({"include": "message.output_text.logprobs"}, "include", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"truncation": "left"}, "truncation", "invalid_value"),
        ({"text": "json"}, "text", "invalid_type"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n"}}},
            "text.format.schema",
            "missing_required_parameter",
        ),
        ({"text": {"format": {"type": "json_schema", "schema": "{}"}}}, "text.format.schema", "invalid_type"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}},
            "text.format.name",
            "invalid_value",
        ),
        (
            {"text": {"format": {"type": "json_schema", "schema": {"x": "y" * 70000}}}},
            "text.format.schema",
            "invalid_value",
        ),
        ({"metadata": []}, "metadata", "invalid_type"),
        ({"metadata": {"a": 1}}, "metadata", "invalid_type"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "array_above_max_length"),
        ({"metadata": {"k" * 65: "x"}}, "metadata", "invalid_value"),
        ({"metadata": {"k": "x" * 513}}, "metadata", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"input": PICTURE, "truncate_prompt_tokens": 50}, "truncate_prompt_tokens", "unsupported_parameter"),
        ({"logit_bias": {"32003": 1}}, "logit_bias", "invalid_value"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "unsupported_parameter"),
    ],
)
def test_refused(llm: ScriptedLLM, url: str, fields: dict[str, Any], param: str, code: str) -> None:
    assert refusal(url, **fields) == (param, code)
    assert not llm.chats


def test_limits_of_metadata_themselves(url: str) -> None:
    metadata = {f"{i:064d}": "x" * 512 for i in range(16)}
    assert ask(url, metadata=metadata)["metadata"] == metadata


def test_refusals_repeat_nothing(url: str) -> None:
    secret = "hunter2"
    for fields in (
        {"metadata": {secret: 1}},
        {"previous_response_id": secret},
        {"text": {"format": {"type": secret}}},
        {"tool_choice": secret},
        {"truncation": secret},
        {"input": [{"type": secret}]},
    ):
        answer = post(url, {"input": "Hi", **fields})
        assert answer.status_code == 400
        assert secret not in answer.text


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
    answer = post(url, {"input": "Hi", "stream": stream})
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
        answer = post(url, {"input": "Hi"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert llm.closed.wait(5)


def test_a_full_queue(llm: ScriptedLLM, url: str) -> None:
    llm.capacity_error = QUEUE_FULL
    answer = post(url, {"input": "Hi"})
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
        assert post(url, example["value"]).status_code == 200
    assert any(isinstance(part, ImageInput) for chat in llm.chats for turn in chat.turns for part in turn.parts)
    reference = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    answer = document["components"]["schemas"][reference.rpartition("/")[2]]
    assert set(answer["required"]) == set(ask(url))
    assert {"400", "404", "413", "415", "429", "500", "503"} <= operation["responses"].keys()
