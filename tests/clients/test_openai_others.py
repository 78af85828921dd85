"""The `openai` package's other endpoints: completions, and responses without a memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.clients.talk import MODEL, SPLITTING_TOKENS, Document, Verdict, Weather, picture_url
from tests.serving import Server

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="EMPTY", max_retries=0) as made:
        yield made


# --- completions ---


def test_a_prompt_is_continued_as_text_and_as_ids(server: Server, client: openai.OpenAI) -> None:
    ids = httpx.post(f"{server.base_url}/tokenize", json={"prompt": "Once upon a time"}).json()["tokens"]
    text, tokens = (
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=9, temperature=0)
        for prompt in ("Once upon a time", ids)
    )
    assert text.object == "text_completion"
    assert text.id.startswith("cmpl-")
    assert text.choices[0].text == tokens.choices[0].text
    assert text.usage is not None
    assert text.usage.prompt_tokens == len(ids)


def test_prompts_times_n_are_numbered_in_order(client: openai.OpenAI) -> None:
    prompts = ["One", "Two", "Three"]
    answer = client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=4, temperature=1, echo=True)
    assert [choice.index for choice in answer.choices] == list(range(6))
    for choice in answer.choices:
        assert choice.text.startswith(prompts[choice.index // 2])


def test_echo_with_logprobs_tells_those_of_the_prompt(client: openai.OpenAI) -> None:
    """What evaluation harnesses score texts with."""
    answer = client.completions.create(
        model=MODEL, prompt="The cat sat", max_tokens=3, echo=True, logprobs=2, temperature=0
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert answer.usage is not None
    assert told.tokens is not None
    assert told.token_logprobs is not None
    assert told.top_logprobs is not None
    count = answer.usage.total_tokens
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == count
    assert told.token_logprobs[0] is None
    assert all(value <= 0 for value in told.token_logprobs[1:])
    assert told.text_offset is not None
    assert told.text_offset == sorted(told.text_offset)


def test_a_completion_streams(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": ["Once", "Twice"], "max_tokens": 12, "temperature": 0}
    plain = client.completions.create(**options)
    texts = {0: "", 1: ""}
    usage = None
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usage = chunk.usage or usage
    assert texts == {choice.index: choice.text for choice in plain.choices}
    assert usage is not None
    assert plain.usage is not None
    assert usage.total_tokens == plain.usage.total_tokens


# --- responses ---


def respond(client: openai.OpenAI, **options: Any) -> Any:
    return client.responses.create(**{"model": MODEL, "input": "Hello", "max_output_tokens": 8, **options})


def message(url: str, detail: str) -> list[dict[str, Any]]:
    parts = [
        {"type": "input_text", "text": "What is this?"},
        {"type": "input_image", "image_url": url, "detail": detail},
    ]
    return [{"role": "user", "content": parts}]


def test_a_response_has_its_text_and_usage(client: openai.OpenAI) -> None:
    response = respond(client, instructions="Be brief.", extra_body={"ignore_eos": True})
    assert response.object == "response"
    assert response.id.startswith("resp")
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].type == "message"
    assert response.output_text
    assert response.usage.output_tokens == 8
    assert response.usage.total_tokens == response.usage.input_tokens + 8
    ended = respond(client, extra_body={"logit_bias": {"2": 100}, "min_tokens": 3})
    assert ended.status == "completed"


def test_a_response_sees_pictures(client: openai.OpenAI) -> None:
    url = picture_url(seed=5)
    low, high = (respond(client, input=message(url, detail)).usage.input_tokens for detail in ("low", "high"))
    assert high - low == SPLITTING_TOKENS


@pytest.mark.parametrize(("extra", "status"), [({}, "incomplete"), ({"logit_bias": {"2": 100}}, "completed")])
def test_a_response_streams_its_named_events(client: openai.OpenAI, extra: dict[str, Any], status: str) -> None:
    options: dict[str, Any] = {"temperature": 0, "extra_body": {"min_tokens": 7, **extra}}
    plain = respond(client, **options)
    with client.responses.stream(model=MODEL, input="Hello", max_output_tokens=8, **options) as stream:
        events: list[Any] = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == f"response.{status}"
    assert "response.output_text.done" in kinds
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final = events[-1].response
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text == plain.output_text
    assert final.status == plain.status == status
    assert final.usage.output_tokens == plain.usage.output_tokens
    if status == "completed":
        assert stream.get_final_response().output_text == final.output_text


def test_a_response_parses(client: openai.OpenAI, closing: dict[str, int]) -> None:
    response = client.responses.parse(
        model=MODEL,
        input="What is this?",
        text_format=Document,
        max_output_tokens=600,
        extra_body={"logit_bias": closing},
    )
    assert isinstance(response.output_parsed, Document)
    with client.responses.stream(
        model=MODEL, input="Judge", text_format=Verdict, max_output_tokens=200, temperature=1
    ) as stream:
        final = stream.get_final_response()
    assert isinstance(final.output_parsed, Verdict)


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_calls_a_function(client: openai.OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "input": "Is it raining?",
        "tools": [openai.pydantic_function_tool(Weather, name="get_weather")["function"] | {"type": "function"}],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "max_output_tokens": 400,
    }
    if stream:
        with client.responses.stream(**options) as events:
            kinds = [event.type for event in events]
            response: Any = events.get_final_response()
        assert "response.function_call_arguments.done" in kinds
    else:
        response = client.responses.create(**options)
    (call,) = response.output
    assert (call.type, call.name) == ("function_call", "get_weather")
    Weather.model_validate_json(call.arguments)
    after = client.responses.create(
        model=MODEL,
        input=[
            {"role": "user", "content": "Is it raining?"},
            call.model_dump(exclude_none=True, exclude={"parsed_arguments"}),
            {"type": "function_call_output", "call_id": call.call_id, "output": "It is."},
        ],
        max_output_tokens=5,
    )
    assert after.status in ("completed", "incomplete")


def test_a_memory_is_refused(client: openai.OpenAI) -> None:
    for options, param in ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"store": True}, "store"):
        with pytest.raises(openai.BadRequestError) as caught:
            respond(client, **options)
        assert caught.value.param == param


def test_responses_in_asyncio(server: Server, client: openai.OpenAI) -> None:
    alone = respond(client, temperature=0).output_text

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="EMPTY") as made:
            asked = (
                made.responses.create(model=MODEL, input="Hello", max_output_tokens=8, temperature=0) for _ in range(6)
            )
            return [response.output_text for response in await asyncio.gather(*asked)]

    assert set(asyncio.run(together())) == {alone}
