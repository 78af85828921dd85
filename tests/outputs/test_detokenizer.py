"""Incremental text against the whole, and against the checkpoint's own decoder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.inputs.tokenizer import Tokenizer
from server.outputs.detokenizer import Detokenizer, TokenTable

EOU = 32002
BYTE_0 = 3  # id of <0x00>; the other 255 follow

# A vocabulary of a few pieces, for tests of single rules: specials, bytes, words.
PIECES: list[str | None] = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = {word: len(PIECES) + index for index, word in enumerate(["▁Hello", "▁", "world", "▁▁▁", "é", "a▁b", "\n"])}
GAP = len(PIECES) + len(WORDS)  # an id without a piece
TABLE = TokenTable.from_pieces([*PIECES, *WORDS, None, "<image>"], special_ids={0, 1, 2, GAP + 1})

TEXTS = [
    *("Hello world", " leading", "  two  spaces  ", "\n\nnewlines\n", "tab\there", "naïve café", "…", ""),
    *("🦊", "👩‍👩‍👧 family", "数字は三です", "مرحبا بالعالم", "ﬁ ligature", "e\u0301 combining", "\u200b", "\ufeffbom"),
    *("<0x41>", "<s> not special", "</s>", "▁lower one eighth block", "a\u2028b", "\x00\x01\x7f", "𝔘𝔫𝔦", "ɐ̸̛"),
]


def ids_of(data: bytes) -> list[int]:
    """Byte tokens that spell `data`."""
    return [BYTE_0 + byte for byte in data]


def decode(ids: list[int], *, table: TokenTable = TABLE, skip_special_tokens: bool = True, cut: int = 1) -> str:
    """Push `cut` ids at a time, then flush."""
    detokenizer = Detokenizer(table, skip_special_tokens=skip_special_tokens)
    deltas = [detokenizer.push(ids[start : start + cut]) for start in range(0, len(ids), cut)]
    return "".join(deltas) + detokenizer.flush()


def test_every_kind_of_piece_has_its_bytes() -> None:
    assert TABLE.get(BYTE_0 + 0xE2) == b"\xe2"
    assert TABLE.get(WORDS["▁Hello"]) == b" Hello"
    assert TABLE.get(WORDS["a▁b"]) == b"a b"
    assert TABLE.get(WORDS["é"]) == "é".encode()
    assert TABLE.get(1) == b"<s>"
    assert TABLE.get(GAP) == b""
    assert TABLE.get(GAP + 1) == b"<image>"
    assert TABLE.get(GAP + 1000) == b""  # ids that only pad the embedding


def test_only_a_whole_piece_names_a_byte() -> None:
    table = TokenTable.from_pieces(["<0xe2>", "<0xE2>x", "x<0xE2>", "<0xE>", "<0xE22>"], special_ids=())
    assert [table.get(index) for index in range(5)] == [b"\xe2", b"<0xE2>x", b"x<0xE2>", b"<0xE>", b"<0xE22>"]


def test_a_special_piece_that_looks_like_a_byte_stays_as_it_is() -> None:
    table = TokenTable.from_pieces(["<0x41>", "<0x41>", "▁x"], special_ids={1, 2})
    assert [table.get(index) for index in range(3)] == [b"A", b"<0x41>", "▁x".encode()]


@pytest.mark.parametrize("character", ["é", "三", "🦊"])
def test_a_character_comes_out_with_its_last_byte(character: str) -> None:
    detokenizer = Detokenizer(TABLE, skip_special_tokens=True)
    *first, last = ids_of(character.encode())
    assert [detokenizer.push([token]) for token in first] == [""] * len(first)
    assert detokenizer.push([last]) == character
    assert detokenizer.flush() == ""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xf0\x9f\xa6", "\ufffd"),  # a character cut short by the end
        (b"a\xffb", "a\ufffdb"),
        (b"\xe4\xb8A", "\ufffdA"),  # cut short by another character
        (b"\x80\x80", "\ufffd\ufffd"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),  # a surrogate is not a character
        (b"\xc0\xaf", "\ufffd\ufffd"),  # an overlong slash
    ],
)
def test_bytes_that_are_no_character_become_replacement_characters(data: bytes, text: str) -> None:
    assert decode(ids_of(data)) == text


def test_a_cut_character_appears_only_at_the_end() -> None:
    detokenizer = Detokenizer(TABLE, skip_special_tokens=True)
    assert detokenizer.push([WORDS["world"], *ids_of(b"\xf0\x9f")]) == "world"
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["▁Hello", "▁Hello"], "Hello Hello"),
        (["▁", "▁Hello"], " Hello"),
        (["▁▁▁", "world"], "  world"),
        (["▁"], ""),
        (["world", "▁"], "world "),
        (["\n", "▁Hello"], "\n Hello"),
    ],
)
def test_one_leading_space_is_dropped_and_only_one(words: list[str], text: str) -> None:
    for cut in (1, 2):
        assert decode([WORDS[word] for word in words], cut=cut) == text


def test_a_space_after_a_cut_character_is_not_leading() -> None:
    assert decode([*ids_of(b"\xe4"), WORDS["▁Hello"]]) == "\ufffd Hello"


def test_leading_space_as_a_byte_is_dropped_too() -> None:
    assert decode(ids_of(b"  x")) == " x"


def test_nothing_pushed_is_not_a_start() -> None:
    detokenizer = Detokenizer(TABLE, skip_special_tokens=True)
    assert detokenizer.push([]) == detokenizer.push([1]) == detokenizer.push([GAP]) == ""
    assert detokenizer.push([WORDS["▁Hello"]]) == "Hello"


def test_special_tokens_are_hidden_or_shown() -> None:
    ids = [1, WORDS["▁Hello"], 2, WORDS["▁Hello"], 0]
    assert decode(ids) == "Hello Hello"
    assert decode(ids, skip_special_tokens=False) == "<s> Hello</s> Hello<unk>"


def test_a_hidden_token_does_not_cut_a_character() -> None:
    first, *rest = ids_of("三".encode())
    assert decode([first, 2, *rest]) == "三"
    assert decode([first, 2, *rest], skip_special_tokens=False) == "\ufffd</s>\ufffd\ufffd"


@given(st.lists(st.integers(0, GAP + 3), max_size=40), st.booleans(), st.integers(1, 7))
@settings(max_examples=300, deadline=None)
def test_any_cut_gives_the_same_text(ids: list[int], skip: bool, cut: int) -> None:
    whole = decode(ids, skip_special_tokens=skip, cut=len(ids) or 1)
    assert decode(ids, skip_special_tokens=skip, cut=cut) == whole
    data = b"".join(TABLE.get(token) for token in ids if not (skip and token in TABLE.special_ids))
    assert whole == data.decode(errors="replace").removeprefix(" ")


class Reference:
    """The checkpoint's tokenizer as transformers loads it, and our table of the same folder."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.ours = Tokenizer(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.table = TokenTable.from_pieces(self.ours.pieces(), self.ours.special_tokens.values())

    def decode(self, ids: list[int], *, skip: bool) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=skip)
        return text


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Reference:
    return Reference(tiny_checkpoint)


