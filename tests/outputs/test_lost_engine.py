"""What becomes of open responses when their engine is gone."""

from __future__ import annotations

import pytest

from server.errors import DeadlineError, EngineDeadError, RequestFailedError
from server.observability.metrics import ServerMetrics
from server.outputs.processor import OutputProcessor
from server.outputs.response import ResponseStream
from server.types import EngineOutput, EngineOutputs, FinishReason, StepStats, TokenLogprobs
from tests.outputs.test_processor import TABLE, ids, make_request
from tests.outputs.test_response import several


class Open:
    """Responses of one request each, by its id, and an engine's words."""

    def __init__(self, *names: str, n: int = 1) -> None:
        self.processor = OutputProcessor(TABLE, ServerMetrics("test"))
        self.responses: dict[str, ResponseStream] = {
            name: self.processor.open([several(n, name) if n > 1 else make_request(name)], lambda: None)
            for name in names
        }

    def start(self, *answer_ids: str) -> None:
        self.processor.process(EngineOutputs(outputs=[], stats=StepStats(), started=list(answer_ids)))

    def say(self, output: EngineOutput) -> None:
        self.processor.process(EngineOutputs(outputs=[output], stats=StepStats()))

    def lose(self) -> list[str]:
        """The ids of what is left for another engine."""
        for response in self.processor.open_responses:
            response.lose_engine(retry_after=7.0)
        return [request.request_id for response in self.processor.untold for request in response.requests]


def test_what_nothing_is_known_of_is_left_in_its_order() -> None:
    opened = Open("c", "a", "b")
    opened.start("a")
    assert opened.lose() == ["c", "a", "b"]


@pytest.mark.parametrize(
    "told",
    [
        EngineOutput(request_id="a", new_token_ids=ids("x")),
        EngineOutput(request_id="a", new_token_ids=[], prompt_logprobs=[TokenLogprobs(3, -1.0)]),
        EngineOutput(request_id="a/2", new_token_ids=ids("x"), finish_reason=FinishReason.LENGTH),
    ],
    ids=["text", "log-probabilities of the prompt", "the end of one answer of several"],
)
def test_what_anything_is_known_of_ends(told: EngineOutput) -> None:
    opened = Open("a", "b", n=3)
    opened.say(told)
    assert opened.lose() == ["b"]
    with pytest.raises(EngineDeadError) as caught:
        list(iter(opened.responses["a"].take, None))
    assert (caught.value.status, caught.value.retry_after) == (503, 7.0)


def test_what_was_computed_when_two_engines_ended_gets_no_third() -> None:
    opened = Open("a", "b", n=2)
    opened.start("a/1")
    assert opened.lose() == ["a", "b"]
    opened.start("a")
    assert opened.lose() == ["b"]
    with pytest.raises(RequestFailedError) as caught:
        opened.responses["a"].take()
    assert caught.value.status == 500


def test_waiting_while_engines_end_is_no_reason() -> None:
    opened = Open("a", "b")
    opened.start("a")
    for _ in range(5):
        assert opened.lose() == ["a", "b"]


def test_what_has_ended_here_is_not_left() -> None:
    opened = Open("a", "b", "c")
    opened.responses["a"].fail(DeadlineError("too late"))
    opened.processor.close(opened.responses["b"])
    assert opened.lose() == ["c"]


def test_a_whole_answer_that_is_not_read_yet_stays_whole() -> None:
    opened = Open("a")
    opened.say(EngineOutput(request_id="a", new_token_ids=ids("x"), finish_reason=FinishReason.LENGTH))
    assert opened.lose() == []
    output = opened.responses["a"].take()
    assert output is not None
    assert (output.text, output.finish_reason) == ("x", FinishReason.LENGTH)


def test_starts_of_unknown_answers_are_ignored() -> None:
    opened = Open("a")
    opened.start("gone")
    assert opened.lose() == ["a"]
