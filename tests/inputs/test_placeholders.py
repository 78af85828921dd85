"""What a picture becomes in a prompt, by the published numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.inputs.placeholders import PromptIds
from server.types import PlaceholderRange

FAKE, IMAGE = 32000, 32001


def make_prompt(rows: int = 64) -> PromptIds:
    return PromptIds(fake_token_id=FAKE, image_token_id=IMAGE, rows_per_tile=rows)


def test_one_whole_picture_is_66_ids() -> None:
    prompt = make_prompt()
    prompt.add_tiles(1)
    assert prompt.token_ids == [FAKE, *[IMAGE] * 64, FAKE]
    assert prompt.placeholders == [PlaceholderRange(1, 64)]


def test_one_split_picture_is_326_ids() -> None:
    prompt = make_prompt()
    prompt.add_tiles(5)
    assert prompt.token_ids == [FAKE, *([*[IMAGE] * 64, FAKE] * 5)]
    assert len(prompt.token_ids) == 326
    assert [place.offset for place in prompt.placeholders] == [1, 66, 131, 196, 261]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_pictures_in_a_row_share_their_boundaries(count: int) -> None:
    for tiles in (1, 5):
        prompt = make_prompt()
        for _ in range(count):
            prompt.add_tiles(tiles)
        assert len(prompt.token_ids) == 64 * tiles * count + tiles * count + 1


def test_words_between_pictures_keep_their_boundaries_apart() -> None:
    prompt = make_prompt(2)
    prompt.add_ids([1, 5])
    prompt.add_tiles(1)
    prompt.add_ids([6])
    prompt.add_tiles(1)
    prompt.add_ids([])
    prompt.add_tiles(1)
    assert prompt.token_ids == [1, 5, FAKE, IMAGE, IMAGE, FAKE, 6, FAKE, IMAGE, IMAGE, FAKE, IMAGE, IMAGE, FAKE]
    assert prompt.placeholders == [PlaceholderRange(3, 2), PlaceholderRange(8, 2), PlaceholderRange(11, 2)]


def test_whether_a_picture_stands_last() -> None:
    prompt = make_prompt()
    assert not prompt.ends_with_image
    prompt.add_ids([1])
    assert not prompt.ends_with_image
    prompt.add_tiles(1)
    assert prompt.ends_with_image
    prompt.add_ids([])
    assert prompt.ends_with_image
    prompt.add_ids([7])
    assert not prompt.ends_with_image


@given(
    st.lists(st.one_of(st.integers(1, 5), st.lists(st.integers(3, 31999), max_size=3)), max_size=12), st.integers(1, 6)
)
@settings(max_examples=300, deadline=None)
def test_ranges_cover_the_image_ids_and_nothing_else(parts: list[int | list[int]], rows: int) -> None:
    prompt = make_prompt(rows)
    for part in parts:
        if isinstance(part, int):
            prompt.add_tiles(part)
        else:
            prompt.add_ids(part)
    covered = [index for place in prompt.placeholders for index in range(place.offset, place.end)]
    assert covered == [index for index, token in enumerate(prompt.token_ids) if token == IMAGE]  # ascending, disjoint
    assert all(place.length == rows for place in prompt.placeholders)
    assert len(prompt.placeholders) == sum(part for part in parts if isinstance(part, int))
    for place in prompt.placeholders:
        assert prompt.token_ids[place.offset - 1] == prompt.token_ids[place.end] == FAKE
    assert (FAKE, FAKE) not in zip(prompt.token_ids, prompt.token_ids[1:], strict=False)
