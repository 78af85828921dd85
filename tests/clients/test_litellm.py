"""`litellm` as a library, with the two providers that people name for servers of this kind."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # read at import: it would download prices

import litellm

from tests.clients.talk import MODEL, SPLITTING_TOKENS, Document, Verdict, Weather, picture, picture_url, user
from tests.serving import Server

pytestmark = pytest.mark.clients

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": Weather.model_json_schema(),
    },
}


@pytest.fixture(params=["openai", "hosted_vllm"])
def target(request: pytest.FixtureRequest, server: Server) -> dict[str, Any]:
    """Where to ask, by provider."""
    return {"model": f"{request.param}/{MODEL}", "api_base": f"{server.base_url}/v1", "api_key": "EMPTY"}


def ask(target: dict[str, Any], *messages: dict[str, Any], **options: Any) -> Any:
    defaults = {"temperature": 0, "max_tokens": 12, "num_retries": 0}
    return litellm.completion(**target, messages=list(messages), **{**defaults, **options})


def test_an_answer(target: dict[str, Any]) -> None:
    answer = ask(
        target,
        {"role": "system", "content": "Be brief."},
        user("Hello"),
        ignore_eos=True,
        user="somebody",
        metadata={"trace": {"nested": 1}},
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_stream_is_the_answer_in_pieces(target: dict[str, Any]) -> None:
    whole = ask(target, user("Tell me"))
    chunks = list(ask(target, user("Tell me"), stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len(pieces) > 3
    assert "".join(pieces) == whole.choices[0].message.content
    rebuilt = litellm.stream_chunk_builder(chunks)
    assert rebuilt is not None
    assert rebuilt.choices[0].finish_reason == whole.choices[0].finish_reason
    assert rebuilt.usage.completion_tokens == whole.usage.completion_tokens
    assert rebuilt.usage.prompt_tokens == whole.usage.prompt_tokens


def test_asyncio(target: dict[str, Any]) -> None:
    alone = ask(target, user("Hello")).choices[0].message.content

    async def one(stream: bool) -> str:
        options = {"temperature": 0, "max_tokens": 12, "stream": stream}
        answer = await litellm.acompletion(**target, messages=[user("Hello")], **options)
        if stream:
            return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])
        content: str = answer.choices[0].message.content
        return content

    async def together() -> list[str]:
        return await asyncio.gather(*(one(bool(index % 2)) for index in range(6)))

    assert set(asyncio.run(together())) == {alone}


def test_pictures(target: dict[str, Any]) -> None:
    url = picture_url(seed=2)
    low, high = (ask(target, user("What?", picture(url, detail))).usage.prompt_tokens for detail in ("low", "high"))
    assert high - low == SPLITTING_TOKENS


def test_several_answers_with_logprobs(target: dict[str, Any]) -> None:
    answer = ask(target, user("Tell me"), n=2, temperature=1, seed=1, logprobs=True, top_logprobs=2, ignore_eos=True)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert len(choice.logprobs.content) == 12
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_structured_answers(target: dict[str, Any], closing: dict[str, int]) -> None:
    answer = ask(target, user("What is this?"), response_format=Document, max_tokens=600, logit_bias=closing)
    Document.model_validate_json(answer.choices[0].message.content)
    anything = ask(target, user("JSON"), response_format={"type": "json_object"}, max_tokens=300, logit_bias=closing)
    assert isinstance(json.loads(anything.choices[0].message.content), dict)
    chunks = ask(target, user("Judge"), response_format=Verdict, max_tokens=200, temperature=1, seed=1, stream=True)
    Verdict.model_validate_json("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "get_weather"}}, "required"])
def test_a_function_is_called(target: dict[str, Any], closing: dict[str, int], choice: Any, stream: bool) -> None:
    options: dict[str, Any] = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 400, "logit_bias": closing}
    question = user("Is it raining?")
    answer = ask(target, question, parallel_tool_calls=False, stream=stream, **options)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer))
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    Weather.model_validate_json(call.function.arguments)
    after = ask(target, question, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "It is."})
    assert after.choices[0].finish_reason in ("stop", "length")


def test_errors_are_the_right_exceptions(target: dict[str, Any]) -> None:
    with pytest.raises(litellm.NotFoundError):
        ask({**target, "model": f"{target['model']}-2"}, user("Hello"))
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(target, user("Hello"), temperature=3)
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(target, user("word " * 3000))


def test_completions(server: Server) -> None:
    options: dict[str, Any] = {
        "model": f"text-completion-openai/{MODEL}",
        "api_base": f"{server.base_url}/v1",
        "api_key": "EMPTY",
        "max_tokens": 8,
        "temperature": 0,
    }
    whole = litellm.text_completion(prompt="Once upon", **options)
    chunks = list(litellm.text_completion(prompt="Once upon", stream=True, **options))
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == whole.choices[0].text


def test_the_responses_api(target: dict[str, Any]) -> None:
    options: dict[str, Any] = {"input": "Hello", "max_output_tokens": 20, "temperature": 0}
    response = litellm.responses(**target, **options)
    assert response.output[0].content[0].text
    assert response.usage.output_tokens <= 20
    events = list(litellm.responses(**target, **options, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == response.output[0].content[0].text
