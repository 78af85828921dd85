"""The batch changes nothing: a crowd in a pool that is far too small gives each request the tokens it gets alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from server.engine.core import EngineCore
from server.inputs.placeholders import PromptIds
from server.types import EngineRequest, SamplingParams, Tile
from tests.engines import Answers, drive, noise_image, one_step, real_core, tiles_of

SIZES = [(378, 378), (378, 420), (500, 400), (392, 640), (30, 200)]


def make_request(
    rng: random.Random, name: str, *, num_images: int, split: bool = False, text: list[int] | None = None
) -> EngineRequest:
    """A request of random words and pictures; half of them sample with a seed, half are greedy."""
    prompt = PromptIds(fake_token_id=32000, image_token_id=32001, rows_per_tile=64)
    prompt.add_ids([1])
    tiles: list[Tile] = []
    for _ in range(num_images):
        prompt.add_ids([rng.randrange(3, 32000) for _ in range(rng.choice([0, 0, 3, 30]))])
        width, height = rng.choice(SIZES)
        added = tiles_of(noise_image(width, height, rng.randrange(12)), split=split)
        prompt.add_tiles(len(added))
        tiles += added
    prompt.add_ids(text or [rng.randrange(3, 32000) for _ in range(rng.choice([1, 10, 60, 200]))])
    sampled = rng.random() < 0.5
    sampling = SamplingParams(
        max_tokens=rng.choice([8, 30, 140]),
        temperature=0.8 if sampled else 0.0,
        top_p=rng.choice([1.0, 0.9]) if sampled else 1.0,
        top_k=rng.choice([0, 40]) if sampled else 0,
        seed=rng.randrange(1 << 40),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
        ignore_eos=rng.random() < 0.5,
    )
    return EngineRequest(
        request_id=name,
        prompt_token_ids=prompt.token_ids,
        sampling=sampling,
        eos_token_ids=(2, 32002),
        tiles=tuple(tiles),
        placeholders=tuple(prompt.placeholders),
    )


def mixed_requests(count: int, seed: int) -> list[EngineRequest]:
    rng = random.Random(seed)
    requests = []
    for index in range(count):
        num_images = rng.choice([0, 0, 0, 1, 1, 2, 3, 5, 8])
        requests.append(make_request(rng, f"r{index}", num_images=num_images, split=num_images == 1))
    # One prompt twice, and the same words under another picture: neighbours that caches could confuse.
    twin = requests[1]
    requests.append(EngineRequest(**{**_fields(twin), "request_id": "twin"}))
    pictured = next(request for request in requests if len(request.tiles) == 1 or len(request.tiles) == 2)
    others = tuple(tiles_of(noise_image(378, 378, 999), split=False)) * len(pictured.tiles)
    requests.append(EngineRequest(**{**_fields(pictured), "request_id": "other picture", "tiles": others}))
    return requests


def _fields(request: EngineRequest) -> dict[str, object]:
    return {name: getattr(request, name) for name in request.__struct_fields__}


def crowded_core(folder: Path) -> EngineCore:
    """Room for two of the larger requests, three tile slots, small steps."""
    return real_core(
        folder,
        max_model_len=1280,
        kv_cache_memory_gb=0.00125,
        max_num_seqs=12,
        max_num_batched_tokens=96,
        max_num_batched_pixels=60_000,
        encoder_cache_tiles=3,
    )


@pytest.mark.slow
def test_64_mixed_requests_get_the_tokens_they_get_alone(tiny_checkpoint: Path) -> None:
    requests = mixed_requests(64, seed=5)
    alone = Answers()
    solo = real_core(tiny_checkpoint, enable_prefix_caching=False, max_model_len=1280)
    for request in requests:
        drive(solo, [request], alone)

    rng = random.Random(6)
    core, crowd = crowded_core(tiny_checkpoint), Answers()
    waiting = list(requests)
    cancelled: set[str] = set()
    while waiting or core.scheduler.has_work:
        for _ in range(rng.choice([0, 0, 1, 4])):
            if waiting:
                core.scheduler.add(waiting.pop(0))
        if rng.random() < 0.06:
            started = [r.request_id for r in requests if r not in waiting and r.request_id not in crowd.reasons]
            victim = rng.choice(started) if started and len(cancelled) < 12 else None
            if victim is not None:
                core.scheduler.abort([victim])
                cancelled.add(victim)
        if core.scheduler.has_work:
            one_step(core, crowd)

    assert core.scheduler.holds_nothing
    assert crowd.preemptions >= 5, "the pool was not small enough to mean anything"
    assert len(cancelled) >= 5
    finished = [request for request in requests if request.request_id not in cancelled]
    assert len(finished) >= 50
    for request in finished:
        name = request.request_id
        assert crowd.tokens[name] == alone.tokens[name], f"{name}: {len(request.tiles)} tiles"
        assert crowd.reasons[name] == alone.reasons[name]
    assert alone.tokens["other picture"] not in [alone.tokens[r.request_id] for r in requests[:-1]]


def test_a_second_turn_encodes_no_tile_again_and_says_what_was_cached(tiny_checkpoint: Path) -> None:
    core = real_core(tiny_checkpoint)
    rng = random.Random(3)
    first = make_request(rng, "first turn", num_images=1, split=True, text=list(range(300, 320)))
    answers = drive(core, [first])
    assert answers.encoded_tiles == 5
    history = first.prompt_token_ids + answers.tokens["first turn"]
    second = EngineRequest(
        **{**_fields(first), "request_id": "second turn", "prompt_token_ids": [*history, 32002, 28705, 13, 3195]}
    )
    drive(core, [second], answers)
    assert answers.encoded_tiles == 5
    assert answers.cached["second turn"] >= len(first.prompt_token_ids) // 16 * 16 > 326
    # And what the cache gave is what a computation gives.
    fresh = real_core(tiny_checkpoint, enable_prefix_caching=False)
    assert drive(fresh, [second]).tokens["second turn"] == answers.tokens["second turn"]


def test_same_words_with_another_picture_reuse_nothing_of_the_picture(tiny_checkpoint: Path) -> None:
    core = real_core(tiny_checkpoint)
    words = list(range(400, 440))
    cat = make_request(random.Random(1), "cat", num_images=1, text=words)
    other = tuple(tiles_of(noise_image(378, 378, 77), split=False))
    dog = EngineRequest(**{**_fields(cat), "request_id": "dog", "tiles": other})
    answers = drive(core, [cat])
    drive(core, [dog], answers)
    assert answers.cached["dog"] < cat.placeholders[0].offset
    assert answers.encoded_tiles == 2
    alone = drive(real_core(tiny_checkpoint), [dog])
    assert answers.tokens["dog"] == alone.tokens["dog"] != answers.tokens["cat"]
