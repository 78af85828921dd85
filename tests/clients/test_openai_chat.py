"""The `openai` package against the chat endpoint: answers, streams, pictures, several answers, errors, asyncio."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.talk import MODEL, SPLITTING_TOKENS, picture, picture_url, user
from tests.serving import Server

pytestmark = pytest.mark.clients

# An answer of 20 tokens that ends by itself: the stream helper makes an exception of one that was cut off.
TWENTY = {"max_completion_tokens": 30, "logit_bias": {"2": 100}, "extra_body": {"min_tokens": 19}}
EMOJI_BYTES = {"243": 100, "162": 100, "155": 100, "136": 100}  # <0xF0> and three more that never make a whole emoji


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="EMPTY", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, *messages: dict[str, Any], **options: Any) -> Any:
    options = {"temperature": 0, "max_completion_tokens": 12, **options}
    return client.chat.completions.create(model=MODEL, messages=list(messages), **options)


def test_models_are_listed_and_found_by_every_name(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert MODEL in names
    assert client.models.retrieve(f"org/{MODEL}").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("another")
    assert caught.value.code == "model_not_found"


def test_an_answer_has_all_its_parts(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        max_completion_tokens=6,
        extra_body={"ignore_eos": True},
    )
    answer = raw.parse()
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert (answer.choices[0].index, answer.choices[0].finish_reason) == (0, "length")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6
    assert answer._request_id == raw.headers["x-request-id"]
    assert float(raw.headers["openai-processing-ms"]) >= 0


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    first = ask(client, user("Hello"))
    second = ask(client, user("Hello"), first.choices[0].message.model_dump(), user("And now?"))
    assert second.usage.prompt_tokens > first.usage.total_tokens


@pytest.mark.parametrize("options", [{}, {"stop": ["\n", "zzz"]}, {"temperature": 1, "seed": 5, "top_p": 0.9}])
def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, options: dict[str, Any]) -> None:
    message = user("Look: ", picture(picture_url(seed=1)), " and tell.")
    plain = ask(client, message, max_completion_tokens=40, **options)
    stream = ask(
        client, message, max_completion_tokens=40, stream=True, stream_options={"include_usage": True}, **options
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == plain.choices[0].message.content
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.model_dump(exclude={"prompt_tokens_details"}) == plain.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )
    assert chunks[-2].choices[0].finish_reason == plain.choices[0].finish_reason


@pytest.mark.parametrize("n", [1, 3])
def test_the_stream_helper_accumulates_every_choice(client: openai.OpenAI, n: int) -> None:
    """Its bookkeeping breaks on a role that comes twice, and on choices that begin out of order."""
    with client.chat.completions.stream(
        model=MODEL,
        messages=[user("Tell me")],
        n=n,
        seed=3,
        logprobs=True,
        top_logprobs=2,
        stream_options={"include_usage": True},
        **TWENTY,
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    kinds = [event.type for event in events]
    assert kinds.count("content.done") == n
    assert "logprobs.content.delta" in kinds
    assert [choice.index for choice in final.choices] == list(range(n))
    for choice in final.choices:
        assert choice.message.role == "assistant"
        assert choice.finish_reason == "stop"
        assert choice.logprobs is not None
        assert len(choice.logprobs.content or []) == 20
    assert len({choice.message.content for choice in final.choices}) == n
    assert final.usage is not None
    assert final.usage.completion_tokens == 20 * n
    same = ask(client, user("Tell me"), n=n, seed=3, temperature=1, **TWENTY)
    assert [c.message.content for c in same.choices] == [c.message.content for c in final.choices]
    assert same.usage.prompt_tokens == final.usage.prompt_tokens


def test_logprobs_spell_the_answer_byte_for_byte(client: openai.OpenAI) -> None:
    options = {"logprobs": True, "top_logprobs": 4, "extra_body": {"ignore_eos": True}, "max_completion_tokens": 24}
    answer = ask(client, user("Tell me"), temperature=1, seed=1, **options)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens == 24
    spelled = b"".join(bytes(token.bytes) for token in tokens)
    assert spelled.decode(errors="replace") == answer.choices[0].message.content
    for token in tokens:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert math.isfinite(token.logprob)
        assert token.logprob <= 0
    greedy = ask(client, user("Tell me"), **options).choices[0].logprobs.content
    assert all(token.logprob == token.top_logprobs[0].logprob for token in greedy)


def test_a_picture_costs_what_its_detail_says(client: openai.OpenAI) -> None:
    usage = {
        (detail, image_format): ask(
            client, user(picture(picture_url(200, 150, image_format=image_format), detail), "What is this?")
        ).usage
        for detail in ("low", "high", None)
        for image_format in ("PNG", "JPEG", "WEBP")
    }
    for image_format in ("PNG", "JPEG", "WEBP"):
        low, high, automatic = (usage[detail, image_format] for detail in ("low", "high", None))
        assert high.prompt_tokens - low.prompt_tokens == SPLITTING_TOKENS
        assert low.prompt_tokens_details.image_tokens == 64
        assert high.prompt_tokens_details.image_tokens == 320
        assert automatic.prompt_tokens == high.prompt_tokens


def test_a_conversation_with_pictures_is_found_in_the_cache(client: openai.OpenAI) -> None:
    first = user(picture(picture_url(seed=20), "high"), "and", picture(picture_url(seed=21), "high"), "Which?")
    answer = ask(client, first)
    again = ask(client, first, {"role": "assistant", "content": answer.choices[0].message.content}, user("Why?"))
    assert again.usage.prompt_tokens_details.cached_tokens > 2 * 320


ERRORS = [
    ({"model": "another"}, openai.NotFoundError, "model", "model_not_found"),
    ({"temperature": 3}, openai.BadRequestError, "temperature", None),
    ({"messages": []}, openai.BadRequestError, "messages", "empty_array"),
    ({"messages": [user("word " * 3000)]}, openai.BadRequestError, "messages", "context_length_exceeded"),
    ({"n": 1000}, openai.BadRequestError, "n", "integer_above_max_value"),
    (
        {"messages": [user(picture("data:image/png;base64,AAAA"))]},
        openai.BadRequestError,
        "messages[0].content[0].image_url.url",
        "invalid_image_format",
    ),
]


@pytest.mark.parametrize(("options", "kind", "param", "code"), ERRORS, ids=[str(error[2:]) for error in ERRORS])
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_is_the_right_exception(
    client: openai.OpenAI,
    options: dict[str, Any],
    kind: type[openai.APIStatusError],
    param: str,
    code: str | None,
    stream: bool,
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(
            **{"model": MODEL, "messages": [user("x")], "stream": stream, **options},
        )
    assert caught.value.param == param
    assert code is None or caught.value.code == code
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_asyncio_many_at_once_each_as_if_alone(server: Server, client: openai.OpenAI) -> None:
    prompts = [f"Question {index}?" for index in range(12)]
    alone = [ask(client, user(prompt)).choices[0].message.content for prompt in prompts]

    async def stream(made: openai.AsyncOpenAI, prompt: str) -> str:
        chunks = await made.chat.completions.create(
            model=MODEL, messages=[user(prompt)], temperature=0, max_completion_tokens=12, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="EMPTY") as made:
            return await asyncio.gather(*(stream(made, prompt) for prompt in prompts))

    assert asyncio.run(together()) == alone


def test_a_stream_that_is_left_ends_in_the_server_too(server: Server, client: openai.OpenAI) -> None:
    before = server.metric("requests_total", 'finish_reason="abort"')
    with ask(
        client, user("Go on"), n=2, max_completion_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    server.wait_until_idle(5)
    assert server.metric("requests_total", 'finish_reason="abort"') > before


def test_characters_that_never_end_do_not_break_a_stream(client: openai.OpenAI) -> None:
    """Halves of characters, token after token, most of which never become one."""
    options = {"logit_bias": EMOJI_BYTES, "temperature": 1, "seed": 2, "max_completion_tokens": 48}
    plain = ask(client, user("x"), **options).choices[0].message.content
    streamed = [chunk.choices[0].delta.content or "" for chunk in ask(client, user("x"), stream=True, **options)]
    assert "".join(streamed) == plain
