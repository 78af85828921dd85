from __future__ import annotations

import base64
import io
import json
import random
from typing import Any

import pytest
from PIL import Image

from server.bench.workloads import WORDS, Vocabulary, Workload, WorkloadSpec, draw_picture, find_vocabulary

PLAIN = Vocabulary(WORDS, source="test")


def spec(**changes: Any) -> WorkloadSpec:
    return WorkloadSpec(**{"model": "m", "input_len": 32, "output_len": 8, "image_size": (64, 48), **changes})


def body(workload: Workload, index: int, *, warmup: bool = False) -> dict[str, Any]:
    parsed = json.loads(workload.body(index, warmup=warmup))
    assert isinstance(parsed, dict)
    return parsed


def content(workload: Workload, index: int, *, warmup: bool = False) -> Any:
    (message,) = body(workload, index, warmup=warmup)["messages"]
    assert message["role"] == "user"
    return message["content"]


def test_a_text_request_fixes_everything_that_is_measured() -> None:
    request = body(Workload(spec(), PLAIN), 0)
    assert len(request.pop("messages")[0]["content"].split()) == 32
    assert request == {
        "model": "m",
        "max_completion_tokens": 8,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_bodies_come_from_the_seed_alone() -> None:
    one, again, other = (Workload(spec(seed=seed, images=1), PLAIN) for seed in (1, 1, 2))
    assert [one.body(index) for index in range(5)] == [again.body(index) for index in reversed(range(5))][::-1]
    assert one.body(0) != other.body(0)


def test_no_two_requests_begin_alike() -> None:
    workload = Workload(spec(images=1), PLAIN)
    contents = [content(workload, index) for index in range(50)]
    contents += [content(workload, index, warmup=True) for index in range(50)]
    assert len({tuple(parts[-1]["text"].split()[:8]) for parts in contents}) == 100
    assert len({parts[0]["image_url"]["url"] for parts in contents}) == 100


def test_shared_words_come_first_and_the_length_stays() -> None:
    workload = Workload(spec(shared_prefix_len=20), PLAIN)
    texts = [content(workload, index).split() for index in range(5)] + [content(workload, 0, warmup=True).split()]
    assert {len(words) for words in texts} == {32}
    assert len({tuple(words[:20]) for words in texts}) == 1
    assert len({tuple(words[20:]) for words in texts}) == 6


def test_shared_words_stand_before_pictures() -> None:
    workload = Workload(spec(shared_prefix_len=20, images=2), PLAIN)
    parts = content(workload, 3)
    assert [part["type"] for part in parts] == ["text", "image_url", "image_url", "text"]
    assert len(parts[0]["text"].split()) == 20
    assert len(parts[3]["text"].split()) == 12
    assert parts[0] == content(workload, 4)[0]
    assert parts[1] != parts[2]


@pytest.mark.parametrize("shared", [32, 33, -1])
def test_a_prefix_must_leave_room_for_words_of_its_own(shared: int) -> None:
    with pytest.raises(ValueError, match="shorter than the input"):
        spec(shared_prefix_len=shared)


def test_repeated_images_are_the_same_in_each_request_and_differ_within_one() -> None:
    workload = Workload(spec(images=2, repeat_images=True), PLAIN)
    first, second = content(workload, 0), content(workload, 1)
    assert first[:2] == second[:2]
    assert first[0] != first[1]
    assert first[2] != second[2]


@pytest.mark.parametrize(("detail", "named"), [("auto", None), ("low", "low"), ("high", "high")])
def test_image_detail_is_named_unless_auto(detail: Any, named: str | None) -> None:
    part = content(Workload(spec(images=1, image_detail=detail), PLAIN), 0)[0]
    assert part["image_url"].get("detail") == named


def test_extra_body_adds_changes_and_takes_away() -> None:
    request = body(Workload(spec(extra_body={"ignore_eos": None, "top_k": 5, "temperature": 1}), PLAIN), 0)
    assert "ignore_eos" not in request
    assert request["top_k"] == 5
    assert request["temperature"] == 1


def test_a_picture_is_a_jpeg_of_its_size_neither_flat_nor_noise() -> None:
    url = draw_picture(random.Random(0), (640, 480))
    head, _, payload = url.partition(",")
    assert head == "data:image/jpeg;base64"
    data = base64.b64decode(payload, validate=True)
    picture = Image.open(io.BytesIO(data))
    picture.load()
    assert (picture.format, picture.size, picture.mode) == ("JPEG", (640, 480), "RGB")
    assert 8_000 < len(data) < 100_000
    quarters = [picture.crop((x, y, x + 320, y + 240)).tobytes() for x in (0, 320) for y in (0, 240)]
    assert len(set(quarters)) == 4


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3, 2)])
def test_the_smallest_pictures_can_be_drawn(size: tuple[int, int]) -> None:
    data = base64.b64decode(draw_picture(random.Random(0), size).partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == size


def test_words_of_more_than_one_token_are_left_out() -> None:
    calls = 0
    long_words = {"business", "evening", "across"}

    def count(text: str) -> int:
        nonlocal calls
        calls += 1
        return 1 + sum(2 if word in long_words else 1 for word in text.split())  # 1 for a beginning-of-text token

    found = find_vocabulary(count, source="a counter")
    assert set(found.words) == set(WORDS) - long_words
    assert found.source == "a counter"
    assert calls < len(WORDS) / 4


def test_a_counter_that_finds_few_words_or_none_is_no_help() -> None:
    def few(text: str) -> int:
        return sum(1 if word.startswith("g") else 2 for word in text.split())

    for counter in (few, len, None, lambda _: 0):
        found = find_vocabulary(counter, source="a counter")
        assert found.words == WORDS
        assert found.source == "one token a word assumed"


def test_words_are_distinct() -> None:
    assert len(set(WORDS)) == len(WORDS)
