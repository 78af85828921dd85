"""The events of a streamed response: names, order, numbers, how a broken one ends, and what clients make of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from server.api.responses.answer import Answer, ResponseObject
from server.api.responses.protocol import parse_responses_request
from server.api.responses.streaming import ResponseEncoder
from server.errors import EngineDeadError, RequestFailedError
from server.types import FinishReason, Logprob, RequestOutput
from tests.api.responses.client import RECEIPT, RECEIPT_SCRIPT, SDK_EVENT, Receipt, ask, parse, post, stream
from tests.api.scripted_llm import Hang, ScriptedLLM, say, written
from tests.api.wire import send

ORDER = [
    *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
    *("response.output_text.delta", "response.output_text.delta"),
    *("response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"),
]


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return {"keep_alive_seconds": 0.1}


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


def played(script: Sequence[RequestOutput | Exception]) -> list[str]:
    answer = Answer(request=parse_responses_request({"input": "Hi"}), model="m")
    return [events.decode() for events in written(script, ResponseEncoder(answer, None))]


def test_order_and_content(url: str) -> None:
    events = stream(url, instructions="Be brief.")
    assert names(events) == ORDER
    created, in_progress, item_added, part_added, two, cats, text_done, part_done, item_done, completed = events
    assert created["response"] == in_progress["response"]
    whole = completed["response"]
    now = {"status", "output", "usage", "completed_at"}
    assert {k: v for k, v in created["response"].items() if k not in now} == {
        k: v for k, v in whole.items() if k not in now
    }
    assert {k: created["response"][k] for k in now} == {
        "status": "in_progress",
        "output": [],
        "usage": None,
        "completed_at": None,
    }
    message_id = item_added["item"]["id"]
    place = {"item_id": message_id, "output_index": 0, "content_index": 0}
    empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    message = {"id": message_id, "type": "message", "role": "assistant"}
    assert item_added["item"] == {**message, "status": "in_progress", "content": []}
    assert part_added["part"] == empty
    assert (two["delta"], cats["delta"], text_done["text"]) == ("Two", " cats.", "Two cats.")
    assert two["logprobs"] == text_done["logprobs"] == []
    for event in (part_added, two, cats, text_done, part_done):
        assert {key: event[key] for key in place} == place
    part = {**empty, "text": "Two cats."}
    assert part_done["part"] == part
    assert item_done["item"] == {**message, "status": "completed", "content": [part]}
    assert (item_added["output_index"], item_done["output_index"]) == (0, 0)
    assert whole["output"] == [item_done["item"]]
    assert (whole["status"], whole["usage"]["total_tokens"]) == ("completed", 88)


def test_a_stream_ends_with_what_is_sent_whole(url: str) -> None:
    """But for what differs between any two responses."""
    streamed = stream(url)[-1]["response"]
    whole = ask(url)
    for response in (streamed, whole):
        assert response.pop("id").startswith("resp_")
        assert response["output"][0].pop("id").startswith("msg_")
        assert response.pop("completed_at") >= response.pop("created_at")
    assert streamed == whole


def test_every_event_fits_the_sdks_types_and_ours(llm: ScriptedLLM, url: str) -> None:
    half = Logprob(token_id=5, token="x", data=b"x", logprob=-0.5)
    llm.script = (say("x", logprobs=(half,)), say("", FinishReason.LENGTH, logprobs=(half,)))
    for event in stream(url, include=["message.output_text.logprobs"]):
        known = SDK_EVENT.validate_python(event)
        assert known.type == event["type"]
        if "response" in event:
            assert ResponseObject.model_validate(event["response"]).model_dump(mode="json") == event["response"]
            Response.model_validate(event["response"])


def test_cut_off_by_the_limit(llm: ScriptedLLM, url: str) -> None:
    llm.script = (say("Two"), say(" cats", FinishReason.LENGTH))
    events = stream(url)
    assert names(events) == [*ORDER[:-1], "response.incomplete"]
    response = events[-1]["response"]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert events[-2]["item"]["status"] == response["output"][0]["status"] == "incomplete"
    assert events[-2]["item"]["content"][0]["text"] == "Two cats"


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_no_text_means_no_delta(llm: ScriptedLLM, url: str, num_outputs: int) -> None:
    llm.script = [*[say("")] * (num_outputs - 1), say("", FinishReason.STOP)]
    events = stream(url)
    assert names(events) == [name for name in ORDER if name != "response.output_text.delta"]
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_all_in_one_output(llm: ScriptedLLM, url: str) -> None:
    llm.script = (say("Two cats.", FinishReason.STOP),)
    events = stream(url)
    assert names(events) == [*ORDER[:5], *ORDER[6:]]
    assert events[4]["delta"] == "Two cats."


def test_one_write_for_one_output() -> None:
    writes = played([say("a"), say("b"), say(""), say("c", FinishReason.STOP)])
    assert len(writes) == 3
    assert names(parse("".join(writes)))[0] == "response.created"


def test_logprobs_ride_with_their_text(llm: ScriptedLLM, url: str) -> None:
    """Those of a token that adds no text yet, or none at all, are not lost."""
    tokens = [Logprob(token_id=i, token=str(i), data=b"%d" % i, logprob=-float(i)) for i in range(5)]
    llm.script = (
        say("01", logprobs=tokens[:2]),
        say("", logprobs=tokens[2:3]),
        say("23", logprobs=tokens[3:4]),
        say("", FinishReason.STOP, logprobs=tokens[4:]),
    )
    events = stream(url, include=["message.output_text.logprobs"])
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [[entry["token"] for entry in delta["logprobs"]] for delta in deltas] == [["0", "1"], ["2", "3"]]
    assert deltas[0]["logprobs"][1] == {"token": "1", "logprob": -1.0, "bytes": [49], "top_logprobs": []}
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert [entry["token"] for entry in done["logprobs"]] == ["0", "1", "2", "3", "4"]
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == done["logprobs"]


@pytest.mark.parametrize("text", ['a\u2028b\u2029c\u0085d\r\n"e\\', "👨‍👩‍👧 日本", "\x00\x1f"])
def test_text_that_breaks_lines_breaks_no_event(llm: ScriptedLLM, url: str, text: str) -> None:
    llm.script = (say(text), say("", FinishReason.STOP))
    answer = post(url, stream=True, instructions=text)
    assert len(answer.text.splitlines()) == answer.text.count("\n")
    events = parse(answer.text)
    assert events[4]["delta"] == events[-1]["response"]["output"][0]["content"][0]["text"] == text
    assert events[0]["response"]["instructions"] == text


def test_headers(url: str) -> None:
    answer = post(url, stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"].startswith("req_")
    assert "[DONE]" not in answer.text


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_failure_is_told_twice() -> None:
    """OpenAI's own client looks for `error` in an event, other readers for the event that ends the response."""
    error = EngineDeadError("the engine stopped", retry_after=5.0)
    events = parse("".join(played([say("Two"), error])))
    assert names(events) == [*ORDER[:5], "error", "response.failed"]
    told = {"code": "engine_unavailable", "message": "the engine stopped", "param": None}
    assert events[5] == {
        "type": "error",
        "sequence_number": 5,
        **told,
        "error": {**told, "type": "server_error"},
    }
    response = events[6]["response"]
    assert (response["status"], response["output"], response["usage"]) == ("failed", [], None)
    assert response["error"] == {"code": "server_error", "message": "the engine stopped"}
    for event in events:
        SDK_EVENT.validate_python(event)
    assert ResponseObject.model_validate(response).model_dump(mode="json") == response


