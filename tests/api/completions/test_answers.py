"""What POST /v1/completions answers: texts, echoed prompts, legacy log-probabilities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from tests.api.completions.client import Asker
from tests.api.prompt_llm import (
    BOS,
    EOS,
    IMAGE,
    PIECES,
    PromptLLM,
    byte_ids,
    encode,
    ids,
    likeliest_after,
    logprobs_after,
)
from tests.api.wire import usage

AND_A_DOG = ids("▁and", "▁a", "▁dog", ".")


def test_the_whole_answer(ask: Asker, llm: PromptLLM) -> None:
    body = ask(max_tokens=3)
    assert isinstance(body.pop("created"), int)
    assert body.pop("id").startswith("cmpl-")
    assert body == {
        "object": "text_completion",
        "model": "idefics2-8b",
        "choices": [
            {"index": 0, "text": " and a dog", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        ],
        "usage": usage(3, 3),
        "system_fingerprint": "fp_test",
    }


def test_how_an_answer_ends(ask: Asker, llm: PromptLLM) -> None:
    llm.answers = [[*AND_A_DOG, EOS, *AND_A_DOG]]
    (choice,) = ask.choices()
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (" and a dog.", "stop", None)
    (choice,) = ask.choices(stop=[" dog"])
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (" and a", "stop", " dog")
    (choice,) = ask.choices(stop_token_ids=ids("▁dog"))
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (" and a", "stop", ids("▁dog")[0])


def test_choices_of_several_prompts(ask: Asker, llm: PromptLLM) -> None:
    """Index: prompt times n plus the answer's own. Usage: each prompt once, every answer."""
    llm.answers = [ids(word, "▁a", EOS_PIECE) for word in ("▁Two", "▁cats", "▁and", "▁dog")]
    body = ask(["Two", "a dog."], n=2, temperature=1)
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, " Two a"),
        (1, " cats a"),
        (2, " and a"),
        (3, " dog a"),
    ]
    assert body["usage"]["prompt_tokens"] == len([BOS, *encode("Two")]) + len([BOS, *encode("a dog.")])
    assert body["usage"]["completion_tokens"] == 4 * 3


EOS_PIECE = PIECES[EOS]


def test_equal_answers_are_told_n_times(ask: Asker, llm: PromptLLM) -> None:
    body = ask(n=3, temperature=0, max_tokens=2, echo=True, logprobs=1, return_token_ids=True)
    first, *others = body["choices"]
    assert [choice.pop("index") for choice in body["choices"]] == [0, 1, 2]
    assert others == [first, first]
    assert first["token_ids"] == AND_A_DOG[:2]
    assert body["usage"]["completion_tokens"] == 6


# -- echo --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Two cats", "  two\n\n spaces ", "é 猫 🐈", "a▁b", " ", "</s>"])
def test_a_text_comes_back_as_it_was_sent(ask: Asker, text: str) -> None:
    (choice,) = ask.choices(text, echo=True)
    assert choice["text"] == text + " and a dog."


def test_ids_come_back_as_text(ask: Asker) -> None:
    (choice,) = ask.choices([BOS, *encode("Two cats"), EOS, *encode("The dog")], echo=True, max_tokens=1)
    assert choice["text"] == "Two cats The dog and"


def test_what_is_left_of_a_text(ask: Asker) -> None:
    (choice,) = ask.choices("Two cats and a dog", echo=True, truncate_prompt_tokens=2, max_tokens=1)
    assert choice["text"] == "a dog and"


def test_nothing_but_the_prompt(ask: Asker, llm: PromptLLM) -> None:
    """The token that is computed for it leaves no trace, even where it would have ended the answer."""
    llm.answers = [ids("▁and")]
    fields = {"n": 2, "stop_token_ids": ids("▁and"), "logprobs": 0, "return_token_ids": True}
    body = ask(["Two", "cats."], echo=True, max_tokens=0, **fields)
    assert [choice["text"] for choice in body["choices"]] == ["Two", "Two", "cats.", "cats."]
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
    assert {choice["stop_reason"] for choice in body["choices"]} == {None}
    assert [choice["token_ids"] for choice in body["choices"]] == [[]] * 4
    assert len(body["choices"][2]["logprobs"]["tokens"]) == len([BOS, *encode("cats.")])
    assert body["usage"]["completion_tokens"] == 0
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] == len(encode("Two") + encode("cats.")) + 2
    # The engine computes one token for both answers.
    assert [(request.max_tokens, len(request.choice_ids)) for request in llm.requests] == [(1, 1)] * 2


# -- log-probabilities -------------------------------------------------------------------------------------------------


def rounded(value: float) -> float:
    return round(value, 9)


def test_logprobs_of_an_answer(ask: Asker, llm: PromptLLM) -> None:
    (choice,) = ask.choices(max_tokens=2, logprobs=2)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [" and", " a"]
    after = [logprobs_after(ids("▁cats")[0]), logprobs_after(ids("▁and")[0])]
    assert logprobs["token_logprobs"] == [after[0][ids("▁and")[0]], after[1][ids("▁a")[0]]]
    for token, value, top, all_of_them in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], after, strict=True
    ):
        assert top[token] == value
        assert len(top) == 3
        assert sorted(top.values(), reverse=True)[:2] == sorted(all_of_them, reverse=True)[:2]
    assert logprobs["text_offset"] == [0, 4]


def test_no_alternatives(ask: Asker) -> None:
    (choice,) = ask.choices(max_tokens=2, logprobs=0)
    logprobs = choice["logprobs"]
    assert logprobs["top_logprobs"] == [
        {token: value} for token, value in zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
    ]


