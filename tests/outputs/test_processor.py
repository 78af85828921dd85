"""Streams of answers: what a reader gets, however slow it is, and how an answer ends."""

from __future__ import annotations

import pytest

from server.errors import EngineDeadError, RequestFailedError, UnavailableError
from server.observability.metrics import ServerMetrics
from server.outputs.detokenizer import TokenTable
from server.outputs.processor import OutputProcessor
from server.outputs.response import ResponseStream
from server.outputs.stream import MAX_LOGPROB_TOKENS, RequestStream
from server.types import (
    EngineOutput,
    EngineOutputs,
    EngineRequest,
    FinishReason,
    PlaceholderRange,
    RequestOutput,
    SamplingParams,
    StepStats,
    TokenLogprobs,
)

# One token a character: `▁`, then `a` to `z`, punctuation, bytes, and two special tokens.
EOS, STOP_TOKEN = 0, 1
PIECES = ["</s>", "<stop>", "▁", *"abcdefghijklmnopqrstuvwxyz.", "<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>"]
TABLE = TokenTable.from_pieces(PIECES, special_ids={EOS, STOP_TOKEN})
FOX = [PIECES.index(f"<0x{byte:02X}>") for byte in "🦊".encode()]


def ids(text: str) -> list[int]:
    return [PIECES.index(character.replace(" ", "▁")) for character in text]


def make_request(
    request_id: str = "r", *, prompt: int = 5, placeholders: tuple[PlaceholderRange, ...] = (), **sampling: object
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=list(range(prompt)),
        sampling=SamplingParams(max_tokens=100, **sampling),  # type: ignore[arg-type]
        eos_token_ids=(EOS,),
        placeholders=placeholders,
        arrival_time=10.0,
    )


class Reader:
    """A stream under test: tokens go in one a step, and are taken when the test says so."""

    def __init__(self, **sampling: object) -> None:
        self.metrics = ServerMetrics("test")
        self.wakes = 0
        self.now = 20.0
        self.stream = RequestStream(make_request(**sampling), TABLE, self.metrics, self._wake)  # type: ignore[arg-type]

    def _wake(self) -> None:
        self.wakes += 1

    def push(
        self,
        token_ids: list[int],
        *,
        finish: FinishReason | None = None,
        stop_token: int | None = None,
        cached: int = 0,
        error: str | None = None,
        error_code: str | None = None,
        queue_seconds: float | None = None,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        """As the engine does: one output a token, the end on the last."""
        self.now += 1
        last = len(token_ids) - 1
        for index, chunk in enumerate([[token] for token in token_ids] or [[]]):
            ends = index >= last
            output = EngineOutput(
                request_id="r",
                new_token_ids=chunk,
                finish_reason=finish if ends else None,
                stop_token_id=stop_token if ends else None,
                num_cached_tokens=cached,
                queue_seconds=queue_seconds,
                error=error,
                error_code=error_code,
                logprobs=logprobs,
            )
            self.stream.push(output, self.now)

    def text(self) -> str:
        """All text of this take; None counts as nothing."""
        output = self.stream.take()
        return "" if output is None else output.text

    def last(self) -> RequestOutput:
        output = self.stream.take()
        assert output is not None
        assert output.finish_reason is not None
        return output

    def samples(self) -> dict[str, float]:
        """Metrics of requests that ended."""
        lines = self.metrics.render()[0].decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.removeprefix("idefics2:").replace('model_name="test"', ""): float(value) for name, value in pairs}


# -- deltas ---------------------------------------------------------------------------------------------------------


def test_deltas_merge_while_nobody_reads() -> None:
    reader = Reader()
    reader.push(ids(" hello"))
    first = reader.stream.take()
    assert first is not None
    assert (first.text, first.token_ids, first.finish_reason) == ("hello", ids(" hello"), None)
    reader.push(ids(" wo"))
    reader.push(ids("rld"), finish=FinishReason.LENGTH)
    rest = reader.last()
    assert (rest.text, rest.token_ids, rest.finish_reason) == (" world", ids(" world"), FinishReason.LENGTH)
    assert rest.request_id == "r"


def test_nothing_to_take_is_none_and_loses_no_token() -> None:
    reader = Reader()
    assert reader.stream.take() is None
    reader.push(FOX[:3])
    assert reader.stream.take() is None
    reader.push(FOX[3:])
    output = reader.stream.take()
    assert output is not None
    assert (output.text, output.token_ids) == ("🦊", FOX)
    assert reader.stream.take() is None


