"""What POST /v1/completions takes, what it makes of it, and what it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from server.api.completions.protocol import MAX_ANSWERS, MAX_PROMPTS
from server.errors import ClientError, EngineDeadError, RequestFailedError
from server.types import FinishReason, GrammarSpec, RequestOutput, Truncation
from tests.api.completions.client import Asker, only_item, prompts
from tests.api.prompt_llm import BOS, FAKE, IMAGE, PIECES, PromptLLM, encode
from tests.api.scripted_llm import QUEUE_FULL, say


@pytest.mark.parametrize(
    ("fields", "cap"),
    [
        ({}, 16),
        ({"max_tokens": None}, 16),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
    ],
)
def test_max_tokens(ask: Asker, llm: PromptLLM, fields: dict[str, Any], cap: int) -> None:
    ask(**fields)
    assert only_item(llm).sampling.max_tokens == cap


def test_fields_reach_the_engine(ask: Asker, llm: PromptLLM) -> None:
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "seed": 7,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "min_tokens": 2,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    ask(
        **given,
        n=2,
        best_of=2,
        priority=-1,
        cache_salt="mine",
        truncate_prompt_tokens=5,
        truncation_side="right",
        logit_bias={"5": 1},
        stop="x",
        logprobs=3,
        model="HuggingFaceM4/idefics2-8b",
        user={"any": "thing"},
        structured_outputs={"regex": "[a-z]+"},
    )
    sent = only_item(llm)
    assert {name: getattr(sent.sampling, name) for name in given} == given
    assert (sent.sampling.logit_bias, sent.sampling.stop) == ({5: 1.0}, ("x",))
    assert (sent.sampling.num_logprobs, sent.sampling.num_prompt_logprobs) == (3, None)
    assert sent.sampling.grammar == GrammarSpec("regex", "[a-z]+", "structured_outputs.regex")
    assert (sent.n, sent.priority, sent.cache_salt) == (2, -1, "mine")
    assert (sent.truncation, sent.add_special_tokens) == (Truncation(5, "right"), True)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"guided_choice": ["a", "b"]}, "choice"),
        ({"response_format": {"type": "json_object"}}, "json_schema"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "grammar"),
    ],
)
def test_answers_can_be_constrained_as_in_chat(ask: Asker, llm: PromptLLM, fields: dict[str, Any], kind: str) -> None:
    ask(**fields)
    grammar = only_item(llm).sampling.grammar
    assert grammar is not None
    assert grammar.kind == kind


def test_the_model_goes_by_the_name_it_was_asked_by(ask: Asker) -> None:
    assert ask(model="HuggingFaceM4/idefics2-8b")["model"] == "HuggingFaceM4/idefics2-8b"
    assert ask(model="")["model"] == "idefics2-8b"
    assert ask.error(model="gpt-4") == (404, "model_not_found", "model")


def test_a_wished_for_id(ask: Asker) -> None:
    assert ask(request_id="abc-1")["id"] == "cmpl-abc-1"


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("Two cats", ["Two cats"]),
        (["Two cats"], ["Two cats"]),
        (["Two cats", "a dog"], ["Two cats", "a dog"]),
        ([5, 6, 7], [(5, 6, 7)]),
        ([[5, 6, 7]], [(5, 6, 7)]),
        ([[5], [6, 7]], [(5,), (6, 7)]),
        (["Two", [6, 7]], ["Two", (6, 7)]),
        ("<image></s>", ["<image></s>"]),
    ],
)
def test_forms_of_prompts(ask: Asker, llm: PromptLLM, given: Any, seen: list[Any]) -> None:
    ask(given)
    assert prompts(llm) == seen


def test_bos(ask: Asker, llm: PromptLLM) -> None:
    for fields in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
        ask(**fields)
    ask(encode("Two cats"))
    counts = [request.prompt_token_ids.count(BOS) for request in llm.requests]
    assert counts == [1, 1, 0, 0]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "code", "param"),
    [
        (None, "missing_required_parameter", "prompt"),
        ("", "invalid_value", "prompt"),
        ([], "empty_array", "prompt"),
        ([[]], "empty_array", "prompt[0]"),
        (["a", ""], "invalid_value", "prompt[1]"),
        ([[1], []], "empty_array", "prompt[1]"),
        (5, "invalid_type", "prompt"),
        (True, "invalid_type", "prompt"),
        ({"a": 1}, "invalid_type", "prompt"),
        ([True], "invalid_type", "prompt[0]"),
        ([1, 2.0], "invalid_type", "prompt[1]"),
        ([1, "a"], "invalid_type", "prompt[1]"),
        ([[1, None]], "invalid_type", "prompt[0][1]"),
        (["a", 5], "invalid_type", "prompt[1]"),
        ([[1], {}], "invalid_type", "prompt[1]"),
        ([-1], "invalid_value", "prompt[0]"),
        ([5, len(PIECES)], "invalid_value", "prompt[1]"),
        ([[5], [5, 10**40]], "invalid_value", "prompt[1][1]"),
        ([5, IMAGE], "invalid_value", "prompt[1]"),
        ([[5], [FAKE]], "invalid_value", "prompt[1][0]"),
        (["a"] * (MAX_PROMPTS + 1), "array_above_max_length", "prompt"),
        ([5] * 64, "context_length_exceeded", "prompt"),
        (["a", [5] * 64], "context_length_exceeded", "prompt[1]"),
    ],
)
def test_bad_prompts(ask: Asker, prompt: Any, code: str, param: str) -> None:
    assert ask.error(prompt) == (400, code, param)


def test_a_token_id_is_named(ask: Asker) -> None:
    message = ask.post([5, len(PIECES)]).json()["error"]["message"]
    assert message == f"'prompt[1]' must be a token id below {len(PIECES)}, not {len(PIECES)}"
    # Numbers in JSON have no limit, messages have.
    assert ask.post([10**400]).json()["error"]["message"] == "'prompt[0]' is not a token id"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"prompt_embeds": "x"}, "unsupported_parameter", "prompt_embeds"),
        ({"best_of": 2}, "unsupported_value", "best_of"),
        ({"best_of": 1, "n": 2}, "unsupported_value", "best_of"),
        ({"use_beam_search": True}, "unsupported_parameter", "use_beam_search"),
        ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "integer_below_min_value", "max_tokens"),
        ({"max_tokens": "5"}, "invalid_type", "max_tokens"),
        ({"max_tokens": True}, "invalid_type", "max_tokens"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "invalid_value", "min_tokens"),
        ({"logprobs": 21}, "integer_above_max_value", "logprobs"),
        ({"logprobs": -1}, "integer_below_min_value", "logprobs"),
        ({"logprobs": True}, "invalid_type", "logprobs"),
        ({"echo": 1}, "invalid_type", "echo"),
        ({"n": 17}, "integer_above_max_value", "n"),
        ({"temperature": 2.5}, "decimal_above_max_value", "temperature"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"prompt_logprobs": 1}, "unsupported_parameter", "prompt_logprobs"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "invalid_value", "guided_choice"),
        ({"truncate_prompt_tokens": 0}, "invalid_value", "truncate_prompt_tokens"),
        ({"stop_token_ids": [len(PIECES)]}, "invalid_value", "stop_token_ids[0]"),
    ],
)
def test_bad_fields(ask: Asker, llm: PromptLLM, fields: dict[str, Any], code: str, param: str) -> None:
    assert ask.error(**fields) == (400, code, param)
    assert llm.items == []


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": None},
        {"suffix": ""},
        {"best_of": None, "logprobs": None, "echo": None},
        {"best_of": 1},
        {"stream_options": None},
        {"stream_options": {}},
        {"length_penalty": 1.0},
        {"unknown": [1, {}]},
    ],
)
def test_fields_that_ask_for_nothing(ask: Asker, fields: dict[str, Any]) -> None:
    assert ask.choices(**fields)[0]["text"] == " and a dog."


def test_too_many_answers_in_all(ask: Asker) -> None:
    assert ask.error(["a"] * (MAX_ANSWERS // 16 + 1), n=16) == (400, "invalid_value", "n")
    assert len(ask.choices(["a"] * MAX_PROMPTS, max_tokens=1)) == MAX_PROMPTS


def test_errors_before_the_answer(ask: Asker, llm: PromptLLM) -> None:
    for stream in (False, True):
        llm.capacity_error = QUEUE_FULL
        assert ask.error(stream=stream)[:2] == (429, "queue_full")
        llm.capacity_error = None
        llm.prepare_script = [ClientError("no", param="structured_outputs.regex")]
        assert ask.error(stream=stream) == (400, "invalid_value", "structured_outputs.regex")
        llm.prepare_script = ()
        llm.disturbance = (0, EngineDeadError("gone"))
        assert ask.error(stream=stream)[:2] == (503, "engine_unavailable")
        llm.disturbance = None


def test_an_error_in_one_answer_is_the_requests(ask: Asker, llm: PromptLLM) -> None:
    llm.disturbance = (3, RequestFailedError("the step failed"))
    assert ask.error(["Two", "cats"])[:2] == (500, "internal_error")
    assert llm.closed.wait(1)


def test_an_answer_that_the_server_ended(ask: Asker, llm: PromptLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is told of it, and what made it is closed."""

    async def aborted() -> AsyncIterator[RequestOutput]:
        try:
            yield say("Two", FinishReason.ABORT)
        finally:
            llm.closed.set()

    llm.generators.append(aborted())
    monkeypatch.setattr(llm, "generate", lambda *requests: llm.generators[0], raising=False)
    assert ask.error()[:2] == (500, "internal_error")
    assert llm.closed.is_set()


def test_the_body_must_be_json(ask: Asker) -> None:
    for content, kind, status in [(b"{", "application/json", 400), (b'{"prompt":"a"}', "text/plain", 415)]:
        answer = httpx.post(f"{ask.url}/v1/completions", content=content, headers={"content-type": kind})
        assert answer.status_code == status


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_other_methods(ask: Asker, method: str) -> None:
    answer = httpx.request(method, f"{ask.url}/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"
