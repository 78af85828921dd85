"""Several answers as one stream: order, indices, sums, and errors."""

from __future__ import annotations

import msgspec
import pytest

from server.errors import RequestFailedError
from server.observability.metrics import ServerMetrics
from server.outputs.processor import OutputProcessor
from server.types import (
    EngineOutput,
    EngineOutputs,
    EngineRequest,
    FinishReason,
    RequestOutput,
    StepStats,
    TokenLogprobs,
)
from tests.outputs.test_processor import TABLE, ids, make_request


def several(n: int, name: str = "r", **changes: object) -> EngineRequest:
    return msgspec.structs.replace(make_request(name, **changes), n=n)  # type: ignore[arg-type]


class Responses:
    """An open response whose answers are fed a step at a time."""

    def __init__(self, *requests: EngineRequest) -> None:
        self.processor = OutputProcessor(TABLE, ServerMetrics("test"))
        self.wakes = 0
        self.response = self.processor.open(requests, self._wake)

    def _wake(self) -> None:
        self.wakes += 1

    def step(self, *outputs: EngineOutput) -> list[str]:
        return self.processor.process(EngineOutputs(outputs=list(outputs), stats=StepStats()))

    def say(self, answer_id: str, text: str, finish: FinishReason | None = None, **changes: object) -> list[str]:
        output = EngineOutput(request_id=answer_id, new_token_ids=ids(text), finish_reason=finish)
        return self.step(msgspec.structs.replace(output, **changes))

    def take_all(self) -> list[RequestOutput]:
        outputs = []
        while (output := self.response.take()) is not None:
            outputs.append(output)
        return outputs


def test_answers_come_under_their_own_index_and_end_one_by_one() -> None:
    responses = Responses(several(3))
    responses.say("r/1", "b")
    responses.say("r", "a")
    responses.say("r/1", "c", FinishReason.LENGTH)
    assert [(output.index, output.text, output.finish_reason) for output in responses.take_all()] == [
        (1, "bc", FinishReason.LENGTH),
        (0, "a", None),
    ]
    assert not responses.response.is_finished
    responses.say("r", "", FinishReason.STOP)
    responses.say("r/2", "d", FinishReason.LENGTH)
    assert not responses.response.is_finished, "it has not been taken"
    assert [(output.index, output.text) for output in responses.take_all()] == [(0, ""), (2, "d")]
    assert responses.response.is_finished


def test_choices_of_the_second_prompt_come_after_those_of_the_first() -> None:
    responses = Responses(several(2, "a"), several(2, "b"))
    for name in ("b/1", "a", "b", "a/1"):
        responses.say(name, "x", FinishReason.STOP)
    assert [output.index for output in responses.take_all()] == [3, 0, 2, 1]


def test_equal_answers_are_computed_once_and_told_for_each() -> None:
    responses = Responses(several(3, temperature=0.0), several(1, "s"))
    assert list(responses.response.streams) == ["r", "s"]
    responses.say("r", "ab", FinishReason.STOP)
    responses.say("s", "c", FinishReason.STOP)
    taken = responses.take_all()
    assert [(output.index, output.text) for output in taken] == [(0, "ab"), (1, "ab"), (2, "ab"), (3, "c")]
    assert taken[-1].usage.completion_tokens == 7
    assert responses.response.is_finished


def test_a_prompt_counts_once_and_answers_add_up() -> None:
    responses = Responses(several(2, "a", prompt=7), several(1, "b", prompt=5))
    responses.say("a", "xy", num_cached_tokens=4)
    responses.say("a/1", "z", num_cached_tokens=6)  # found what the first has computed: no saving
    responses.say("b", "uvw", num_cached_tokens=1)
    usage = responses.take_all()[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (12, 6, 5)


def test_a_slow_reader_gets_merged_outputs_and_nothing_piles_up() -> None:
    responses = Responses(several(2))
    for _ in range(1000):
        responses.say("r", "a")
        responses.say("r/1", "b")
    assert len(responses.response._ready) == 2
    assert [output.text for output in responses.take_all()] == ["a" * 1000, "b" * 1000]


def test_text_before_an_error_is_told_first() -> None:
    responses = Responses(several(2))
    responses.say("r", "a")
    responses.step(EngineOutput(request_id="r", new_token_ids=[], finish_reason=FinishReason.ERROR, error="broken"))
    first = responses.response.take()
    assert first is not None
    assert first.text == "a"
    with pytest.raises(RequestFailedError, match="broken"):
        responses.response.take()


def test_closing_tells_which_answers_the_engine_still_computes() -> None:
    responses = Responses(several(3, stop=("x",)))
    responses.say("r", "a", FinishReason.LENGTH)
    assert responses.say("r/1", "x") == ["r/1"], "a stop string ends one answer and no other"
    assert responses.processor.close(responses.response) == ["r/1", "r/2"]
    assert len(responses.processor) == 0


def test_every_answer_begins_with_what_is_known_of_the_prompt() -> None:
    request = several(2, num_prompt_logprobs=0, num_logprobs=0, prompt=3)
    responses = Responses(request)
    told = [TokenLogprobs(token, -float(token)) for token in request.prompt_token_ids[1:]]
    responses.step(EngineOutput(request_id="r", new_token_ids=[], prompt_logprobs=told[:1]))
    assert responses.response.take() is None
    responses.say("r", "a", prompt_logprobs=told[1:], logprobs=[TokenLogprobs(ids("a")[0], -9.0)])
    responses.say("r/1", "b", logprobs=[TokenLogprobs(ids("b")[0], -8.0)])
    responses.say("r", "c", logprobs=[TokenLogprobs(ids("c")[0], -7.0)])
    first, other = responses.take_all()
    for output in (first, other):
        assert output.prompt_token_ids == request.prompt_token_ids
        assert [entry.logprob for entry in output.prompt_logprobs or []] == [-1.0, -2.0]
    assert [(entry.token, entry.logprob) for entry in first.logprobs] == [("a", -9.0), ("c", -7.0)]
    assert [entry.token for entry in other.logprobs] == ["b"]
    responses.say("r", "d")
    (later,) = responses.take_all()
    assert later.prompt_token_ids is later.prompt_logprobs is None


def test_entries_wait_for_the_text_that_they_belong_to() -> None:
    responses = Responses(several(1, stop=("ab",), num_logprobs=0))
    responses.say("r", "a", logprobs=[TokenLogprobs(ids("a")[0], -1.0)])
    assert responses.response.take() is None
    responses.say("r", "c", logprobs=[TokenLogprobs(ids("c")[0], -2.0)])
    (output,) = responses.take_all()
    assert (output.text, [entry.logprob for entry in output.logprobs]) == ("ac", [-1.0, -2.0])


def test_an_answer_in_the_middle_of_a_text_keeps_its_first_space() -> None:
    for continues, text in ((False, "a"), (True, " a")):
        responses = Responses(msgspec.structs.replace(make_request(), continues_text=continues))
        responses.say("r", " a", FinishReason.STOP)
        assert [output.text for output in responses.take_all()] == [text]