def test_every_push_wakes_the_reader() -> None:
    reader = Reader()
    for count, letter in enumerate("abc", start=1):
        reader.push(ids(letter))
        assert reader.wakes == count
    reader.push(ids("d"), finish=FinishReason.STOP)
    assert reader.wakes == 4


def test_half_a_character_comes_out_at_the_end() -> None:
    reader = Reader()
    reader.push([*ids("a"), *FOX[:2]], finish=FinishReason.LENGTH)
    assert reader.last().text == "a\ufffd"


# -- stop strings ---------------------------------------------------------------------------------------------------


def test_a_stop_string_ends_the_answer_here() -> None:
    reader = Reader(stop=("end",))
    reader.push(ids("abc e"))
    assert reader.text() == "abc "
    reader.push(ids("nd"))
    output = reader.last()
    assert (output.text, output.finish_reason, output.stop_reason) == ("", FinishReason.STOP, "end")
    assert output.usage.completion_tokens == 7
    assert not reader.stream.engine_finished
    wakes = reader.wakes
    reader.push(ids("xyz"))  # the engine has not heard yet
    assert reader.wakes == wakes
    assert reader.last().text == ""
    assert reader.last().usage.completion_tokens == 7
    reader.push(ids("x"), finish=FinishReason.LENGTH)
    assert reader.stream.engine_finished
    assert reader.last().finish_reason is FinishReason.STOP


def test_a_stop_string_is_shown_when_asked_for() -> None:
    reader = Reader(stop=("end",), include_stop_str_in_output=True)
    reader.push(ids("ab endless"))
    assert reader.last().text == "ab end"


def test_text_held_for_a_stop_string_comes_out_when_the_answer_ends() -> None:
    reader = Reader(stop=("ends",))
    reader.push(ids("ab end"), finish=FinishReason.LENGTH)
    output = reader.last()
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab end", FinishReason.LENGTH, None)


def test_a_stop_string_in_the_last_token_is_the_reason_even_at_the_limit() -> None:
    reader = Reader(stop=("end",))
    reader.push(ids("ab end"), finish=FinishReason.LENGTH)
    output = reader.last()
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab ", FinishReason.STOP, "end")
    assert reader.stream.engine_finished


def test_min_tokens_postpones_stop_strings() -> None:
    reader = Reader(stop=("b",), min_tokens=4)
    reader.push(ids("abab"))
    assert reader.text() == "abab"
    assert reader.stream.finish_reason is None
    reader.push(ids("ab"))
    output = reader.last()
    assert (output.text, output.stop_reason, output.usage.completion_tokens) == ("a", "b", 6)


def test_the_token_after_min_tokens_may_stop() -> None:
    reader = Reader(stop=("b",), min_tokens=2)
    reader.push(ids("aab"))
    assert reader.last().stop_reason == "b"


def test_text_from_before_min_tokens_is_no_part_of_a_stop_string() -> None:
    reader = Reader(stop=("ab",), min_tokens=1)
    reader.push(ids("ab"))
    assert reader.stream.finish_reason is None
    assert reader.text() == "ab"


# -- stop tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "ab.")])
def test_a_stop_token_is_hidden_or_shown_and_named(include: bool, text: str) -> None:
    dot = ids(".")[0]
    reader = Reader(stop_token_ids=(dot,), include_stop_str_in_output=include)
    reader.push(ids("ab."), finish=FinishReason.STOP, stop_token=dot)
    output = reader.last()
    assert (output.text, output.stop_reason, output.finish_reason) == (text, dot, FinishReason.STOP)
    assert output.token_ids == ids("ab.")
    assert output.usage.completion_tokens == 3


def test_eos_is_no_stop_reason_and_not_shown() -> None:
    for skip in (True, False):
        reader = Reader(skip_special_tokens=skip)
        reader.push([*ids("ab"), EOS], finish=FinishReason.STOP, stop_token=EOS)
        output = reader.last()
        assert (output.text, output.stop_reason, output.finish_reason) == ("ab", None, FinishReason.STOP)
        assert output.token_ids == [*ids("ab"), EOS]


def test_a_special_token_in_the_middle_is_shown_when_asked_for() -> None:
    reader = Reader(skip_special_tokens=False, ignore_eos=True)
    reader.push([*ids("a"), EOS, *ids("b")])
    assert reader.text() == "a</s>b"


def test_an_answer_of_nothing_but_eos_has_an_end() -> None:
    reader = Reader()
    reader.push([EOS], finish=FinishReason.STOP, stop_token=EOS)
    output = reader.last()
    assert (output.text, output.token_ids, output.finish_reason) == ("", [EOS], FinishReason.STOP)


