"""What an answer may have besides one text: several choices, log-probabilities, token ids, tool calls.

Streamed and not, through OpenAI's own client and plain HTTP, on a real socket.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from server.errors import ClientError, RequestFailedError
from server.types import ChatInput, EngineRequest, FinishReason, Logprob, PromptInput, RequestOutput, TextPart
from tests.api.chat.client import HELLO, ask, chunks, post
from tests.api.scripted_llm import PROMPT_TOKENS, UNCOMPILABLE, Hang, ScriptedLLM, say

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.fixture(scope="module")
def settings(injects: bool) -> dict[str, Any]:
    return {"inject_tools": injects}


def refused(url: str, **fields: Any) -> tuple[str | None, str | None]:
    """Also with `stream`: nothing is sent before the request is known to be good."""
    found = []
    for stream in (False, True):
        answer = post(url, stream=stream, **fields)
        assert answer.status_code == 400
        found.append((answer.json()["error"]["param"], answer.json()["error"]["code"]))
    assert found[0] == found[1]
    return found[0]


def choices(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [choice for event in events for choice in event["choices"]]


# -- several choices -------------------------------------------------------------------------------------------------

INTERLEAVED = (
    say("b", index=1),
    say("a"),
    say("c", STOP, index=2),
    say("B", index=1),
    say("A", LENGTH),
    say("", STOP, index=1, stop_reason="\n"),
)


def test_choices(url: str, llm: ScriptedLLM) -> None:
    llm.script = INTERLEAVED
    body = ask(url, n=3)
    assert [(c["index"], c["message"]["content"], c["finish_reason"], c["stop_reason"]) for c in body["choices"]] == [
        (0, "aA", "length", None),
        (1, "bB", "stop", "\n"),
        (2, "c", "stop", None),
    ]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (PROMPT_TOKENS, 6)
    assert llm.chats[0].n == 3


@pytest.mark.parametrize("fields", [{}, {"return_token_ids": True}])
def test_choices_streamed(url: str, llm: ScriptedLLM, fields: dict[str, Any]) -> None:
    llm.script = INTERLEAVED
    events = chunks(url, n=3, stream_options={"include_usage": True}, **fields)
    assert [len(event["choices"]) for event in events] == [1] * 9 + [0]
    told = [(c["index"], c["delta"], c["finish_reason"], c.get("stop_reason")) for c in choices(events)]
    role = {"role": "assistant", "content": ""}
    assert told == [
        *((index, role, None, None) for index in range(3)),
        (1, {"content": "b"}, None, None),
        (0, {"content": "a"}, None, None),
        (2, {"content": "c"}, "stop", None),
        (1, {"content": "B"}, None, None),
        (0, {"content": "A"}, "length", None),
        (1, {}, "stop", "\n"),
    ]
    assert [event["usage"] and event["usage"]["completion_tokens"] for event in events] == [None] * 9 + [6]


@pytest.mark.parametrize("fields", [{}, {"logprobs": True}])
def test_continuous_usage_of_choices(url: str, llm: ScriptedLLM, fields: dict[str, Any]) -> None:
    llm.script = INTERLEAVED
    events = chunks(url, n=3, stream_options={"include_usage": True, "continuous_usage_stats": True}, **fields)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == [0, 0, 0, 1, 2, 3, 4, 5, 6, 6]
    assert [choice["index"] for choice in choices(events)] == [0, 1, 2, 1, 0, 2, 1, 0, 1]
    assert {event["usage"]["prompt_tokens"] for event in events} == {PROMPT_TOKENS}


def test_the_sdk_accumulates_choices(client: openai.OpenAI, llm: ScriptedLLM) -> None:
    llm.script = [*INTERLEAVED[:4], say("A", STOP), say("", STOP, index=1)]
    with client.chat.completions.stream(model="idefics2-8b", messages=HELLO, n=3) as events:
        completion = events.get_final_completion()
    assert [choice.message.content for choice in completion.choices] == ["aA", "bB", "c"]
    assert [choice.message.role for choice in completion.choices] == ["assistant"] * 3


@pytest.mark.parametrize("script", [INTERLEAVED[:-1], [*INTERLEAVED[:-1], say("", FinishReason.ABORT, index=1)]])
def test_one_choice_without_an_end_is_an_error(url: str, llm: ScriptedLLM, script: Any) -> None:
    llm.script = script
    answer = post(url, n=3)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    streamed = post(url, n=3, stream=True)
    assert '"code":"internal_error"' in streamed.text


def test_an_error_of_one_choice_ends_all(url: str, llm: ScriptedLLM) -> None:
    llm.script = [*INTERLEAVED[:3], RequestFailedError("the step failed")]
    answer = post(url, n=3, stream=True)
    assert answer.text.count('"error":') == 1
    assert answer.text.endswith("data: [DONE]\n\n")
    assert llm.closed.wait(5)


def test_the_end_is_not_waited_for_once_all_choices_have_one(url: str, llm: ScriptedLLM) -> None:
    llm.script = [*INTERLEAVED, Hang()]
    assert len(ask(url, n=3)["choices"]) == 3
    assert len(chunks(url, n=3)) == 9
    assert llm.closed.wait(5)


# -- log-probabilities -----------------------------------------------------------------------------------------------

TOPS = (Logprob(8, "x", b"x", -0.25), Logprob(9, "\ufffd", b"\xe2", -1.5))
SPOKEN = (
    say("Two", logprobs=[Logprob(7, "Two", b"Two", -0.5, TOPS)]),
    # A character of three tokens is one output with three entries.
    say(
        "\u2028",
        token_ids=[3, 4, 5],
        logprobs=[
            Logprob(3, "\ufffd", b"\xe2", -math.inf),
            *(Logprob(4, "\ufffd", b, -2.0) for b in (b"\x80", b"\xa8")),
        ],
    ),
    say("", STOP, token_ids=[2], logprobs=[Logprob(2, "</s>", b"", 0.0)]),
)
ENTRIES = [
    {"token": "Two", "logprob": -0.5, "bytes": [84, 119, 111], "top_logprobs": [
        {"token": "x", "logprob": -0.25, "bytes": [120]},
        {"token": "\ufffd", "logprob": -1.5, "bytes": [226]},
    ]},
    {"token": "\ufffd", "logprob": -9999.0, "bytes": [226], "top_logprobs": []},
    {"token": "\ufffd", "logprob": -2.0, "bytes": [128], "top_logprobs": []},
    {"token": "\ufffd", "logprob": -2.0, "bytes": [168], "top_logprobs": []},
    {"token": "</s>", "logprob": 0.0, "bytes": [], "top_logprobs": []},
]  # fmt: skip


def test_logprobs(url: str, llm: ScriptedLLM) -> None:
    llm.script = SPOKEN
    choice = ask(url, logprobs=True, top_logprobs=2)["choices"][0]
    assert choice["logprobs"] == {"content": ENTRIES, "refusal": None}
    assert choice["message"]["content"] == "Two\u2028"
    assert llm.chats[0].sampling.num_logprobs == 2


def test_logprobs_streamed(url: str, llm: ScriptedLLM) -> None:
    """On the chunk of their text, and those of the end on the chunk that ends."""
    llm.script = SPOKEN
    told = [(c["delta"].get("content"), c["logprobs"]) for c in choices(chunks(url, logprobs=True, top_logprobs=2))]
    assert told == [
        ("", None),
        ("Two", {"content": ENTRIES[:1], "refusal": None}),
        ("\u2028", {"content": ENTRIES[1:4], "refusal": None}),
        (None, {"content": ENTRIES[4:], "refusal": None}),
    ]


def test_logprobs_of_choices(url: str, llm: ScriptedLLM) -> None:
    one, two = (Logprob(i, text, text.encode(), -i) for i, text in enumerate("ab", start=1))
    llm.script = [say("b", index=1, logprobs=[two]), say("a", STOP, logprobs=[one]), say("", STOP, index=1)]
    found = [[e["token"] for e in c["logprobs"]["content"]] for c in ask(url, n=2, logprobs=True)["choices"]]
    assert found == [["a"], ["b"]]
    streamed = choices(chunks(url, n=2, logprobs=True))
    assert [(c["index"], c["logprobs"] and c["logprobs"]["content"][0]["token"]) for c in streamed] == [
        *((0, None), (1, None), (1, "b"), (0, "a"), (1, None)),
    ]


def test_an_event_with_logprobs_stays_in_one_line(url: str, llm: ScriptedLLM) -> None:
    llm.script = [say("\u2028", STOP, logprobs=[Logprob(7, "\u2028\x85", "\u2028".encode(), -1.0)])]
    text = post(url, stream=True, logprobs=True).text
    assert len([line for line in text.splitlines() if line]) == 3


def test_logprobs_in_the_sdk(client: openai.OpenAI, llm: ScriptedLLM) -> None:
    llm.script = SPOKEN
    plain = client.chat.completions.create(model="idefics2-8b", messages=HELLO, logprobs=True, top_logprobs=2)
    with client.chat.completions.stream(model="idefics2-8b", messages=HELLO, logprobs=True, top_logprobs=2) as events:
        streamed = events.get_final_completion()
    for completion in (plain, streamed):
        assert completion.choices[0].logprobs is not None
        assert completion.choices[0].logprobs.content is not None
        assert [entry.model_dump() for entry in completion.choices[0].logprobs.content] == ENTRIES


# -- token ids -------------------------------------------------------------------------------------------------------


def test_token_ids(url: str, llm: ScriptedLLM) -> None:
    llm.script = [say("a", token_ids=[5, 6]), say("b", STOP, index=1, token_ids=[8]), say("", STOP, token_ids=[2])]
    body = ask(url, n=2, return_token_ids=True)
    assert body["prompt_token_ids"] == [1] * PROMPT_TOKENS
    assert [choice["token_ids"] for choice in body["choices"]] == [[5, 6, 2], [8]]
    events = chunks(url, n=2, return_token_ids=True)
    assert [event.get("prompt_token_ids") for event in events] == [[1] * PROMPT_TOKENS, *[None] * 4]
    assert [(c["index"], c.get("token_ids")) for c in choices(events)] == [
        *((0, None), (1, None), (0, [5, 6]), (1, [8]), (0, [2])),
    ]


@pytest.mark.parametrize("fields", [{}, {"logprobs": True}, {"n": 1, "return_token_ids": False}])
def test_no_token_ids_unless_asked(url: str, fields: dict[str, Any]) -> None:
    assert "token_ids" not in json.dumps(ask(url, **fields))
    assert "token_ids" not in json.dumps(chunks(url, **fields))


def test_details_change_no_text(url: str) -> None:
    """With nothing to tell, a detailed stream has the deltas of a plain one."""
    plain, detailed = (choices(chunks(url, return_token_ids=asked)) for asked in (False, True))
    assert [choice["delta"] for choice in plain] == [choice["delta"] for choice in detailed]


# -- tool calls ------------------------------------------------------------------------------------------------------


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


TOOLS = [tool("f", x={"type": "integer"}), tool("g")]
NAMED_F = {"type": "function", "function": {"name": "f"}}
TWO_CALLS = [say('[{"name":"f","argu'), say('ments":{"x"'), say(":1}}"), say(',{"name":"g","arguments":{}}]', STOP)]


def calls_of(message: dict[str, Any]) -> list[tuple[str, str]]:
    for call in message["tool_calls"]:
        assert set(call) == {"id", "type", "function"}
        assert call["type"] == "function"
        assert re.fullmatch("call_[0-9a-f]{32}", call["id"])
    assert len({call["id"] for call in message["tool_calls"]}) == len(message["tool_calls"])
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]


def test_a_named_call(url: str, llm: ScriptedLLM) -> None:
    llm.script = [say('{"x":'), say("1"), say("}", STOP)]
    choice = ask(url, tools=TOOLS, tool_choice=NAMED_F)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] is None
    assert calls_of(choice["message"]) == [("f", '{"x":1}')]
    assert (grammar := llm.chats[0].sampling.grammar) is not None
    assert json.loads(grammar.source) == TOOLS[0]["function"]["parameters"]


def test_a_named_call_streamed(url: str, llm: ScriptedLLM) -> None:
    llm.script = [say('{"x":'), say("1"), say("}", STOP)]
    told = choices(chunks(url, tools=TOOLS, tool_choice=NAMED_F))
    assert told[0]["delta"] == {"role": "assistant", "content": None}
    first = told[1]["delta"]["tool_calls"][0]
    assert re.fullmatch("call_[0-9a-f]{32}", first.pop("id"))
    assert first == {"index": 0, "type": "function", "function": {"name": "f", "arguments": ""}}
    assert [choice["delta"] for choice in told[2:]] == [
        {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in ('{"x":', "1", "}")
    ]
    assert [choice["finish_reason"] for choice in told] == [None] * 4 + ["stop"]


def test_required_calls(url: str, llm: ScriptedLLM) -> None:
    llm.script = TWO_CALLS
    choice = ask(url, tools=TOOLS, tool_choice="required")["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert calls_of(choice["message"]) == [("f", '{"x":1}'), ("g", "{}")]


def test_required_calls_streamed(url: str, llm: ScriptedLLM) -> None:
    llm.script = TWO_CALLS
    told = choices(chunks(url, tools=TOOLS, tool_choice="required"))
    assert told[0]["delta"] == {"role": "assistant", "content": None}
    calls = [call for choice in told[1:] for call in choice["delta"]["tool_calls"]]
    assert [(call["index"], call["function"].get("name"), call["function"]["arguments"]) for call in calls] == [
        *(
            (0, "f", ""),
            (0, None, "{"),
            (0, None, '"x"'),
            (0, None, ":1}"),
            (1, "g", ""),
            (1, None, "{"),
            (1, None, "}"),
        ),
    ]
    assert [sorted(call) for call in calls if "id" not in call] == [["function", "index"]] * 5
    assert [choice["finish_reason"] for choice in told] == [None] * 7 + ["tool_calls"]
    assert all("tool_calls" not in choice["delta"] or choice["delta"]["tool_calls"] for choice in told)


def test_calls_of_several_choices(url: str, llm: ScriptedLLM) -> None:
    llm.script = [
        say('[{"name":"g","arguments":{'),
        say('[{"name":"f","arguments":{}}]', STOP, index=1),
        say("}}]", STOP),
    ]
    found = ask(url, n=2, tools=TOOLS, tool_choice="required")["choices"]
    assert [calls_of(choice["message"]) for choice in found] == [[("g", "{}")], [("f", "{}")]]
    streamed = chunks(url, n=2, tools=TOOLS, tool_choice="required")
    assert [c["index"] for c in choices(streamed) if c["finish_reason"]] == [1, 0]


def test_calls_in_the_sdk(client: openai.OpenAI, llm: ScriptedLLM) -> None:
    llm.script = TWO_CALLS
    tools: Any = TOOLS
    with client.chat.completions.stream(
        model="idefics2-8b", messages=HELLO, tools=tools, tool_choice="required"
    ) as events:
        message = events.get_final_completion().choices[0].message
    assert message.content is None
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls or ()] == [
        *(("f", '{"x":1}'), ("g", "{}")),
    ]
    history: list[Any] = [*HELLO, message.model_dump(), {"role": "tool", "tool_call_id": "x", "content": "5"}]
    client.chat.completions.create(model="idefics2-8b", messages=history)
    assert llm.chats[-1].turns[1].parts[-1] == TextPart(
        '[{"name":"f","arguments":{"x":1}},{"name":"g","arguments":{}}]'
    )
    assert llm.chats[-1].turns[2].role == "tool"


def test_a_call_that_was_cut_off(url: str, llm: ScriptedLLM) -> None:
    llm.script = [say('[{"name":"f","arguments":{"x"', LENGTH)]
    choice = ask(url, tools=TOOLS, tool_choice="required")["choices"][0]
    assert (choice["finish_reason"], calls_of(choice["message"])) == ("length", [("f", '{"x"')])
    llm.script = [say('[{"name":', LENGTH)]
    choice = ask(url, tools=TOOLS, tool_choice="required")["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": '[{"name":', "refusal": None}


def test_details_of_held_text_come_with_the_call(url: str, llm: ScriptedLLM) -> None:
    entries = [Logprob(i, "t", b"t", -float(i)) for i in range(4)]
    llm.script = [
        *(
            say(output.text, output.finish_reason, token_ids=[i], logprobs=[entries[i]])
            for i, output in enumerate(TWO_CALLS)
        )
    ]
    told = choices(chunks(url, tools=TOOLS, tool_choice="required", logprobs=True, return_token_ids=True))
    found = [(c.get("token_ids"), c["logprobs"] and [e["logprob"] for e in c["logprobs"]["content"]]) for c in told]
    # Each output's last chunk has what came since; the first output made none.
    nothing = (None, None)
    held, second, last = ([0, 1], [0.0, -1.0]), ([2], [-2.0]), ([3], [-3.0])
    assert found == [nothing, nothing, nothing, held, second, nothing, nothing, last]
    whole = ask(url, tools=TOOLS, tool_choice="required", logprobs=True, return_token_ids=True)["choices"][0]
    assert whole["token_ids"] == [0, 1, 2, 3]
    assert [entry["logprob"] for entry in whole["logprobs"]["content"]] == [0.0, -1.0, -2.0, -3.0]


@pytest.mark.parametrize("choice", [None, "auto"])
def test_a_call_that_need_not_be_made(url: str, llm: ScriptedLLM, *, injects: bool, choice: str | None) -> None:
    """A model that was not told of tools has made none, whatever its text looks like."""
    llm.script = TWO_CALLS
    text = "".join(output.text for output in TWO_CALLS if isinstance(output, RequestOutput))
    found = ask(url, tools=TOOLS, tool_choice=choice)["choices"][0]
    assert found["finish_reason"] == ("tool_calls" if injects else "stop")
    assert found["message"]["content"] == (None if injects else text)
    assert ("tool_calls" in found["message"]) == injects
    assert len(llm.chats[0].turns) == 1 + injects
    told = choices(chunks(url, tools=TOOLS, tool_choice=choice))
    assert told[0]["delta"] == {"role": "assistant", "content": ""}
    assert told[-1]["finish_reason"] == ("tool_calls" if injects else "stop")
    assert "".join(c["delta"].get("content", "") for c in told) == ("" if injects else text)


def test_words_in_place_of_a_call(url: str, llm: ScriptedLLM) -> None:
    llm.script = [say("["), say("Two"), say(" cats.", STOP)]
    assert ask(url, tools=TOOLS)["choices"][0]["message"]["content"] == "[Two cats."
    told = choices(chunks(url, tools=TOOLS))
    assert "".join(choice["delta"].get("content", "") for choice in told) == "[Two cats."
    assert told[-1]["finish_reason"] == "stop"


def test_words_after_a_call(url: str, llm: ScriptedLLM, *, injects: bool) -> None:
    llm.script = [*TWO_CALLS[:-1], say(TWO_CALLS[-1].text), say("\nDone.", STOP)]
    message = ask(url, tools=TOOLS)["choices"][0]["message"]
    assert ("tool_calls" in message) == injects
    assert message["content"].endswith("Done.")
    assert (message["content"] == "Done.") == injects
    told = choices(chunks(url, tools=TOOLS))
    assert "".join(choice["delta"].get("content", "") for choice in told) == message["content"]


def test_an_answer_that_ends_before_it_is_a_call(url: str, llm: ScriptedLLM) -> None:
    llm.script = [say("["), say('{"na', STOP)]
    assert ask(url, tools=TOOLS)["choices"][0]["message"]["content"] == '[{"na'
    told = choices(chunks(url, tools=TOOLS))
    assert "".join(choice["delta"].get("content", "") for choice in told) == '[{"na'
    assert told[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"response_format": {"type": "json_object"}}])
def test_no_calls_where_there_can_be_none(url: str, llm: ScriptedLLM, fields: dict[str, Any]) -> None:
    llm.script = TWO_CALLS
    choice = ask(url, tools=TOOLS, **fields)["choices"][0]
    assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("stop", False)
    assert len(llm.chats[0].turns) == 1


def test_only_one_call(url: str, llm: ScriptedLLM, *, injects: bool) -> None:
    llm.script = TWO_CALLS
    choice = ask(url, tools=TOOLS, parallel_tool_calls=False)["choices"][0]
    assert len(choice["message"].get("tool_calls", [])) == injects


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([tool("f", x={UNCOMPILABLE: 1})], "required", "tools[0].function.parameters"),
        ([tool("f"), tool("g", x={UNCOMPILABLE: 1})], "required", "tools[1].function.parameters"),
        ([tool("g", x={UNCOMPILABLE: 1}), tool("f", x={UNCOMPILABLE: 1})], NAMED_F, "tools[1].function.parameters"),
    ],
)
def test_parameters_that_do_not_compile(url: str, tools: Any, choice: Any, param: str) -> None:
    assert refused(url, tools=tools, tool_choice=choice) == (param, "invalid_value")


def test_an_error_that_is_no_functions_fault(url: str, llm: ScriptedLLM) -> None:
    llm.prepare_script = [ClientError("x", param="messages", code="context_length_exceeded")]
    assert refused(url, tools=TOOLS, tool_choice="required") == ("messages", "context_length_exceeded")
    assert llm.prompts == []


def test_functions_that_compile_only_apart(url: str, llm: ScriptedLLM) -> None:
    """Then it is all of them together."""
    llm.prepare_script = ()

    async def prepare(item: ChatInput | PromptInput) -> EngineRequest:
        if isinstance(item, ChatInput):
            raise ClientError("too large", param=item.sampling.grammar.param)  # type: ignore[union-attr]
        return await ScriptedLLM.prepare(llm, item)

    llm.prepare = prepare  # type: ignore[method-assign]
    assert refused(url, tools=TOOLS, tool_choice="required") == ("tools", "invalid_value")
    assert len(llm.prompts) == 4