@pytest.mark.parametrize("prompt", ["Two cats", [BOS, *encode("Two cats")]])
def test_logprobs_with_echo(ask: Asker, prompt: Any) -> None:
    (choice,) = ask.choices(prompt, max_tokens=2, logprobs=1, echo=True)
    text, logprobs = choice["text"], choice["logprobs"]
    assert text == "Two cats and a"
    assert logprobs["tokens"] == ["<s>", "Two", " cats", " and", " a"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, 0, 3, 8, 12]
    sequence = [BOS, *ids("▁Two", "▁cats", "▁and", "▁a")]
    assert logprobs["token_logprobs"][1:] == [
        logprobs_after(last)[token_id] for last, token_id in itertools.pairwise(sequence)
    ]
    assert all(len(top) in (1, 2) for top in logprobs["top_logprobs"][1:])


def test_offsets_lead_to_the_tokens(ask: Asker, llm: PromptLLM) -> None:
    """Also past characters of several bytes, each a token."""
    llm.answers = [[*byte_ids("é"), *ids("▁a", "s"), *byte_ids("🐈"), *ids("."), *AND_A_DOG]]
    (choice,) = ask.choices("猫 Two", logprobs=0, echo=True)
    text, logprobs = choice["text"], choice["logprobs"]
    assert text == "猫 Twoé as🐈. and a dog."
    ends = [*logprobs["text_offset"][1:], len(text)]
    pieces = [text[start:end] for start, end in zip(logprobs["text_offset"], ends, strict=True)]
    # All tokens but the last of a character end where they begin.
    bytes_of_cat = ["bytes:\\xe7", "bytes:\\x8c", "bytes:\\xab"]
    assert logprobs["tokens"][:6] == ["<s>", "", *bytes_of_cat, " Two"]
    assert pieces[:6] == ["", "", "", "", "猫", " Two"]
    assert pieces[6:] == ["", "é", " a", "s", "", "", "", "🐈", ".", " and", " a", " dog", "."]
    assert logprobs["tokens"][6:9] == ["bytes:\\xc3", "bytes:\\xa9", " a"]


@pytest.mark.parametrize(
    ("first", "token"), [(BOS, "<s>"), (ids("▁Two")[0], "Two"), (ids("<0xC3>")[0], "bytes:\\xc3"), (0, "<unk>")]
)
def test_the_first_token_of_a_prompt(ask: Asker, first: int, token: str) -> None:
    (choice,) = ask.choices([first, *ids("▁cats")], logprobs=1, echo=True, max_tokens=0)
    assert choice["logprobs"]["tokens"][0] == token
    assert choice["logprobs"]["token_logprobs"][0] is None


def test_tokens_that_a_stop_string_cut_off(ask: Asker) -> None:
    (choice,) = ask.choices(stop=" d", logprobs=0)
    assert choice["text"] == " and a"
    assert choice["logprobs"]["tokens"] == [" and", " a", " dog"]
    assert choice["logprobs"]["text_offset"] == [0, 4, 6]
    (choice,) = ask.choices(stop="d a", logprobs=0, echo=True)
    assert choice["text"] == "Two cats an"
    assert choice["logprobs"]["text_offset"] == [0, 0, 3, 8, 11]


def loglikelihood(choice: Any, context_length: int, *, generated: int) -> tuple[float, bool]:
    """As evaluation harnesses work it out: the sum over the continuation, and whether greedy would have said it."""
    logprobs = choice["logprobs"]
    end = len(logprobs["tokens"]) - generated
    values = logprobs["token_logprobs"][context_length:end]
    tops = logprobs["top_logprobs"][context_length:end]
    is_greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
    return sum(values), is_greedy


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_loglikelihood_of_continuations(ask: Asker, llm: PromptLLM, max_tokens: int) -> None:
    context = [BOS, *encode("Two cats and")]
    likely = [likeliest_after(context[-1])]
    likely.append(likeliest_after(likely[0]))
    continuations = [likely, encode("a dog."), ids("."), byte_ids("é")]
    prompts = [[*context, *continuation] for continuation in continuations]
    choices = ask.choices(prompts, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, seed=1234)
    expected = [expected_loglikelihood(context, continuation) for continuation in continuations]
    told = [loglikelihood(choice, len(context), generated=max_tokens) for choice in choices]
    assert [(rounded(value), greedy) for value, greedy in told] == expected
    assert [greedy for _, greedy in told] == [True, False, False, False]
    assert all(len(choice["logprobs"]["tokens"]) == len(prompts[choice["index"]]) + max_tokens for choice in choices)


def expected_loglikelihood(context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    sequence = [context[-1], *continuation]
    pairs = list(itertools.pairwise(sequence))
    value = math.fsum(logprobs_after(last)[token_id] for last, token_id in pairs)
    return rounded(value), all(likeliest_after(last) == token_id for last, token_id in pairs)


def test_token_ids(ask: Asker, llm: PromptLLM) -> None:
    body = ask(["Two", [BOS, *encode("a")]], return_token_ids=True, max_tokens=2)
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [[BOS, *encode("Two")], [BOS, *encode("a")]]
    assert [choice["token_ids"] for choice in body["choices"]] == [AND_A_DOG[:2]] * 2


# -- the unmodified client ---------------------------------------------------------------------------------------------


def test_sdk(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="idefics2-8b", prompt="Two cats", echo=True, logprobs=1, max_tokens=2)
    assert answer.choices[0].text == "Two cats and a"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["<s>", "Two", " cats", " and", " a"]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="idefics2-8b", prompt=[[IMAGE]])
    assert caught.value.param == "prompt[0][0]"
