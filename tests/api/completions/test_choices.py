"""How outputs become pieces of text completions, where no tokenizer would lead: broken bytes, equal names, no odds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from server.api.completions.choices import Choices, Collector, EchoedPrompt, TextOffsets, Wanted
from server.api.completions.protocol import CompletionChoice
from server.api.completions.streaming import CompletionEncoder
from server.api.protocol import StreamOptions
from server.errors import RequestFailedError
from server.types import FinishReason, Logprob, RequestOutput, Usage

USAGE = Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=0, image_tokens=0)


def output(
    text: str, *logprobs: Logprob, finish: FinishReason | None = None, prompt: Sequence[Logprob] | None = None
) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        text=text,
        token_ids=[entry.token_id for entry in logprobs],
        usage=USAGE,
        finish_reason=finish,
        logprobs=list(logprobs),
        prompt_logprobs=None if prompt is None else list(prompt),
    )


def token(data: bytes, logprob: float = -1.0, *top: Logprob, name: str | None = None) -> Logprob:
    return Logprob(7, data.decode(errors="replace") if name is None else name, data, logprob, top)


def choice(*outputs: RequestOutput, prompt: EchoedPrompt | None = None) -> CompletionChoice:
    choices = Choices([prompt or EchoedPrompt([1])], 1, Wanted(logprobs=True))
    collector = Collector()
    for each in outputs:
        collector.add(choices.write(each))
    (only,) = collector.choices
    return only


@pytest.mark.parametrize(
    "pieces",
    [
        [b"a", b"\xc3", b"\xa9", b"b"],
        [b"\xe7\x8c", b"\xab", b"x"],
        [b"\xf0\x9f", b"a", b"\xe7", b"\xe7\x8c\xab", b"."],
        [b"\xff", b"\xfe", b"z"],
        [b"\x80", b"\x80", b"z"],
        [b"a\xc3", b"\xa9b\xc3", b"\xa9", b""],
        [b"", b"", b"\xc3"],
    ],
)
def test_offsets_are_places_in_the_text(pieces: list[bytes]) -> None:
    """The text is what all bytes decode to; a token that begins a character stands at that character."""
    text = b"".join(pieces).decode(errors="replace")
    offsets = TextOffsets(10)
    for index, piece in enumerate(pieces):
        before, after = b"".join(pieces[:index]), b"".join(pieces[index:])
        place = offsets.next(piece) - 10
        assert 0 <= place <= len(text)
        if piece and piece[0] & 0xC0 != 0x80:
            assert before.decode(errors="replace") == text[:place]
            assert after.decode(errors="replace") == text[place:]


def test_inside_a_character() -> None:
    offsets = TextOffsets()
    assert [offsets.next(piece) for piece in (b"a", b"\xf0", b"\x9f\x90", b"\x88", b"b")] == [0, 1, 1, 1, 2]


def test_names() -> None:
    told = choice(
        output(
            "a\ufffd",
            token(b"a"),
            token(b"", name="</s>"),
            token(b"\xe2\x82"),
            token(b"\xff\n"),
            finish=FinishReason.STOP,
        )
    )
    assert told.logprobs is not None
    assert told.logprobs.tokens == ["a", "</s>", "bytes:\\xe2\\x82", "bytes:\\xff\\x0a"]


def test_no_infinity() -> None:
    top = (token(b"b", -0.5), token(b"c", -math.inf))
    told = choice(output("a", token(b"a", -math.inf, *top), finish=FinishReason.LENGTH))
    assert told.logprobs is not None
    assert told.logprobs.token_logprobs == [-9999.0]
    assert told.logprobs.top_logprobs == [{"b": -0.5, "c": -9999.0, "a": -9999.0}]


def test_the_likelier_of_two_that_read_alike() -> None:
    told = choice(output("a", token(b"a", -3.0, token(b"a", -1.0), token(b"b", -2.0)), finish=FinishReason.LENGTH))
    assert told.logprobs is not None
    assert told.logprobs.top_logprobs == [{"a": -1.0, "b": -2.0}]


def test_a_prompt_that_decodes_to_less_than_its_tokens() -> None:
    """No offset leads past the prompt's own text."""
    prompt = EchoedPrompt([1, 2], "a", token(b"abc"))
    told = choice(output("xy", token(b"xy"), prompt=[token(b"d")], finish=FinishReason.LENGTH), prompt=prompt)
    assert told.text == "axy"
    assert told.logprobs is not None
    assert told.logprobs.text_offset == [0, 1, 1]


def test_a_space_that_no_token_has() -> None:
    """A tokenizer that puts a space before each text puts none before one that has it, and drops it all the same."""
    prompt = EchoedPrompt([1, 2, 3], " two é", token(b"", name="<s>"))
    told = choice(
        output("!", token(b"!"), prompt=[token(b"two"), token(b" \xc3"), token(b"\xa9")], finish=FinishReason.LENGTH),
        prompt=prompt,
    )
    assert told.logprobs is not None
    assert told.logprobs.text_offset == [1, 1, 4, 5, 6]
    assert [told.text[start:] for start in told.logprobs.text_offset[1:]] == ["two é!", " é!", "é!", "!"]


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_reasons_that_no_client_may_see(reason: FinishReason) -> None:
    with pytest.raises(RequestFailedError):
        choice(output("a", finish=reason))


def test_choices_that_have_not_ended_are_not_told() -> None:
    choices = Choices([EchoedPrompt([1])], 2, Wanted())
    collector = Collector()
    collector.add(choices.write(output("a", finish=FinishReason.STOP)))
    assert (choices.count, [each.index for each in collector.choices]) == (2, [0])


def test_an_output_without_text_makes_no_chunk() -> None:
    encoder = CompletionEncoder({"id": "x"}, StreamOptions(), Choices([EchoedPrompt([1])], 1, Wanted()))
    assert encoder.content(output("")) == b""
    assert encoder.content(output("a")) != b""
