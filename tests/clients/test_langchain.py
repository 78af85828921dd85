"""`langchain-openai`: ChatOpenAI as chains use it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import SecretStr

from tests.clients.talk import MODEL, SPLITTING_TOKENS, Document, Verdict, picture, picture_url
from tests.serving import Server

pytestmark = pytest.mark.clients


@tool
def add(a: bool, b: bool) -> int:
    """Add two bits."""
    return int(a) + int(b)


class Maker:
    """Makes models of one server."""

    def __init__(self, base_url: str) -> None:
        self.base_url = f"{base_url}/v1"

    def __call__(self, **options: Any) -> ChatOpenAI:
        defaults = {"model": MODEL, "temperature": 0, "max_tokens": 12, "max_retries": 0}
        return ChatOpenAI(base_url=self.base_url, api_key=SecretStr("EMPTY"), **{**defaults, **options})


@pytest.fixture(scope="module")
def chat(server: Server) -> Maker:
    return Maker(server.base_url)


def test_invoke_tells_text_usage_and_why_it_ended(chat: Maker) -> None:
    answer = chat(extra_body={"ignore_eos": True}).invoke(
        [SystemMessage("Be brief.", name="operator"), HumanMessage("Hello", name="somebody")]
    )
    assert isinstance(answer, AIMessage)
    assert answer.text
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 12
    assert answer.usage_metadata["total_tokens"] == answer.usage_metadata["input_tokens"] + 12
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.response_metadata["model_name"] == MODEL
    assert answer.response_metadata["system_fingerprint"]


def test_a_conversation_goes_on_with_its_own_answer(chat: Maker) -> None:
    history: list[BaseMessage] = [HumanMessage("Hello")]
    history.append(chat().invoke(history))
    history.append(HumanMessage("And now?"))
    assert isinstance(chat().invoke(history), AIMessage)


def test_stream_adds_up_to_invoke(chat: Maker) -> None:
    whole = chat().invoke("Tell me")
    chunks = list(chat(stream_usage=True).stream("Tell me"))
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    assert len(chunks) > 3
    assert total.text == whole.text
    assert total.usage_metadata == whole.usage_metadata
    assert total.response_metadata["finish_reason"] == whole.response_metadata["finish_reason"]


def test_batch_and_asyncio(chat: Maker) -> None:
    prompts = [f"Question {index}?" for index in range(6)]
    alone = [chat().invoke(prompt).text for prompt in prompts]
    assert [answer.text for answer in chat().batch(list(prompts))] == alone

    async def together() -> list[str]:
        model = chat()
        try:
            return [answer.text for answer in await asyncio.gather(*(model.ainvoke(prompt) for prompt in prompts))]
        finally:
            await model.root_async_client.close()

    assert asyncio.run(together()) == alone


def test_logprobs_and_several_answers(chat: Maker) -> None:
    model = chat(logprobs=True, top_logprobs=3, temperature=1, seed=1, n=2, extra_body={"ignore_eos": True})
    (generations,) = model.generate([[HumanMessage("Tell me")]]).generations
    assert len(generations) == 2
    for generation in generations:
        told = generation.message.response_metadata["logprobs"]["content"]
        assert len(told) == 12
        assert all(len(token["top_logprobs"]) == 3 for token in told)


@pytest.mark.parametrize("style", ["openai", "standard"])
def test_pictures(chat: Maker, style: str) -> None:
    url = picture_url(seed=1, image_format="JPEG")

    def tokens(detail: str) -> int:
        image = picture(url, detail)
        if style == "standard":
            data = url.partition(",")[2]
            image = {"type": "image", "base64": data, "mime_type": "image/jpeg", "extras": {"detail": detail}}
        answer = chat().invoke([HumanMessage([{"type": "text", "text": "What is this?"}, image])])
        assert answer.usage_metadata is not None
        return answer.usage_metadata["input_tokens"]

    if style == "openai":
        assert tokens("high") - tokens("low") == SPLITTING_TOKENS
    else:
        assert tokens("high") > 320


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output(chat: Maker, closing: dict[str, int], method: Any) -> None:
    model = chat(max_tokens=600, logit_bias=closing)
    if method == "json_mode":  # any object: the caller's schema is not sent
        structured = model.with_structured_output(None, method=method)
        assert isinstance(structured.invoke("As JSON, please."), dict)
        return
    structured = model.with_structured_output(Document, method=method, include_raw=True)
    answer = structured.invoke("What is this?")
    assert isinstance(answer, dict)
    assert answer["parsing_error"] is None
    assert isinstance(answer["parsed"], Document)
    if method == "function_calling":
        assert answer["raw"].tool_calls[0]["name"] == "Document"


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_of_a_picture_streams(chat: Maker, method: Any) -> None:
    structured = chat(max_tokens=200, temperature=1, seed=2).with_structured_output(Verdict, method=method)
    message = HumanMessage([{"type": "text", "text": "Judge"}, picture(picture_url(), "low")])
    seen = list(structured.stream([message]))
    assert isinstance(seen[-1], Verdict)


def test_a_schema_as_a_dictionary(chat: Maker) -> None:
    structured = chat(max_tokens=200, temperature=1, seed=2).with_structured_output(
        {"title": "judge", **Verdict.model_json_schema()}, method="json_schema", strict=True
    )
    Verdict.model_validate(structured.invoke("Judge"))


@pytest.mark.parametrize("choice", ["any", "add"])
def test_a_tool_is_called_and_its_result_is_taken(chat: Maker, closing: dict[str, int], choice: str) -> None:
    model = chat(max_tokens=300, logit_bias=closing).bind_tools([add], tool_choice=choice, parallel_tool_calls=False)
    question = HumanMessage("What is one and one?")
    called = model.invoke([question])
    assert isinstance(called, AIMessage)
    assert called.invalid_tool_calls == []
    (call,) = called.tool_calls
    assert call["name"] == "add"
    result = add.invoke(call)
    assert isinstance(result, ToolMessage)
    assert isinstance(chat().invoke([question, called, result]), AIMessage)


def test_a_tool_call_streams(chat: Maker, closing: dict[str, int]) -> None:
    model = chat(max_tokens=300, logit_bias=closing).bind_tools([add], tool_choice="add")
    chunks = list(model.stream("What is one and one?"))
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    assert isinstance(total, AIMessage)
    assert total.invalid_tool_calls == []
    assert [call["name"] for call in total.tool_calls] == ["add"]
    assert set(total.tool_calls[0]["args"]) == {"a", "b"}


def test_tools_that_need_not_be_called(chat: Maker) -> None:
    answer = chat().bind_tools([add]).invoke("Hello")
    assert isinstance(answer, AIMessage)
    assert answer.tool_calls == []


def test_the_responses_api(chat: Maker, closing: dict[str, int]) -> None:
    answer = chat(use_responses_api=True).invoke("Hello")
    assert answer.text
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    structured = chat(use_responses_api=True, max_tokens=300, temperature=1).with_structured_output(
        Verdict, method="json_schema"
    )
    assert isinstance(structured.invoke("Judge"), Verdict)


def test_completions(server: Server) -> None:
    model = OpenAI(
        model=MODEL, base_url=f"{server.base_url}/v1", api_key=SecretStr("EMPTY"), max_tokens=8, temperature=0
    )
    assert "".join(model.stream("Once upon")) == model.invoke("Once upon")


def test_an_error_is_openais(chat: Maker) -> None:
    with pytest.raises(openai.BadRequestError, match="image"):
        chat().invoke([HumanMessage([picture("data:image/png;base64,AAAA")])])
    with pytest.raises(openai.NotFoundError):
        chat(model="another").invoke("Hello")
    with pytest.raises(ContextOverflowError):
        chat().invoke("word " * 3000)


def test_a_stream_that_is_left(server: Server, chat: Maker) -> None:
    stream: Iterator[Any] = chat(max_tokens=1900, extra_body={"ignore_eos": True}).stream("Go on")
    next(stream)
    stream.close()
    server.wait_until_idle(5)
