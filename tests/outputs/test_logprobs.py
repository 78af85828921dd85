"""Entries whose bytes are the answer's bytes, token by token."""

from __future__ import annotations

import pytest

from server.outputs.detokenizer import Detokenizer, TokenTable
from server.outputs.logprobs import PACK_TOKENS, LogprobWriter, PendingLogprobs
from server.types import TokenLogprobs

PIECES = ["</s>", "▁", "▁the", "cat", "<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>", "▁é", None]
EOS, SPACE, THE, CAT, F0, X9F, A6, X8A, E_ACUTE, PADDING = range(10)
TABLE = TokenTable.from_pieces(PIECES, special_ids={EOS})


def write(token_ids: list[int], *, skip: bool = True, at_start: bool = True) -> list[tuple[str, bytes]]:
    writer = LogprobWriter(TABLE, skip_special_tokens=skip, at_start=at_start)
    return [(entry.token, entry.data) for entry in writer.write([TokenLogprobs(token, -1.0) for token in token_ids])]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize(
    "token_ids",
    [
        [THE, CAT, EOS],
        [SPACE, THE, SPACE],
        [F0, X9F, A6, X8A, THE],
        [EOS, THE],
        [SPACE, SPACE, CAT],
        [F0, CAT, X8A],
        [E_ACUTE, PADDING, E_ACUTE],
        [CAT],
    ],
)
def test_the_bytes_are_those_of_the_text(token_ids: list[int], skip: bool, at_start: bool) -> None:
    detokenizer = Detokenizer(TABLE, skip_special_tokens=skip, at_start=at_start)
    text = detokenizer.push(token_ids) + detokenizer.flush()
    data = b"".join(data for _, data in write(token_ids, skip=skip, at_start=at_start))
    assert data.decode("utf-8", errors="replace") == text


def test_a_byte_is_itself_and_its_token_says_that_it_is_no_character() -> None:
    assert write([F0, X9F]) == [("\ufffd", b"\xf0"), ("\ufffd", b"\x9f")]


def test_a_hidden_special_token_has_its_name_and_adds_nothing() -> None:
    assert write([CAT, EOS]) == [("cat", b"cat"), ("</s>", b"")]
    assert write([CAT, EOS], skip=False) == [("cat", b"cat"), ("</s>", b"</s>")]


def test_alternatives_stand_where_the_token_stands() -> None:
    writer = LogprobWriter(TABLE, skip_special_tokens=True, at_start=True)
    first, second = writer.write([TokenLogprobs(THE, -1.0, ((SPACE, -0.5), (THE, -1.0))), TokenLogprobs(THE, -2.0)])
    assert [(entry.token, entry.data, entry.logprob) for entry in first.top] == [("", b"", -0.5), ("the", b"the", -1.0)]
    assert (first.token, second.token, second.logprob) == ("the", " the", -2.0)


def test_what_nobody_has_taken_comes_back_whole_and_in_order_and_is_kept_small() -> None:
    pending = PendingLogprobs()
    entries = [
        TokenLogprobs(index, -0.5 * index, tuple((index + place, -1.25 * place) for place in range(20)))
        for index in range(100)
    ]
    for entry in entries:
        pending.add([entry])
    assert len(pending._latest) < PACK_TOKENS
    assert sum(map(len, pending._packed)) < 100 * 320
    assert [entry for count in (1, 30, 5, 0, 62) for entry in pending.take(count)] == entries[:98]
    pending.add([entries[0]])
    assert pending.take(100) == [*entries[98:], entries[0]]
    assert pending.take(1) == []