def test_the_table_covers_the_vocabulary(reference: Reference) -> None:
    assert len(reference.table.token_bytes) == 32003
    assert reference.table.special_ids == {0, 1, 2, 32000, 32001, 32002}
    assert all(reference.table.token_bytes)


def is_text(ids: list[int], table: TokenTable, *, skip: bool) -> bool:
    """Whether all bytes make characters: where they do not, the reference marks each byte and we mark each error."""
    try:
        b"".join(table.get(token) for token in ids if not (skip and token in table.special_ids)).decode()
    except UnicodeDecodeError:
        return False
    return True


def test_2000_random_id_sequences_decode_as_the_tokenizer_decodes_them(reference: Reference) -> None:
    rng = random.Random(1)
    compared = 0
    while compared < 2000:
        skip = rng.random() < 0.5
        ids = [rng.choice([rng.randrange(32003), rng.randrange(259, 400), 28705]) for _ in range(rng.randint(0, 12))]
        for _ in range(rng.choice([0, 0, 1, 2])):
            place = rng.randint(0, len(ids))
            ids[place:place] = rng.choice([[1], [2], [EOU], [32000, 32001], ids_of("é🦊".encode())])
        if is_text(ids, reference.table, skip=skip):
            compared += 1
            ours = decode(ids, table=reference.table, skip_special_tokens=skip, cut=rng.randint(1, 3))
            assert ours == reference.decode(ids, skip=skip), ids


def plain_ids(reference: Reference, text: str) -> list[int]:
    """Ids of a text in which names of special tokens are plain characters."""
    return reference.ours.encode(text, first=True)


def round_trip(text: str) -> str:
    """What a text is after encoding and decoding: the tokenizer adds a first space only where there is none."""
    return text.replace("▁", " ").removeprefix(" ")


def test_texts_come_back_as_they_were(reference: Reference) -> None:
    for text in TEXTS:
        ids = plain_ids(reference, text)
        for cut in (1, 3):
            assert decode(ids, table=reference.table, cut=cut) == reference.decode(ids, skip=True)
            assert decode(ids, table=reference.table, cut=cut) == round_trip(text)


@given(text=st.text(max_size=60))
@settings(max_examples=400, deadline=None)
def test_any_text_survives_encoding_and_incremental_decoding(reference: Reference, text: str) -> None:
    ids = plain_ids(reference, text)
    assert decode(ids, table=reference.table) == reference.decode(ids, skip=True) == round_trip(text)