# -- usage ----------------------------------------------------------------------------------------------------------


def test_usage_counts_prompt_answer_cache_and_pictures() -> None:
    reader = Reader(prompt=9, placeholders=(PlaceholderRange(1, 3), PlaceholderRange(4, 3)))
    assert reader.stream.usage.completion_tokens == 0
    reader.push(ids("ab"), cached=4)
    output = reader.stream.take()
    assert output is not None
    usage = output.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.image_tokens) == (9, 2, 4, 6)
    reader.push([*ids("c"), EOS], cached=4, finish=FinishReason.STOP, stop_token=EOS)
    assert reader.last().usage.completion_tokens == 4


# -- errors and other ends ------------------------------------------------------------------------------------------


def test_an_error_comes_after_the_text_before_it() -> None:
    reader = Reader()
    reader.push(ids("abc"))
    reader.push([], finish=FinishReason.ERROR, error="broken")
    output = reader.stream.take()
    assert output is not None
    assert (output.text, output.token_ids, output.finish_reason) == ("abc", ids("abc"), None)
    for _ in range(2):
        with pytest.raises(RequestFailedError, match="broken"):
            reader.stream.take()
    assert reader.stream.engine_finished
    assert reader.stream.finish_reason is FinishReason.ERROR


def test_an_error_without_text_is_raised_at_once() -> None:
    reader = Reader()
    reader.push([], finish=FinishReason.ERROR, error="broken")
    assert reader.wakes == 1
    with pytest.raises(RequestFailedError, match="broken"):
        reader.stream.take()


def test_an_error_with_a_code_is_one_to_try_again() -> None:
    reader = Reader()
    reader.push([], finish=FinishReason.ERROR, error="no memory", error_code="out_of_memory")
    with pytest.raises(UnavailableError, match="no memory") as raised:
        reader.stream.take()
    assert raised.value.code == "out_of_memory"
    assert raised.value.retry_after is not None


def test_only_the_first_end_counts() -> None:
    reader = Reader()
    reader.push(ids("a"), finish=FinishReason.LENGTH)
    wakes = reader.wakes
    reader.stream.fail(EngineDeadError("too late"))
    reader.stream.abandon()
    reader.push(ids("b"), finish=FinishReason.STOP)
    assert reader.wakes == wakes
    assert reader.last().finish_reason is FinishReason.LENGTH
    assert reader.samples()['requests_total{finish_reason="length",}'] == 1
    assert sum(value for name, value in reader.samples().items() if name.startswith("requests_total")) == 1


def test_a_second_error_does_not_replace_the_first() -> None:
    reader = Reader()
    reader.push([], finish=FinishReason.ERROR, error="first")
    reader.stream.fail(EngineDeadError("second"))
    with pytest.raises(RequestFailedError, match="first"):
        reader.stream.take()


def test_an_abandoned_stream_takes_nothing_more() -> None:
    reader = Reader()
    reader.push(ids("a"))
    reader.stream.abandon()
    reader.stream.abandon()
    reader.push(ids("b"))
    assert reader.stream.finish_reason is FinishReason.ABORT
    assert not reader.stream.engine_finished
    assert reader.stream.usage.completion_tokens == 1
    assert reader.samples()['requests_total{finish_reason="abort",}'] == 1


# -- metrics --------------------------------------------------------------------------------------------------------


def test_times_and_lengths_are_recorded_once_a_request() -> None:
    reader = Reader()
    reader.push(ids("a"), queue_seconds=0.5)  # at 21, arrived at 10
    reader.push(ids("b"))
    reader.push([*ids("c"), EOS], finish=FinishReason.STOP, stop_token=EOS)  # both at 23
    samples = reader.samples()
    assert samples["time_to_first_token_seconds_sum{}"] == 11
    assert samples["inter_token_latency_seconds_count{}"] == 3
    assert samples["inter_token_latency_seconds_sum{}"] == 2
    assert samples["e2e_request_latency_seconds_sum{}"] == 13
    assert samples["request_queue_time_seconds_sum{}"] == 0.5
    assert samples["request_time_per_output_token_seconds_sum{}"] == pytest.approx(2 / 3)
    assert samples["request_prompt_tokens_sum{}"] == 5
    assert samples["request_generation_tokens_sum{}"] == 4
    assert samples['requests_total{finish_reason="stop",}'] == 1