def test_a_failure_arrives(llm: ScriptedLLM, url: str) -> None:
    llm.script = (say("Two"), RequestFailedError("a step failed"))
    assert names(stream(url)) == [*ORDER[:5], "error", "response.failed"]
    assert llm.closed.wait(5)


def test_an_unexpected_error_tells_the_client_nothing(caplog: pytest.LogCaptureFixture) -> None:
    events = "".join(played([say("Two"), ValueError("/etc/secret at 0x7f00")]))
    assert "secret" not in events
    assert names(parse(events))[-2:] == ["error", "response.failed"]
    assert "/etc/secret" in caplog.text  # but the operator all


@pytest.mark.parametrize(
    "script", [[say("Two")], [say("Two", FinishReason.ABORT)], [say("x"), say("", FinishReason.ERROR)]]
)
def test_reasons_that_no_client_may_see(script: list[RequestOutput]) -> None:
    events = parse("".join(played(script)))
    assert names(events)[-2:] == ["error", "response.failed"]
    assert not {"response.completed", "response.incomplete", "response.output_item.done"} & set(names(events))


@pytest.mark.parametrize("helper", [False, True])
def test_the_sdk_raises(llm: ScriptedLLM, client: openai.OpenAI, *, helper: bool) -> None:
    llm.script = (say("Two"), RequestFailedError("a step failed"))
    seen: list[str] = []

    def read() -> None:
        if helper:
            with client.responses.stream(model="idefics2-8b", input="Hi") as events:
                seen.extend(event.type for event in events)
        else:
            seen.extend(e.type for e in client.responses.create(model="idefics2-8b", input="Hi", stream=True))

    with pytest.raises(openai.APIError, match="a step failed") as caught:
        read()
    assert not isinstance(caught.value, openai.APIStatusError)
    assert (caught.value.code, caught.value.type) == ("internal_error", "server_error")
    assert seen == ORDER[:5]
    assert llm.closed.wait(5)


