"""Text is only ever text, and encodes as the checkpoint's own tokenizer encodes it in place."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import CheckpointError
from server.inputs.tokenizer import Tokenizer
from tests.inputs.checkpoints import copy_tokenizer, edit_json
from tests.inputs.conftest import Variant

SPECIAL = ("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>")
SPECIAL_IDS = {0, 1, 2, 32000, 32001, 32002}
TEXTS = [
    *("Hello", " Hello", "  Hello ", "What is this?", "\n", "\nUser: hi", "a\tb", "12,345.67 €", "naïve café", ""),
    *(
        "🦊 emoji 👩‍👩‍👧",
        "数字は三です",
        "مرحبا",
        "▁",
        "▁▁lower",
        "<0x0A>",
        "<",
        "<b>",
        "image>",
        "</",
        "\x02" + "0\x03",
    ),
    *("\x00", "\ufeff", "\u2028", "e\u0301", "ﬁ", "𝔘", "\u200d", "x" * 60, " " * 40, "\n" * 20, "ß", "İ"),
]
FRAGMENTS = st.one_of(
    st.sampled_from([*SPECIAL, "<", ">", "s", "/", "▁", " ", "unk", "image", "\n"]), st.text(max_size=5)
)


def is_plain(token_ids: list[int]) -> bool:
    return not SPECIAL_IDS & set(token_ids) and all(0 <= token_id < 32000 for token_id in token_ids)


@pytest.mark.parametrize("first", [True, False])
def test_no_special_token_comes_out_of_its_name(variant: Variant, first: bool) -> None:
    for token in SPECIAL:
        for text in (
            token,
            f"a{token}b",
            f" {token} ",
            token * 3,
            f"\n{token}\n",
            token[0] + token,
            token[:-1] + token,
        ):
            assert is_plain(variant.ours.encode(text, first=first)), text


@given(parts=st.lists(FRAGMENTS, max_size=12), first=st.booleans())
@settings(max_examples=500, deadline=None)
def test_no_special_token_comes_out_of_any_text(variant: Variant, parts: list[str], first: bool) -> None:
    assert is_plain(variant.ours.encode("".join(parts), first=first))


def test_text_comes_back_as_it_was(variant: Variant) -> None:
    """Names of special tokens included: their characters are all there."""
    for text in [*TEXTS, *SPECIAL, "".join(SPECIAL)]:
        decoded = variant.reference.decode(variant.ours.encode(text, first=True), skip_special_tokens=True)
        assert decoded == text.replace("▁", " ").removeprefix(" ")


def test_runs_between_special_tokens_encode_as_in_place(variant: Variant) -> None:
    rng = random.Random(1)
    for _ in range(300):
        runs = [rng.choice(TEXTS) for _ in range(rng.randint(1, 4))]
        between = [rng.choice(SPECIAL[3:]) for _ in runs[1:]]
        text = runs[0] + "".join(token + run for token, run in zip(between, runs[1:], strict=True))
        ours = [1, *variant.ours.encode(runs[0], first=True)]
        for token, run in zip(between, runs[1:], strict=True):
            ours += [variant.ours.special_tokens[token], *variant.ours.encode(run, first=False)]
        assert ours == variant.reference(text).input_ids, text


def test_the_legacy_flag_decides_whether_a_space_begins_every_run(variant: Variant) -> None:
    first, later = (variant.ours.encode("What", first=flag) for flag in (True, False))
    assert first == [1824]
    assert later == ([3195] if variant.name == "not legacy" else [1824])
    newline = variant.ours.encode("\n", first=False)
    assert newline == ([13] if variant.name == "not legacy" else [28705, 13])


@given(text=st.text(max_size=80), first=st.booleans())
@settings(max_examples=200, deadline=None)
def test_min_tokens_is_a_lower_bound(tokenizer: Tokenizer, text: str, first: bool) -> None:
    assert tokenizer.min_tokens(len(text)) <= len(tokenizer.encode(text, first=first))


def test_min_tokens_is_a_lower_bound_for_the_longest_pieces(tokenizer: Tokenizer) -> None:
    pieces = sorted((piece for piece in tokenizer.pieces() if piece), key=len, reverse=True)[:50]
    for piece in pieces:
        text = piece.replace("▁", " ") * 40
        assert tokenizer.min_tokens(len(text)) <= len(tokenizer.encode(text, first=True))
    assert tokenizer.min_tokens(10**6) >= 10**6 // 25


def test_what_a_tokenizer_says_about_itself(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_tokens == dict(zip(SPECIAL, sorted(SPECIAL_IDS), strict=True))
    assert (tokenizer.fake_token_id, tokenizer.image_token_id) == (32000, 32001)
    assert tokenizer.bos_token_ids == [1]
    pieces = tokenizer.pieces()
    assert len(pieces) == 32003
    assert (pieces[1], pieces[3 + 65], pieces[1824], pieces[32001]) == ("<s>", "<0x41>", "▁What", "<image>")


def test_several_threads_get_what_one_gets(tokenizer: Tokenizer) -> None:
    texts = [text * 50 for text in TEXTS]
    expected = [tokenizer.encode(text, first=index % 2 == 0) for index, text in enumerate(texts)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            got = pool.map(lambda item: tokenizer.encode(item[1], first=item[0] % 2 == 0), enumerate(texts))
            assert list(got) == expected


def test_a_tokenizer_without_bos_puts_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_tokenizer(tiny_checkpoint, tmp_path / "copy", add_bos_token=False)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"]["single"] = content["post_processor"]["single"][1:]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert Tokenizer(folder).bos_token_ids == []


def remove_token(folder: Path, token: str) -> None:
    """From every file that may bring it back."""
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    edit_json(folder / "tokenizer.json", added_tokens=[entry for entry in added if entry["content"] != token])
    edit_json(folder / "tokenizer_config.json", extra_special_tokens=[])


def break_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: remove_token(folder, "<image>"), "no special token <image>"),
        (lambda folder: remove_token(folder, "<end_of_utterance>"), "no special token <end_of_utterance>"),
        (break_json, "cannot load the tokenizer"),
        (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "no special token"),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused_in_one_line(
    tiny_checkpoint: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    folder = copy_tokenizer(tiny_checkpoint, tmp_path / "copy")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