def test_a_request_that_never_ran_has_no_queue_or_decode_time() -> None:
    reader = Reader()
    reader.stream.fail(EngineDeadError("gone"))
    samples = reader.samples()
    assert samples["request_queue_time_seconds_count{}"] == 0
    assert samples["request_time_per_output_token_seconds_count{}"] == 0
    assert samples["time_to_first_token_seconds_count{}"] == 0
    assert samples['requests_total{finish_reason="error",}'] == 1


# -- all streams of a server ----------------------------------------------------------------------------------------


class Streams:
    """An OutputProcessor with some open requests."""

    def __init__(self, *requests: EngineRequest) -> None:
        self.metrics = ServerMetrics("test")
        self.processor = OutputProcessor(TABLE, self.metrics)
        self.woken: list[str] = []
        self.responses = {request.request_id: self._open(request) for request in requests}
        self.streams = {name: response.streams[name] for name, response in self.responses.items()}

    def _open(self, request: EngineRequest) -> ResponseStream:
        return self.processor.open([request], lambda: self.woken.append(request.request_id))

    def step(self, **tokens: tuple[str, FinishReason | None]) -> list[str]:
        outputs = [
            EngineOutput(request_id=name, new_token_ids=ids(text), finish_reason=finish)
            for name, (text, finish) in tokens.items()
        ]
        return self.processor.process(EngineOutputs(outputs=outputs, stats=StepStats(num_running=len(outputs))))


def test_outputs_reach_their_own_streams() -> None:
    streams = Streams(make_request("a"), make_request("b"))
    assert streams.step(a=("x", None), b=("y", None), gone=("z", None)) == []
    assert streams.woken == ["a", "b"]
    assert [stream.take().text for stream in streams.streams.values()] == ["x", "y"]  # type: ignore[union-attr]
    assert b'num_requests_running{model_name="test"} 3.0' in streams.metrics.render()[0]


def test_an_id_that_ended_here_is_returned_once() -> None:
    streams = Streams(make_request("a", stop=("x",)), make_request("b"))
    assert streams.step(a=("x", None), b=("x", None)) == ["a"]
    assert streams.step(a=("y", None), b=("y", None)) == []
    assert streams.step(a=("y", FinishReason.LENGTH), b=("y", FinishReason.LENGTH)) == []


def test_an_id_that_ended_in_the_engine_at_the_same_time_is_not_returned() -> None:
    streams = Streams(make_request("a", stop=("x",)))
    assert streams.step(a=("x", FinishReason.LENGTH)) == []
    assert streams.streams["a"].finish_reason is FinishReason.STOP


def test_closed_streams_are_forgotten() -> None:
    streams = Streams(make_request("a"), make_request("b"))
    assert len(streams.processor) == 2
    assert streams.processor.close(streams.responses["a"]) == ["a"]
    assert len(streams.processor) == 1
    assert streams.step(a=("x", None)) == []
    assert streams.woken == []


def test_all_open_streams_fail_together_and_ended_ones_do_not() -> None:
    streams = Streams(make_request("a"), make_request("b"))
    streams.step(a=("x", None), b=("y", FinishReason.LENGTH))
    streams.processor.fail_all(EngineDeadError("the engine is gone"))
    open_stream, ended = streams.streams["a"], streams.streams["b"]
    assert open_stream.take().text == "x"  # type: ignore[union-attr]
    with pytest.raises(EngineDeadError):
        open_stream.take()
    assert ended.take().finish_reason is FinishReason.LENGTH  # type: ignore[union-attr]
    assert streams.woken == ["a", "b", "a"]


def test_a_backlog_with_log_probabilities_comes_in_parts_and_others_whole() -> None:
    words = ids(" hello") * 100
    for num_logprobs in (None, 2):
        reader = Reader(num_logprobs=num_logprobs)
        for token in words:
            entry = TokenLogprobs(token, -1.0, ((1, -2.0), (2, -3.0)))
            reader.push([token], logprobs=() if num_logprobs is None else (entry,))
        reader.push([], finish=FinishReason.LENGTH)
        parts = []
        while not parts or reader.stream.has_more:
            parts.append(reader.stream.take())
        taken = [part for part in parts if part is not None]
        assert [token for part in taken for token in part.token_ids] == words
        assert "".join(part.text for part in taken) == " ".join(["hello"] * 100)
        assert [part.finish_reason for part in taken] == [None] * (len(taken) - 1) + [FinishReason.LENGTH]
        if num_logprobs is None:
            assert len(taken) == 1
        else:
            assert all(len(part.logprobs) == len(part.token_ids) <= MAX_LOGPROB_TOKENS for part in taken)
            assert len(taken) == -(-len(words) // MAX_LOGPROB_TOKENS)