# -- what clients make of it -----------------------------------------------------------------------------------------


def test_sdk_create(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="idefics2-8b", input="Hi", stream=True))
    assert [event.type for event in events] == ORDER
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "Two cats."


def test_sdk_stream(llm: ScriptedLLM, client: openai.OpenAI) -> None:
    llm.script = RECEIPT_SCRIPT
    with client.responses.stream(model="idefics2-8b", input="Invent.", text_format=Receipt) as events:
        snapshots = [event.snapshot for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert snapshots == ['{"shop": "A', '{"shop": "ABC", "total": 2.5}']
    assert final.output_parsed == RECEIPT
    assert final.usage is not None
    assert final.usage.output_tokens == 3
    assert llm.chats[0].sampling.grammar is not None


def test_sdk_async(url: str) -> None:
    async def collect() -> str:
        async with (
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0) as client,
            client.responses.stream(model="idefics2-8b", input="Hi") as events,
        ):
            return (await events.get_final_response()).output_text

    assert asyncio.run(collect()) == "Two cats."


def test_silence_is_filled_with_comments(llm: ScriptedLLM, url: str, client: openai.OpenAI) -> None:
    llm.script = (say("Two"), 0.35, say(" cats.", FinishReason.STOP))
    text = post(url, stream=True).text
    assert 2 <= text.count(": keep-alive\n\n") <= 4
    assert names(parse(text.replace(": keep-alive\n\n", ""))) == ORDER
    assert [event.type for event in client.responses.create(model="idefics2-8b", input="Hi", stream=True)] == ORDER


@pytest.mark.parametrize(
    ("streamed", "before"), [(True, (say("Two"),)), (True, ()), (False, (say("Two"),)), (False, ())]
)
def test_a_client_that_leaves_ends_its_answer(
    llm: ScriptedLLM, url: str, *, streamed: bool, before: Sequence[RequestOutput]
) -> None:
    llm.script = (*before, Hang())
    with send(f"{url}/v1/responses", {"input": "Hi", "stream": streamed}):
        assert llm.hanging.wait(5)
        assert not llm.closed.is_set()
    assert llm.closed.wait(1)
