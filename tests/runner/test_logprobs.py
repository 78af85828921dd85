"""Log-probabilities from the real model: of answers and of prompts, cut into chunks, alone and in a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.engine.core import EngineCore
from server.types import EngineRequest, SamplingParams, TokenLogprobs
from tests.engines import real_core, record_first_logits

PROMPT = [1, *range(600, 650)]
TOLERANCE = 1e-4


class Told:
    """What an engine told of each answer."""

    def __init__(self, core: EngineCore, *requests: EngineRequest) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        for request in requests:
            core.scheduler.add(request)
        while core.scheduler.has_work:
            for output in core.step().outputs:
                assert output.error is None
                self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
                self.logprobs.setdefault(output.request_id, []).extend(output.logprobs)
                self.prompt_logprobs.setdefault(output.request_id, []).extend(output.prompt_logprobs)


def make(name: str, prompt: list[int] = PROMPT, **sampling: object) -> EngineRequest:
    values: dict[str, object] = {"max_tokens": 8, "temperature": 0.0, **sampling}
    return EngineRequest(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(**values),  # type: ignore[arg-type]
        eos_token_ids=(),
    )


@pytest.fixture(scope="module")
def core(tiny_checkpoint: Path) -> EngineCore:
    return real_core(tiny_checkpoint, max_num_batched_tokens=16, max_num_seqs=4)


def test_an_answers_logprobs_are_those_of_the_same_tokens_as_a_prompt(core: EngineCore) -> None:
    first = Told(core, make("answer", num_logprobs=3, temperature=1.0, seed=3, repetition_penalty=2.0))
    answer = first.tokens["answer"]
    again = Told(core, make("prompt", [*PROMPT, *answer], max_tokens=1, num_prompt_logprobs=3))
    told = again.prompt_logprobs["prompt"]
    assert [entry.token_id for entry in told] == [*PROMPT[1:], *answer]
    for entry, same in zip(first.logprobs["answer"], told[-len(answer) :], strict=True):
        assert entry.token_id == same.token_id
        assert entry.logprob == pytest.approx(same.logprob, abs=TOLERANCE)
        assert [value for _, value in entry.top] == pytest.approx([value for _, value in same.top], abs=TOLERANCE)


def test_they_are_the_models_own_whatever_the_sampling(core: EngineCore) -> None:
    logits = record_first_logits(core)
    told = Told(core, make("warped", num_logprobs=20, temperature=0.3, top_k=2, logit_bias={7: 100.0}, min_tokens=4))
    expected = torch.log_softmax(logits["warped"], dim=-1)
    entry = told.logprobs["warped"][0]
    assert entry.token_id == 7
    assert entry.logprob == pytest.approx(float(expected[7]), abs=TOLERANCE)
    values, ids = torch.topk(expected, 20)
    assert [token for token, _ in entry.top] == ids.tolist()
    assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=TOLERANCE)
    assert 7 not in ids


def test_each_gets_as_many_as_it_asked_for_and_others_get_none(core: EngineCore) -> None:
    told = Told(
        core,
        make("two", num_logprobs=2),
        make("none"),
        make("zero", num_logprobs=0, num_prompt_logprobs=0),
        make("many", num_logprobs=20, num_prompt_logprobs=1),
    )
    assert [len(entry.top) for entry in told.logprobs["two"]] == [2] * 8
    assert told.logprobs["none"] == told.prompt_logprobs["none"] == told.prompt_logprobs["two"] == []
    assert [len(entry.top) for entry in told.logprobs["zero"]] == [0] * 8
    assert [len(entry.top) for entry in told.prompt_logprobs["zero"]] == [0] * 50
    assert [len(entry.top) for entry in told.prompt_logprobs["many"]] == [1] * 50
    for name in ("two", "zero", "many"):
        assert [entry.token_id for entry in told.logprobs[name]] == told.tokens[name]
        assert all(entry.logprob <= 0 for entry in told.logprobs[name])


def test_more_prompt_rows_than_are_held_at_once(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [1, *range(600, 900)]
    whole = Told(real_core(tiny_checkpoint, max_num_batched_tokens=512), make("r", prompt, num_prompt_logprobs=1))
    monkeypatch.setattr("server.runner.logprobs.PROMPT_ROWS", 7)
    parts = Told(real_core(tiny_checkpoint, max_num_batched_tokens=512), make("r", prompt, num_prompt_logprobs=1))
    assert len(whole.prompt_logprobs["r"]) == 300
    for one, other in zip(whole.prompt_logprobs["r"], parts.prompt_logprobs["r"], strict=True):
        assert (one.token_id, one.top[0][0]) == (other.token_id, other.top[0][0])
        assert one.logprob == pytest.approx(other.logprob, abs=TOLERANCE)
